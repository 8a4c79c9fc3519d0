"""Data parallel training on one machine: one thread per rank, gradients averaged once per step.

On a busy machine this beats one process with several threads, which wait for each other in every operation.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank() -> int:
    """This process's rank, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of ranks, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _entry(number: int, ranks: int, port: int, function: Callable, args: tuple) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=number, world_size=ranks)
    try:
        function(*args)
    finally:
        dist.destroy_process_group()


def launch(function: Callable, ranks: int, *args: object) -> None:
    """Run `function(*args)` on every rank; with one rank in this process."""
    if ranks == 1:
        function(*args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the ranks end with us
    mp.spawn(_entry, args=(ranks, port, function, args), nprocs=ranks, daemon=True)


class Clock:
    """Training time that all ranks agree on, so that they change phase and stop at the same step."""

    def __init__(self, spent: float):
        self.spent = spent
        self.last = time.time()

    def local(self) -> float:
        """Seconds since the last shared step."""
        return time.time() - self.last


def average_gradients(parameters: Iterable[torch.nn.Parameter], clock: Clock) -> None:
    """Replace gradients by their mean over ranks and advance the shared clock."""
    elapsed = clock.local()
    clock.last = time.time()
    if world() == 1:
        clock.spent += elapsed
        return
    wanted = [p for p in parameters if p.requires_grad]
    pieces = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in wanted]
    flat = torch.cat([*pieces, torch.tensor([elapsed])])
    dist.all_reduce(flat)
    flat /= world()
    clock.spent += float(flat[-1])
    at = 0
    for p in wanted:
        p.grad = flat[at : at + p.numel()].view_as(p).clone()
        at += p.numel()


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        dist.barrier()
