"""Is this installation right? `duet doctor`, or `python -m duet.doctor` for what the library alone needs.

One line per check: `ok`, `note` (works, but worth knowing) or `FAIL` with what to do; the exit status is 1 with a FAIL.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from duet import kernels, selftest, tested
from duet.errors import main_guard

LEAST_FREE = 5 * 2**30
"""Bytes below which a cache folder is worth a word: one 7B checkpoint shard does not fit."""


@dataclass(frozen=True)
class Finding:
    """What the doctor says about one thing.

    Attributes:
        level: "ok", "note" or "FAIL".
        topic: what it is about.
        text: what was found, and the remedy where something is wrong.
    """

    level: str
    topic: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.topic:<12} {self.text}"


def versions(names: Iterable[str], needed: Iterable[str]) -> list[Finding]:
    """Installed versions against the tested ranges.

    Args:
        names: libraries, as in ``duet.tested.RANGES``.
        needed: those among them without which nothing works.
    """
    found = [Finding("ok", "python", f"{platform.python_version()}, {sys.executable}")]
    for name in names:
        number = tested.installed(name)
        if number is None:
            level = "FAIL" if name in needed else "note"
            text = f"not installed; {tested.remedy([name])}" if level == "FAIL" else "not installed"
            found.append(Finding(level, name, text))
        elif tested.is_tested(name, number):
            found.append(Finding("ok", name, f"{number}, tested: {tested.RANGES[name]}"))
        else:
            text = f"{number} was not tested, {tested.RANGES[name]} was; {tested.remedy([name])}"
            found.append(Finding("FAIL", name, text))
    return found


def devices() -> list[Finding]:
    """Accelerators, with a small product computed on each; the CPU where there is none."""
    if not torch.cuda.is_available():
        where = "no accelerator" if torch.version.cuda is None and torch.version.hip is None else "none that torch sees"
        return [Finding("ok", "devices", f"CPU with {os.cpu_count()} cores; {where}")]
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        name = f"cuda:{index} {facts.name}, {facts.total_memory / 2**30:.0f} GiB"
        try:
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            right = bool(((ones @ ones) == 64).all())
        except RuntimeError as error:
            found.append(Finding("FAIL", "devices", f"{name}: {str(error).splitlines()[0]}"))
            continue
        found.append(Finding("ok" if right else "FAIL", "devices", name if right else f"{name}: a product is wrong"))
    return found


def kernel_findings() -> list[Finding]:
    """Whether ranking and merging run in Triton, and why not."""
    if os.environ.get(kernels.SWITCH, "").lower() in ("off", "0"):
        return [Finding("note", "kernels", f"turned off by {kernels.SWITCH}; PyTorch ranks and merges")]
    if not torch.cuda.is_available():
        return [Finding("ok", "kernels", "PyTorch's, as on every CPU")]
    found = []
    for index in range(torch.cuda.device_count()):
        reason = kernels.obstacle(index)
        text = f"cuda:{index}: {f'PyTorch, same results but slower: {reason}' if reason else 'Triton'}"
        found.append(Finding("note" if reason else "ok", "kernels", text))
    return found


def disk(folders: Mapping[str, Path]) -> list[Finding]:
    """Free space where things are written, and whether they can be.

    Args:
        folders: by what they are for; one that does not exist stands for its nearest parent.
    """
    found = []
    for purpose, folder in folders.items():
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        text = f"{purpose}: {free / 2**30:.0f} GiB free in {folder}"
        if not os.access(place, os.W_OK):
            found.append(
                Finding("FAIL", "disk", f"{purpose}: {place} cannot be written; change its owner or the place")
            )
        else:
            found.append(Finding("ok" if free >= LEAST_FREE else "note", "disk", text))
    return found


def self_test(package: str, checks: Mapping[str, Callable[[], str]], libraries: Iterable[str]) -> list[Finding]:
    """The arithmetic, by ``duet.selftest``; what it finds replaces a verdict that was kept."""
    results = selftest.run(checks)
    selftest.remember(package, results, libraries)
    found = []
    for one in results:
        number = ", ".join(f"{name} {tested.installed(name)}" for name in libraries if tested.installed(name))
        text = one.name if one.ok else f"not so: {one.name}: {one.detail} ({number}); {tested.remedy(libraries)}"
        found.append(Finding("ok" if one.ok else "FAIL", "self-test", text))
    return found


def hub_folder() -> Path:
    """Where weights from the hub are kept."""
    return Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())


def library_findings() -> Iterable[Finding]:
    """What the library needs."""
    yield from versions(("torch", "transformers", "accelerate"), needed=("torch", "transformers"))
    yield from devices()
    yield from kernel_findings()
    yield from disk({"weights": hub_folder(), "temporary files": Path(tempfile.gettempdir())})
    yield from self_test("duet", selftest.CHECKS, ("torch", "transformers"))


def report(findings: Iterable[Finding]) -> int:
    """Print findings as they come, and the sum; returns the exit status."""
    failures = 0
    for finding in findings:
        print(finding, flush=True)
        failures += finding.level == "FAIL"
    print(f"doctor: {failures} failed" if failures else "doctor: all green")
    return int(failures > 0)


def parse(argv: Sequence[str] | None, program: str) -> None:
    """Take no arguments, and say so with --help."""
    argparse.ArgumentParser(prog=program, description=(__doc__ or "").strip()).parse_args(argv)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Run the library's checks; returns the exit status."""
    parse(argv, "python -m duet.doctor")
    return report(library_findings())


if __name__ == "__main__":
    raise SystemExit(main())
