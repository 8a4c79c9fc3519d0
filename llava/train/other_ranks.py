"""Going on with another number of ranks under DeepSpeed, by its universal checkpoints.

ZeRO divides optimizer states (and, at stage 3, weights) among the ranks, so a checkpoint fits the number of ranks that
wrote it. DeepSpeed's own converter puts the pieces together, one file for each weight; every number of ranks can read
that. The converted copy lies beside the checkpoints while it is read, and is removed afterwards; the checkpoint stays.

Without DeepSpeed nothing is divided, and any number of ranks can go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llava.train.checkpoints import CheckpointError
from llava.train.resume import rank_files

logger = logging.getLogger(__name__)

COPY = "resume_copy"
_DONE = "latest_universal"


def saved_ranks(folder: Path) -> int | None:
    """How many ranks a checkpoint's optimizer state is divided among; None where it is not divided."""
    return len(rank_files(folder / (folder / "latest").read_text(encoding="utf-8").strip())) or None


@contextlib.contextmanager
def for_these_ranks(folder: Path, args: Any) -> Iterator[Path]:
    """Give the folder that this run's ranks can read DeepSpeed's state from; every rank has to enter and leave.

    Args:
        folder: the checkpoint.
        args: the training arguments; DeepSpeed's settings in them are told what is read.

    Raises:
        CheckpointError: it was saved by another number of ranks and cannot be converted; nothing was changed.
    """
    saved = saved_ranks(folder)
    if saved is None or saved == args.world_size:
        yield folder
        return
    copy = Path(args.output_dir) / COPY
    first = args.process_index == 0
    if first:
        logger.warning("%s was saved by %d ranks and is converted for %d", folder, saved, args.world_size)
        shutil.rmtree(copy, ignore_errors=True)
    _meet()
    settings = args.hf_deepspeed_config.config
    settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}
    try:
        if first:
            convert(folder, copy, saved, args.world_size)
        while not (copy / _DONE).is_file():
            time.sleep(0.2)  # not a collective: converting a large model takes longer than those wait
        _meet()
        yield copy
        _meet()
    finally:
        if first:
            shutil.rmtree(copy, ignore_errors=True)


def convert(folder: Path, copy: Path, saved: int, wanted: int) -> None:
    """Write a checkpoint's state so that any number of ranks can read it.

    Args:
        folder: the checkpoint.
        copy: where it goes; as large as the optimizer state, and for a while twice that.
        saved: ranks that saved it.
        wanted: ranks that go on.

    Raises:
        CheckpointError: DeepSpeed cannot convert it.
    """
    tag = (folder / "latest").read_text(encoding="utf-8").strip()
    copy.mkdir(parents=True)
    workers = str(max(1, min(8, (os.cpu_count() or 1) // 2)))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / tag), "--output_folder", str(copy / tag)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in launched} | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not (copy / _DONE).is_file():
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
        raise CheckpointError(
            f"{folder} was saved by {saved} ranks, and DeepSpeed could not convert it for {wanted} ({reason}). Nothing "
            f"was changed: go on with {saved} ranks, or begin a new run from the weights in that folder with "
            "--model_name_or_path and another --output_dir"
        )


def keep_groups(optimizer: Any) -> list[dict[str, Any]]:
    """What this run set for each group of the optimizer: rates, decay and the like."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def restore_groups(optimizer: Any, groups: list[dict[str, Any]], scheduler: Any) -> None:
    """Give every group its own settings again: converted states carry those of the first group for all (ZeRO-3)."""
    for group, kept, rate in zip(optimizer.param_groups, groups, scheduler.get_last_lr(), strict=True):
        group.update({name: value for name, value in kept.items() if name != "step"} | {"lr": rate})


def _meet() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
