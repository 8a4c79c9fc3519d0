"""Answers files: LLaVA's JSON lines, appended batch by batch, and repaired after an interruption."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from llava.eval.files import parse_json_lines, read_json_lines
from llava.eval.tasks.base import Answer, BadEvalData


def read_answers(path: Path) -> list[Answer]:
    """Read an answers file, ours or one that LLaVA's scripts wrote.

    Raises:
        BadEvalData: a line is no JSON object, lacks a field, or repeats a key; names file, line and field.
    """
    answers = [
        Answer(row.get("question_id", str, int), row.get("prompt", str), row.get("text", str), row.data.get("key", ""))
        for row in read_json_lines(path)
    ]
    refuse_repeated([answer.key for answer in answers if answer.key], path)
    return answers


def refuse_repeated(keys: Iterable[str], where: Any) -> None:
    """Check that no key occurs twice.

    Raises:
        BadEvalData: naming the first ones that do.
    """
    seen: set[str] = set()
    twice = []
    for key in keys:
        if key in seen:
            twice.append(key)
        seen.add(key)
    if twice:
        raise BadEvalData(
            f"{where}: {len(twice)} questions have two answers, first: {', '.join(twice[:5])}; two runs wrote here at "
            "the same time. Remove the file and run again"
        )


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines; the file is there in whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text("".join(_line(row) for row in rows), encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; it is there in whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def cut_torn_line(path: Path) -> None:
    """Cut off a last line that a killed process did not finish.

    Raises:
        BadEvalData: a process is writing to the file.
    """
    with open(path, "rb+") as file:
        _lock(file, path)
        _whole_lines(file)


def _whole_lines(file: IO[bytes]) -> bytes:
    """Cut off an unfinished last line of a locked file; returns what is left."""
    file.seek(0)
    data = file.read()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        file.truncate(end)
    return data[:end]


def _lock(file: IO, path: Path) -> None:
    """Keep other processes out until the file is closed.

    A lock of this process alone: a killed run leaves none behind in the workers that outlive it for some seconds.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise BadEvalData(f"{path}: another process is writing to it; wait for it, or end it first") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an answers file as they are; an absent file has none.

    Raises:
        BadEvalData: a line is no JSON object.
    """
    return [row.data for row in read_json_lines(path)] if path.exists() else []


class AnswersFile:
    """The answers of one process, open for appending; usable in a `with` statement.

    Args:
        path: the file; its folder is made, a torn last line is cut off.

    Attributes:
        rows: the rows that were there, in order.

    Raises:
        BadEvalData: another process writes to it, or what is in it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: Any = open(path, "ab+")  # noqa: SIM115
        _lock(self._file, path)
        # Through the locked file itself: closing another one of this process would give the lock up.
        try:
            self.rows = [row.data for row in parse_json_lines(_whole_lines(self._file).decode("utf-8-sig"), path)]
        except UnicodeDecodeError as error:
            self._file.close()
            raise BadEvalData(f"{path}: not UTF-8 text (byte {error.start}); remove the file") from error
        except BadEvalData:
            self._file.close()
            raise

    def set_aside(self) -> Path:
        """Start anew, and keep the rows that were there in a file beside this one; returns that file."""
        old = next(p for i in itertools.count(1) if not (p := self.path.with_name(f"{self.path.name}.old{i}")).exists())
        write_lines(old, self.rows)
        self._file.truncate(0)
        self.rows = []
        return old

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows, in one write that a reader sees at once."""
        self._file.write("".join(_line(row) for row in rows).encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file and let others write to it."""
        self._file.close()

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
