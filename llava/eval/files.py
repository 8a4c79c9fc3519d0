"""Read the JSON and JSON-lines files of benchmarks, and say precisely what is wrong in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.tasks.base import BadEvalData


@dataclass(frozen=True)
class Row:
    """One record of a file.

    Attributes:
        data: its fields.
        where: the file and the place in it, for messages.
    """

    data: dict[str, Any]
    where: str

    def get(self, name: str, *types: type) -> Any:
        """Return a field that must be there with one of these types.

        Raises:
            BadEvalData: It is absent or of another type; names file, row and field.
        """
        expected = " or ".join(kind.__name__ for kind in types)
        if name not in self.data:
            raise BadEvalData(f"{self.where}: field '{name}' ({expected}) is missing; restore the published file")
        value = self.data[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise BadEvalData(
                f"{self.where}: field '{name}' must be {expected}, got {short(value)}; restore the published file"
            )
        return value


def short(value: Any) -> str:
    """A value for a message, cut to one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def require_inside(path: Path, folder: Path, where: str) -> Path:
    """Return a path that a record named, if it lies below the folder that names start from.

    Symbolic links inside the folder are followed, as anybody who keeps pictures elsewhere makes them.

    Args:
        path: the folder joined with the record's name.
        folder: where names start.
        where: the file and the record, for the message.

    Raises:
        BadEvalData: the name is absolute or climbs out of the folder.
    """
    inside = path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts
    if not inside:
        raise BadEvalData(
            f"{where}: {path} lies outside of the folder {folder}; fix the name, or put the picture into the folder"
        )
    return path


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file whose top level must be a `kind` (dict or list).

    Raises:
        BadEvalData: It is missing, not UTF-8, not JSON, or something else at the top.
    """
    text = _read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadEvalData(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}; get the file again"
        ) from error
    if not isinstance(content, kind):
        raise BadEvalData(f"{path}: expected a JSON {kind.__name__} at the top, found {type(content).__name__}")
    return content


def read_json_lines(path: Path) -> list[Row]:
    """Read a file with one JSON object a line; empty lines are skipped.

    Raises:
        BadEvalData: It is missing, not UTF-8, or a line is no JSON object; names the line, counted from 1.
    """
    return parse_json_lines(_read_text(path), path)


def parse_json_lines(text: str, path: Path) -> list[Row]:
    """The rows of a file's text; see `read_json_lines`.

    Raises:
        BadEvalData: a line is no JSON object; names the line, counted from 1.
    """
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadEvalData(
                f"{path}, line {number}: broken JSON at column {error.colno}: {error.msg}; "
                "the line is cut off or damaged, remove it or get the file again"
            ) from error
        rows.append(as_row(data, f"{path}, line {number}"))
    return rows


def as_row(data: Any, where: str) -> Row:
    """Wrap a JSON object.

    Raises:
        BadEvalData: It is no object.
    """
    if not isinstance(data, dict):
        raise BadEvalData(f"{where}: expected a JSON object, got {short(data)}")
    return Row(data, where)


def _read_text(path: Path) -> str:
    """The text with its line ends made "\\n"; a byte-order mark is dropped."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadEvalData(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadEvalData(f"{path}: not UTF-8 text (byte {error.start}); get the file again") from error
