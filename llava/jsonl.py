"""JSON lines that are appended while something runs; a line that a kill tore is no obstacle."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def append_line(path: str | os.PathLike, row: Any) -> None:
    """Append one row in one short write, so that several processes do not mix their lines.

    A line that a killed process left without its end is closed first; otherwise the new row would be lost with it.

    Raises:
        OSError: the file cannot be written.
    """
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END) and not _ends_with_newline(file):
            line = "\n" + line
        # A lone surrogate, as broken annotation files have them, is kept as its escape.
        file.write(line.encode("utf-8", errors="backslashreplace"))


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of such a file, in order; an absent file has none.

    Lines that are no JSON object (torn by a kill or a full disk) are left out, with one warning that counts them.

    Raises:
        OSError: the file cannot be read.
    """
    if not os.path.exists(path):
        return []
    rows, torn = [], []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn.append(number)
    if torn:
        logger.warning("%s: %d unfinished lines are left out, the first is line %d", path, len(torn), torn[0])
    return rows
