"""`duet doctor`: is this installation right, for reducing, training and evaluating? See `duet.doctor`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from duet import doctor, tested
from duet.doctor import Finding
from duet.errors import main_guard
from llava import selftest
from llava.train import compile_locks
from llava.train.run_log import has_wandb_login


def deepspeed_findings() -> list[Finding]:
    """Whether DeepSpeed can compile its operators, and whether a compile is in the way."""
    if importlib.util.find_spec("deepspeed") is None:
        return [Finding("note", "deepspeed", "not installed: training runs under torchrun without ZeRO")]
    # The launcher puts the interpreter's folder on the PATH, too.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    lacking = [] if shutil.which("ninja", path=path) else ["ninja (pip install ninja)"]
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        lacking.append("a C++ compiler (g++)")
    folder = compile_locks.build_root()
    found = [
        Finding("FAIL", "deepspeed", f"cannot compile its operators without {' and '.join(lacking)}")
        if lacking
        else Finding("ok", "deepspeed", f"compiles its operators into {folder}")
    ]
    return [*found, *lock_findings(folder)]


def lock_findings(folder: Path) -> list[Finding]:
    """Locks of compilations: those that a killed one left, and those that somebody holds."""
    left = compile_locks.left_behind(folder)
    found = []
    for path in [path for pattern in ("*/lock", "*/*/lock") for path in folder.glob(pattern)]:
        if path in left:
            text = f"{path} was left by a compile that was killed; training removes it, other programs wait for it"
        else:
            text = f"{path} may be held: somebody compiles, and a start waits until that ends"
        found.append(Finding("note", "compile lock", text))
    return found or [Finding("ok", "compile lock", "none")]


def wandb_finding() -> Finding:
    """Whether runs reach wandb."""
    if importlib.util.find_spec("wandb") is None:
        return Finding("note", "wandb", "not installed; every run has its figures in a file of its own")
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        return Finding("ok", "wandb", f"WANDB_MODE={mode}")
    if not has_wandb_login():
        return Finding("note", "wandb", "no login: runs stay offline until `wandb login`")
    return Finding("ok", "wandb", "logged in")


def findings() -> Iterable[Finding]:
    """Everything, quick things first."""
    yield from doctor.versions(tested.RANGES, needed=("torch", "transformers", "accelerate"))
    yield from doctor.devices()
    yield from doctor.kernel_findings()
    yield from deepspeed_findings()
    yield wandb_finding()
    places = {"here": Path.cwd(), "weights": doctor.hub_folder(), "temporary files": Path(tempfile.gettempdir())}
    yield from doctor.disk(places | {"compiled operators": compile_locks.build_root()})
    yield from doctor.self_test("duet", doctor.selftest.CHECKS, ("torch", "transformers"))
    yield from doctor.self_test("llava", selftest.CHECKS, tuple(tested.RANGES))


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks; returns the exit status."""
    doctor.parse(argv, "duet doctor")
    return doctor.report(findings())


if __name__ == "__main__":
    raise SystemExit(main())
