"""Read annotation files and say precisely what is wrong with a record.

A record is ``{"id": ..., "image": ..., "conversations": [{"from": "human", "value": ...}, ...]}``; ``image`` is a path,
a list of paths, null or absent, and may be spelt ``images``. Models that take videos have ``video`` in the same way.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.jsonl import append_line, read_lines

Record = dict[str, Any]
Turn = dict[str, str]

ROLES = ("human", "gpt")
DEFAULT_VIDEO_TOKEN = "<video>"
UNEXPECTED = "unexpected error"
UNLABELLED = ("empty answer", "no answer", "too long", "no label", "no supervised token", "chat template", UNEXPECTED)
"""Kinds of bad records that have nothing to learn from."""
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Origin(NamedTuple):
    """Where a record was read: the file and its place there, counted from 0."""

    file: str
    index: int


@dataclass(frozen=True)
class BadRecord:
    """One record that cannot be trained on, and why."""

    file: str
    index: int
    id: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, record {self.index} (id {self.id}): {self.reason}"


class BadSampleError(ValueError):
    """A record cannot be turned into a training sample. ``kind`` is a short key for counting."""

    def __init__(self, reason: str, kind: str = "other"):
        super().__init__(reason)
        self.reason = reason
        self.kind = kind

    def at(self, origin: Origin, record: Any) -> BadRecord:
        """Add the place that the record came from."""
        return BadRecord(origin.file, origin.index, record_id(record), self.kind, self.reason)


class BadSampleLog:
    """A JSON-lines file of bad records that data-loader workers and ranks append to."""

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)

    def add(self, bad: BadRecord) -> None:
        """Append one record; one short write, so that several processes do not mix their lines."""
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, asdict(bad))

    def read(self) -> list[BadRecord]:
        """Return every record once, in the order in which they were first met."""
        names = {field.name for field in fields(BadRecord)}
        found = [BadRecord(**row) for row in read_lines(self.path) if set(row) == names]
        return list({(bad.file, bad.index): bad for bad in found}.values())


def as_bad_sample(error: Exception) -> BadSampleError:
    """Turn whatever a record made a library raise into the error of a bad record.

    Raises:
        ImportError: the error itself, where a package is missing; that is no record's fault.
    """
    if isinstance(error, BadSampleError):
        return error
    if isinstance(error, ImportError):
        raise error
    detail = " ".join(str(error).split())[:300]
    return BadSampleError(f"it cannot be turned into a sample ({type(error).__name__}: {detail})", UNEXPECTED)


def record_id(record: Any) -> str:
    """The record's own name, for messages: one line that can be written anywhere."""
    name = record.get("id") if isinstance(record, dict) else None
    text = "missing" if name is None else " ".join(str(name).split())
    return text[:200].encode("utf-8", "backslashreplace").decode("utf-8")


def images_of(record: Record) -> list[str]:
    """The picture names of a record, in order; empty for a text-only record."""
    return _names(record, "image")


def videos_of(record: Record) -> list[str]:
    """The video names of a record, in order."""
    return _names(record, "video")


def _names(record: Record, key: str) -> list[str]:
    """Names under a key or its plural; a table's empty column (null) counts as absent."""
    names = record.get(key)
    names = record.get(f"{key}s") if names is None or names == [] else names
    if names is None:
        return []
    return list(names) if isinstance(names, (list, tuple)) else [names]


def split_system(conversations: Sequence[Turn]) -> tuple[str | None, list[Turn]]:
    """Take the system prompt off the front, and an assistant's turn that no question leads to (as LLaVA does)."""
    turns = list(conversations)
    system = turns.pop(0)["value"] if turns and turns[0]["from"] == "system" else None
    if turns and turns[0]["from"] == "gpt":
        turns.pop(0)
    return system, turns


def check_turns(turns: Sequence[Turn]) -> None:
    """Check the turns that training sees: human and gpt alternate, and every answer says something.

    Raises:
        BadSampleError: Naming the first turn that is wrong, counted from 0.
    """
    for index, turn in enumerate(turns):
        role, expected = turn["from"], ROLES[index % 2]
        if role not in ROLES:
            raise BadSampleError(
                f"turn {index} has the unknown role {role!r}; use human, gpt, or system for the first turn",
                "unknown role",
            )
        if role != expected:
            raise BadSampleError(f"turn {index} is from {role!r}, expected {expected!r}: roles must alternate", "roles")
        if role == "gpt" and not turn["value"].strip():
            raise BadSampleError(
                f"the answer in turn {index} is empty; give it a text or remove the turn", "empty answer"
            )
    if len(turns) < 2:
        raise BadSampleError("there is no question with an answer; a record needs a human and a gpt turn", "no answer")


def check_record(record: Any, multimodal: bool = True, videos: bool = False) -> None:
    """Check everything that can be seen without opening a picture.

    Args:
        record: What the annotation file holds.
        multimodal: False for a run without a vision tower, where ``<image>`` is plain text.
        videos: Whether the model takes videos.

    Raises:
        BadSampleError: With the first thing that is wrong.
    """
    _check_types(record, videos)
    _check_characters(record["conversations"])
    system, turns = split_system(record["conversations"])
    check_turns(turns)
    if multimodal:
        _refuse_marks(system, turns, DEFAULT_IMAGE_TOKEN)
        _check_image_marks(images_of(record), turns)
    if videos:
        _refuse_marks(system, turns, DEFAULT_VIDEO_TOKEN)
        _check_video_marks(videos_of(record), turns)


def _check_types(record: Any, videos: bool) -> None:
    if not isinstance(record, dict):
        raise BadSampleError(f"a record must be a JSON object, this is a {type(record).__name__}", "wrong type")
    if videos_of(record) and not videos:
        raise BadSampleError("the record has a 'video'; videos are not supported, use pictures", "video")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadSampleError(f"'conversations' must be a list with turns, got {_short(turns)}", "wrong type")
    for index, turn in enumerate(turns):
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("from"), str)
            or not isinstance(turn.get("value"), str)
        ):
            raise BadSampleError(
                f"turn {index} must be an object with the texts 'from' and 'value', got {_short(turn)}", "wrong type"
            )
    for key in ("image", "images", "video", "videos"):
        names = record.get(key)
        entries = names if isinstance(names, list) else [names]
        if names is not None and not all(isinstance(name, str) and name for name in entries):
            raise BadSampleError(f"{key!r} must be a path or a list of paths, got {_short(names)}", "wrong type")
    for key in ("image", "video"):
        spelt = [_names({key: record.get(name)}, key) for name in (key, f"{key}s")]
        if all(spelt) and spelt[0] != spelt[1]:
            raise BadSampleError(
                f"{key!r} and '{key}s' name different files: {_short(spelt[0])} and {_short(spelt[1])}; leave one of "
                "the two",
                "wrong type",
            )


def _check_characters(turns: Sequence[Turn]) -> None:
    for index, turn in enumerate(turns):
        try:
            turn["value"].encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadSampleError(
                f"turn {index} holds half a surrogate pair ({error.object[error.start]!r} at character {error.start}), "
                "which is no text; a character was cut in two there",
                "broken text",
            ) from error


def _refuse_marks(system: str | None, turns: Sequence[Turn], mark: str) -> None:
    """Pictures stand in questions: in an answer the mark would be one that nobody shows, or a token to be learned."""
    answers = [(f"the answer in turn {index}", turn["value"]) for index, turn in enumerate(turns) if index % 2]
    for place, text in [("the system turn", system or ""), *answers]:
        if mark in text:
            raise BadSampleError(f"{place} holds {mark}; only questions can have such marks", "mark in an answer")


def control_tokens(tokenizer: Any, written: Sequence[str] = (), always: Sequence[str] = ()) -> re.Pattern[str] | None:
    """A pattern that finds the texts which a tokenizer reads as control tokens of a conversation.

    Those are its named special tokens (such as ``</s>``), and those of its other special tokens that stand in what a
    template writes around turns.

    Args:
        tokenizer: A tokenizer of ``transformers``.
        written: Texts that the template writes.
        always: Further control tokens, such as those that stand for pictures.

    Returns:
        None when it has none. The marks of pictures and videos are not among them.
    """
    named = {getattr(tokenizer, name, None) for name in _NAMED_TOKENS}
    special = {token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special}
    found = named | {token for token in special if any(token in text for text in written)} | set(always)
    texts = sorted(token for token in found - {None, "", DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN} if token)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def refuse_control_tokens(conversations: Sequence[Turn], pattern: re.Pattern[str] | None) -> None:
    """Refuse a text that the tokenizer would read as the end of a turn, or as another control token.

    Raises:
        BadSampleError: Naming the turn and the text.
    """
    for index, turn in enumerate(conversations) if pattern is not None else ():
        found = pattern.search(turn["value"]) if pattern is not None else None
        if found is not None:
            raise BadSampleError(
                f"turn {index} holds the text {found[0]!r} at character {found.start()}, which this model's tokenizer "
                "reads as a control token; write it in another way, or leave the record out",
                "control token",
            )


def _check_image_marks(images: list[str], turns: Sequence[Turn]) -> None:
    """One picture: one turn holds the mark (repeated marks in it count once, as in LLaVA). Several: one mark each."""
    counts = [turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns]
    marks = sum(counts) if len(images) > 1 else sum(count > 0 for count in counts)
    _check_marks("image", DEFAULT_IMAGE_TOKEN, marks, len(images))


def _check_video_marks(videos: list[str], turns: Sequence[Turn]) -> None:
    marks = sum(turn["value"].count(DEFAULT_VIDEO_TOKEN) for turn in turns if turn["from"] == "human")
    _check_marks("video", DEFAULT_VIDEO_TOKEN, marks, len(videos))


def _check_marks(kind: str, mark: str, marks: int, given: int) -> None:
    if marks != given:
        relation = "more" if marks > given else "fewer"
        raise BadSampleError(
            f"{relation} {mark} marks than {kind}s: {marks} for {given}; "
            f"write one mark for each {kind}, in the {kind}s' order",
            f"{relation} marks than {kind}s",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def load_records(data_path: str | os.PathLike | Sequence[str], seed: int = 0) -> tuple[list[Record], list[Origin]]:
    """Read annotation files.

    Args:
        data_path: A file with a JSON array or JSON lines, whatever its name is, a YAML mix, or several of them (a list,
            or one string separated by commas or spaces). A mix is
            ``datasets: [{json_path: ..., sampling_strategy: ...}]`` with the strategy ``all``, ``first:N``, ``end:N``
            or ``random:N``; N may be a share such as ``25%``. A relative ``json_path`` starts from the mix's folder.
        seed: For ``random:N``.

    Returns:
        The records and, for each, where it was read.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file cannot be parsed; the message names file, line, column and record.
    """
    records: list[Record] = []
    origins: list[Origin] = []
    for path in _paths(data_path):
        for record, origin in _read_file(path, seed):
            records.append(record)
            origins.append(origin)
    return records, origins


def _paths(data_path: str | os.PathLike | Sequence[str] | None) -> list[str]:
    if not data_path:
        raise ValueError("no annotation file given; pass --data_path FILE")
    if not isinstance(data_path, (str, os.PathLike)):
        return [str(path) for path in data_path]
    text = os.fspath(data_path)
    return [text] if os.path.exists(text) else text.replace(",", " ").split()


def _read_file(path: str, seed: int) -> list[tuple[Record, Origin]]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"annotation file {path!r} does not exist; check --data_path")
    if path.lower().endswith((".yaml", ".yml")):
        return _read_mix(path, seed)
    records = _parse(path)
    return [(record, Origin(path, index)) for index, record in enumerate(records)]


def _read_text(path: str) -> str:
    try:
        # Some programs begin a file with a byte order mark.
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _parse(path: str) -> list[Any]:
    """Read an array or one record a line: what the file begins with tells which, not its name."""
    text = _read_text(path)
    if text.lstrip()[:1] == "[":
        return _parse_array(path, text)
    lines = _parse_lines(path, text)
    if len(lines) == 1 and not (isinstance(lines[0], dict) and "conversations" in lines[0]):
        raise ValueError(
            f"{path}: expected a JSON array of records or one record a line, found one {type(lines[0]).__name__} "
            "without 'conversations'"
        )
    return lines


def _parse_lines(path: str, text: str) -> list[Any]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        # Files that were put together keep the mark of each in the middle.
        line = line.lstrip("\ufeff")
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                if not records and _is_whole(text):
                    return [json.loads(text)]
                raise _broken(path, error, number, str(len(records))) from error
    return records


def _is_whole(text: str) -> bool:
    """Whether the text is one value that was written over several lines."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _broken(path: str, error: Exception, line: int, record: str) -> ValueError:
    """Name the place of a fault; other faults than of syntax are nesting, and numbers of thousands of digits."""
    if isinstance(error, json.JSONDecodeError):
        return ValueError(f"{path}: broken JSON at line {line}, column {error.colno}, in record {record}: {error.msg}")
    return ValueError(f"{path}: JSON that cannot be read in record {record}: {error}")


def _parse_array(path: str, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 0
        raise _broken(path, error, line, f"{_count_whole(text)} (counted from 0)") from error


def _count_whole(text: str) -> int:
    """How many array elements can be read before the text breaks."""
    decoder, count = json.JSONDecoder(), 0
    position = text.find("[") + 1
    while 0 < position < len(text):
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        try:
            _, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            break
        count += 1
    return count


def _read_mix(path: str, seed: int) -> list[tuple[Record, Origin]]:
    import yaml

    try:
        mix = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: broken YAML: {error}") from error
    parts = mix.get("datasets") if isinstance(mix, dict) else None
    if not isinstance(parts, list):
        raise ValueError(f"{path}: a mix file needs 'datasets', a list of {{json_path, sampling_strategy}}")
    found: list[tuple[Record, Origin]] = []
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("json_path"), str):
            raise ValueError(f"{path}: entry {number} of 'datasets' has no json_path")
        source = os.path.join(os.path.dirname(path), part["json_path"])
        strategy = str(part.get("sampling_strategy", "all"))
        try:
            found += _sample(_read_file(source, seed), strategy, random.Random(f"{seed}/{number}"))
        except ValueError as error:
            raise ValueError(f"{path}, entry {number}: {error}") from error
    return found


def _sample(rows: list[Any], strategy: str, generator: random.Random) -> list[Any]:
    """Keep a part of the rows: ``all``, ``first:N``, ``end:N``, ``random:N``, N a number or a share in percent."""
    if strategy == "all":
        return rows
    kind, _, amount = strategy.partition(":")
    number = amount.removesuffix("%")
    if kind not in ("first", "end", "random") or not number.replace(".", "", 1).isdigit():
        raise ValueError(f"sampling_strategy {strategy!r}: expected all, first:N, end:N or random:N (N may be 25%)")
    count = math.ceil(float(number) * len(rows) / 100) if amount.endswith("%") else int(float(number))
    count = min(count, len(rows))
    if kind == "first":
        return rows[:count]
    if kind == "end":
        return rows[len(rows) - count :]
    return [rows[index] for index in sorted(generator.sample(range(len(rows)), count))]
