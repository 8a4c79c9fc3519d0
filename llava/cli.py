"""One command for everything that is no training: `duet SUBCOMMAND ...`, or `python -m llava.cli SUBCOMMAND ...`.

`duet --import FILE.py SUBCOMMAND ...` first runs files (or imports modules) that register methods of your own.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from duet.errors import main_guard

COMMANDS = {
    "eval": ("llava.eval.__main__", "one model on benchmarks"),
    "compare": ("llava.eval.compare", "methods by budgets by benchmarks by seeds"),
    "ablate": ("llava.eval.ablate", "the paper's ablations and figures, by name"),
    "report": ("llava.eval.report", "one table over the runs of a results folder"),
    "bench": ("duet.bench", "speed and memory of prefills and training steps"),
    "convert": ("llava.convert", "checkpoints between layouts"),
    "doctor": ("llava.doctor", "is this installation right? versions, devices, disk, a self-test"),
    "calibrate": ("llava.eval.calibrate", "what FitPrune has to measure on a model before it runs"),
}


def usage() -> str:
    """What there is."""
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: duet [--import FILE_OR_MODULE] SUBCOMMAND ... (--help after it for its flags)", *lines])


def load_methods(source: str) -> None:
    """Run a file, or import a module, that registers methods.

    Raises:
        ValueError: there is no such file or module, or another module has the file's name.
    """
    path = Path(source).resolve()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise ValueError(f"--import {source}: no such file")
    name = path.stem if is_file else source
    if is_file and str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.split(".")[0]):
            raise
        raise ValueError(f"--import {source}: no such module; name a module, or a file that ends in .py") from error
    if is_file and getattr(module, "__file__", None) != str(path):
        raise ValueError(f"--import {source}: there is another module {name!r} already; rename the file")


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rest = list(sys.argv[1:] if argv is None else argv)
    while rest[:1] == ["--import"]:
        if len(rest) < 2:
            raise ValueError("--import needs a file or a module")
        load_methods(rest[1])
        rest = rest[2:]
    if rest[:1] in (["--help"], ["-h"]):
        print(usage())
        return 0
    if not rest or rest[0] not in COMMANDS:
        said = f"unknown subcommand {rest[0]!r}" if rest else "no subcommand"
        print(f"error: {said}\n{usage()}", file=sys.stderr)
        return 1
    return importlib.import_module(COMMANDS[rest[0]][0]).main(rest[1:])


if __name__ == "__main__":
    raise SystemExit(main())
