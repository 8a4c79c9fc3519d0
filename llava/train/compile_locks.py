"""Locks of compilations that were killed.

PyTorch compiles an extension (DeepSpeed's optimizers and collectives are such) under a file named `lock` in the
extension's build folder, and whoever finds that file waits for it to go, without a limit. A process that is killed
while it compiles leaves it behind, and then every later start waits for ever. The one that compiles keeps the file
open, which tells a lock that is held from one that was left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

SHARED_DISKS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "fuse.", "glusterfs", "wekafs", "afs")
QUIET = 900.0
"""Seconds without a change in the build folder after which a lock on a shared disk, whose owner may run on another
machine, counts as left behind."""


def build_root() -> Path:
    """Where PyTorch builds extensions."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def left_behind(root: Path) -> list[Path]:
    """The locks below a folder that nobody holds any more.

    On a disk of this machine those are the ones that no process has open. Another user's processes cannot be looked
    into, so a lock of another user counts by its age, as one on a shared disk does.
    """
    # The folder of the Python and CUDA versions lies between, unless TORCH_EXTENSIONS_DIR names it.
    locks = [path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern) if path.is_file()]
    if not locks:
        return []
    held = set(_open_files())
    shared = on_shared_disk(root)
    found = []
    for path in locks:
        with contextlib.suppress(FileNotFoundError):  # it was given back meanwhile
            status = path.stat()
            if (status.st_dev, status.st_ino) in held:
                continue
            quiet = time.time() - max(file.stat().st_mtime for file in path.parent.iterdir())
            if quiet > QUIET or not (shared or status.st_uid != os.getuid() or not os.path.isdir("/proc/self/fd")):
                found.append(path)
    return found


def _open_files() -> Iterator[tuple[int, int]]:
    """Device and number of every file that a process of this machine has open, as far as one may look."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for link in folder.iterdir():
                with contextlib.suppress(OSError):
                    status = link.stat()
                    yield status.st_dev, status.st_ino


def on_shared_disk(path: Path) -> bool:
    """Whether a folder lies on a disk that other machines may write to, by the kind that the system mounted."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    target = os.path.realpath(path)
    mounts = [line.split()[1:3] for line in lines if len(line.split()) > 2]
    holding = [(place, kind) for place, kind in mounts if target == place or target.startswith(place.rstrip("/") + "/")]
    return not holding or max(holding, key=lambda mount: len(mount[0]))[1].startswith(SHARED_DISKS)


def clear(root: Path | None = None) -> list[Path]:
    """Remove the locks that killed compilations left, and say so; a lock that may be held stays, with a line.

    Args:
        root: where extensions are built; default: where PyTorch builds them.

    Returns:
        What was removed.
    """
    root = build_root() if root is None else root
    removed = []
    with _one_at_a_time(root):
        for path in left_behind(root):
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                path.unlink()
                removed.append(path)
                logger.warning("removed %s: a compilation that was killed had left it", path)
    for path in [path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)]:
        logger.warning(
            "%s is being compiled, so this start may wait; delete %s if nobody compiles it", path.parent, path
        )
    return removed


@contextlib.contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Keep two ranks from looking at once: the second would remove the lock that the first has just taken anew."""
    with contextlib.ExitStack() as held:
        if root.is_dir():
            # A folder that cannot be written to, or lies on a disk without locks, is looked at without one.
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                file = held.enter_context(open(root / ".looking_for_old_locks", "a", encoding="utf-8"))
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield
