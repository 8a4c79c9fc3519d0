"""The documents' tables of flags, made from the dataclasses: `python tests/structure/flag_tables.py` writes them again.

A table stands between `<!-- flags: MODULE.CLASS -->` and `<!-- flags: end -->` and has every field with a help text.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

from structure_helpers import ROOT

from duet.cells import markdown_cell

BLOCK = re.compile(r"(<!-- flags: ([\w.]+)\.(\w+) -->\n).*?(<!-- flags: end -->)", re.DOTALL)
HEAD = ("| flag | default | meaning |", "|---|---|---|")


def documents() -> list[Path]:
    """Documents that have such a table."""
    return [path for path in sorted((ROOT / "docs").glob("*.md")) if BLOCK.search(path.read_text(encoding="utf-8"))]


def own_fields(kind: Any) -> list[dataclasses.Field]:
    """Fields that a class declares itself, with a help text."""
    declared = [item for item in dataclasses.fields(kind) if item.name in vars(kind).get("__annotations__", {})]
    return [item for item in declared if item.metadata.get("help")]


def default_of(item: dataclasses.Field) -> str:
    """How a default is written on the command line; empty for none."""
    if item.default in (None, dataclasses.MISSING):
        return ""
    return f"`{item.default}`" if item.default != "" else "`''`"


def table(kind: Any) -> str:
    """The table of one class."""
    rows = []
    for item in own_fields(kind):
        names = ", ".join(f"`{flag}`" for flag in (f"--{item.name}", *item.metadata.get("aliases", ())))
        rows.append(f"| {names} | {default_of(item)} | {markdown_cell(item.metadata['help'])} |")
    return "\n".join([*HEAD, *rows]) + "\n"


def renewed(text: str) -> str:
    """A document with its tables made again."""

    def make(match: re.Match[str]) -> str:
        kind = getattr(importlib.import_module(match[2]), match[3])
        return f"{match[1]}\n{table(kind)}\n{match[4]}"

    return BLOCK.sub(make, text)


if __name__ == "__main__":
    for document in documents():
        document.write_text(renewed(document.read_text(encoding="utf-8")), encoding="utf-8")
