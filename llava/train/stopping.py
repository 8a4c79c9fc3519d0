"""How a run is asked to stop, how its ranks agree on the step, and how the one who started them learns of it."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

EXIT_STOPPED = 143
"""Exit code of a run that was asked to stop and saved a checkpoint (128 + 15); the same command goes on."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM, and SIGUSR1, which SLURM's `--signal` sends some time before a limit."""
STOP_CODES = frozenset(code for number in STOP_SIGNALS for code in (128 + number, -number))
"""Exit codes of processes that one of these signals ended."""

LAUNCHER_PID = "LLAVA_LAUNCHER_PID"
"""Environment variable: the process that started this run and that a run must not outlive."""
LAUNCHER_NODE = "LLAVA_LAUNCHER_NODE"
"""Environment variable: where that process's id means something, see `this_node`."""
STOP_FILE = "LLAVA_STOP_FILE"
"""Environment variable: a file that a rank makes when it stops early; not every launcher passes on an exit code."""


def this_node() -> str:
    """Where a process id means this process: the machine's name, and on Linux the namespace that ids are counted in."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()


def exit_status(stopped: bool) -> int:
    """A rank's exit status; tells who started it when the run was stopped early."""
    if not stopped:
        return 0
    note = os.environ.get(STOP_FILE)
    if note:
        Path(note).touch()
    return EXIT_STOPPED


class StopSignal:
    """Turns SIGTERM and SIGUSR1 into a request that is honoured at the next step boundary.

    Before training begins there is nothing to save, so a signal ends the process at once. The end of the process that
    started the run counts as a request too: otherwise ranks would go on beside the next start of the same command. A
    process of another node cannot be looked for here; the ranks on its own node do.
    """

    def __init__(self) -> None:
        self.requested = False
        self.armed = False
        self.reason = "a signal to another rank"
        node = os.environ.get(LAUNCHER_NODE)
        self.launcher = int(os.environ.get(LAUNCHER_PID, "0")) if node in (None, "", this_node()) else 0

    def launcher_is_gone(self) -> bool:
        """True when the process that started the run has ended, as far as this node can tell."""
        return self.launcher > 0 and not os.path.exists(f"/proc/{self.launcher}") and os.path.exists("/proc/self")

    def install(self) -> StopSignal:
        """Take over the signals in this process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.reason = signal.Signals(number).name
        if not self.armed:
            raise SystemExit(exit_status(stopped=True))

    def agreed(self, device: torch.device) -> bool:
        """True on every rank, at the same step, when any rank was asked to stop."""
        if not self.requested and self.launcher_is_gone():
            self.requested, self.reason = True, "the end of the process that started it"
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return self.requested
        flag = torch.tensor([float(self.requested)], device=device)
        distributed.all_reduce(flag)
        return bool(flag.item() > 0)


def shield_workers(loader: Any) -> Any:
    """Keep stop signals from ending the processes that load data; their rank needs them up to its next step.

    A scheduler sends its signals to all processes of a job. A loader whose process was ended raises in the rank, which
    then could not save. The processes end with their rank, as always.

    Args:
        loader: a `DataLoader`, or accelerate's wrapper of one; changed in place, and returned.
    """
    inner = getattr(loader, "base_dataloader", loader)
    if getattr(inner, "num_workers", 0):
        # multiprocessing ends them by SIGTERM when the rank fails, and waits for that without a limit.
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)
        inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
    return loader


def _end_workers() -> None:
    """End what is left of the processes that load data; it comes before multiprocessing's own end, which waits."""
    for process in multiprocessing.active_children():
        process.kill()


def _start_worker(then: Callable[[int], None] | None, worker: int) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)
