"""A compilation that was killed does not make every later start wait."""

from __future__ import annotations

import os
import time

import pytest
from torch.utils.file_baton import FileBaton

from llava.train import compile_locks


@pytest.fixture
def root(tmp_path):
    (tmp_path / "py311_cpu" / "deepspeed_shm_comm").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def lock(root):
    return root / "py311_cpu" / "deepspeed_shm_comm" / "lock"


def test_the_lock_of_a_killed_compilation_goes_and_that_of_a_living_one_stays(root, lock, caplog):
    """By PyTorch's own lock, taken in a child that is killed; what waits for it afterwards does not wait."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        FileBaton(str(lock)).try_acquire()
        os.write(write, b"held")
        time.sleep(60)
        os._exit(0)
    assert os.read(read, 4) == b"held"
    assert compile_locks.clear(root) == [] and lock.is_file()
    assert "is being compiled, so this start may wait" in caplog.text
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert compile_locks.clear(root) == [lock] and not lock.exists()
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert compile_locks.clear(root) == []
    baton.release()


def test_on_a_shared_disk_only_a_long_silence_counts(root, lock, monkeypatch):
    """Its owner may run on another machine; a compiler that works writes something now and then."""
    monkeypatch.setattr(compile_locks, "on_shared_disk", lambda path: True)
    lock.touch()
    old = time.time() - 2 * compile_locks.QUIET
    os.utime(lock, (old, old))
    (lock.parent / "cpu_adam.o").touch()
    assert compile_locks.left_behind(root) == []
    os.utime(lock.parent / "cpu_adam.o", (old, old))
    assert compile_locks.left_behind(root) == [lock]


def test_the_folder_that_torch_is_told_is_looked_at(root, lock, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(root / "py311_cpu"))
    lock.touch()
    from llava.train import runtime

    monkeypatch.setenv("RANK", "0")
    runtime.require_deepspeed()
    assert not lock.exists()


def test_a_missing_folder_is_no_error(tmp_path):
    assert compile_locks.clear(tmp_path / "nowhere") == []
    assert not (tmp_path / "nowhere").exists()


def test_a_disk_without_locks_is_looked_at_without_one(root, lock, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    lock.touch()
    assert compile_locks.clear(root) == [lock]


def test_what_another_user_owns_stays_and_is_no_crash(root, lock, monkeypatch):
    lock.touch()
    monkeypatch.setattr(type(lock), "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "not yours")))
    assert compile_locks.clear(root) == []
