"""One run at a time in an output folder: a lock that dies with its process, and a record of who holds it."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.train.checkpoints import CheckpointError

logger = logging.getLogger(__name__)

LOCK = ".lock"
PATIENCE = 20.0
"""Seconds to wait for a run that is about to end: the ranks of a killed one live on for a moment."""

_held: dict[Path, int] = {}
"""Folders that this process has locked. Their lock files must not be opened again: closing one gives the lock up."""


class FolderInUse(CheckpointError):
    """Another run writes to the folder; the message says which."""


def describe_holder(path: Path) -> str:
    """Who wrote a lock file, in words."""
    try:
        said = json.loads(path.read_bytes())
        return f"process {said['pid']} on {said['host']}, since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextlib.contextmanager
def exclusive(output_dir: str | Path, patience: float = PATIENCE) -> Iterator[None]:
    """Let only one run at a time write to an output folder.

    The lock is the system's own, on an open file: it ends with the process, however that ends, also on the shared disks
    that pass locks on (NFS, Lustre with `-o flock`, GPFS, CephFS). Worker processes do not inherit it.

    Args:
        output_dir: of the run; it is made.
        patience: seconds to wait for a run that is ending.

    Raises:
        FolderInUse: another run still holds the folder.
        CheckpointError: the folder cannot be written.
    """
    path = Path(output_dir) / LOCK
    key = path.resolve()
    if _held.get(key) == os.getpid():
        raise FolderInUse(f"{output_dir} is in use by another run of this process")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as err:
        raise CheckpointError(f"--output_dir {output_dir} cannot be written: {err}") from err
    with file:
        _wait_for(file, path, patience)
        _held[key] = os.getpid()
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        record = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}) + "\n"
        # A full disk must not keep anyone out: the lock holds without the record, which only says whose it is.
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), record.encode())
        try:
            yield
        finally:
            _held.pop(key, None)


def _wait_for(file: Any, path: Path, patience: float) -> None:
    deadline, said = time.monotonic() + patience, False
    while not _take(file, path):
        holder = describe_holder(path)
        if time.monotonic() >= deadline:
            raise FolderInUse(
                f"{path.parent} is in use by another run ({holder}); wait for it or end it, or give this one its own "
                "--output_dir"
            )
        if not said:
            logger.warning(
                "%s is in use by another run (%s): waiting %.0f s for its end", path.parent, holder, patience
            )
        said = True
        time.sleep(0.2)


def _take(file: Any, path: Path) -> bool:
    """Lock the file; False while somebody else has it."""
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return not _lives_here(path)
    except OSError as err:
        if err.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if _lives_here(path):
            return False
        logger.warning("%s cannot be locked (%s): make sure that only one run uses it", path.parent, err)
    return True


def _lives_here(path: Path) -> bool:
    """Whether the process that a lock file names runs on this machine, where the disk knows no locks."""
    import psutil  # accelerate brings it

    try:
        said = json.loads(path.read_bytes())
        begun = datetime.datetime.fromisoformat(said["since"]).timestamp()
        own = said["host"] == socket.gethostname() and said["pid"] != os.getpid()
        # A process that was started later only has the same number.
        return own and psutil.Process(said["pid"]).create_time() <= begun + 1
    except (OSError, ValueError, KeyError, TypeError, OverflowError, psutil.Error):
        return False


def in_use(output_dir: str | Path) -> str | None:
    """Which other process holds an output folder, in words; None when none does."""
    path = Path(output_dir) / LOCK
    if not path.is_file() or _held.get(path.resolve()) == os.getpid():
        return None
    try:
        with open(path, "a+", encoding="utf-8") as file:
            return None if _take(file, path) else describe_holder(path)
    except OSError:
        return None  # what cannot be opened for writing is reported when the run starts
