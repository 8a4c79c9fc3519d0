"""The processes of one evaluation, as torchrun, accelerate or a plain `python` started them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

# Ranks wait for each other at the end of a benchmark, and for the judge of a video benchmark.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        rank: its number.
        world: how many there are.
        local_rank: its number on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Processes:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, and meet the others (gloo)."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1 and not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=PATIENCE)
        rank = int(os.environ.get("RANK", "0")) if world > 1 else 0
        return cls(rank, world, int(os.environ.get("LOCAL_RANK", "0")) if world > 1 else 0)

    @property
    def first(self) -> bool:
        """Whether this is the process that merges, scores and prints."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """The device of this process: with several on one machine, each takes its own accelerator."""
        if wanted != "cuda" or self.world == 1 or not torch.cuda.is_available():
            return wanted
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    def wait(self) -> None:
        """Wait until all are here."""
        if self.world > 1:
            distributed.barrier()

    def gather(self, content: Any) -> list[Any]:
        """What every process has, in the order of ranks."""
        found: list[Any] = [content] * self.world
        if self.world > 1:
            distributed.all_gather_object(found, content)
        return found

    def from_first(self, content: Any) -> Any:
        """What the first process has."""
        box = [content]
        if self.world > 1:
            distributed.broadcast_object_list(box, src=0)
        return box[0]

    def leave(self) -> None:
        """Part from the others."""
        if self.world > 1 and distributed.is_initialized():
            distributed.destroy_process_group()
