"""Files that benchmark servers take: made from answers files, for the scripts that LLaVA has under `scripts/`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava.eval.files import Row, read_json_lines
from llava.eval.m4c_evaluator import normalise
from llava.eval.tasks.base import BadEvalData

_MMBENCH_HIDDEN = ("hint", "category", "source", "image", "comment", "l2-category")
_MMBENCH_PLACE = 6
"""Which column of the table holds the predictions, from 0."""


def read_texts(path: Path) -> dict[str | int, str]:
    """Answers by question_id; of two answers to one question the last counts, as in LLaVA.

    Raises:
        BadEvalData: the file is malformed.
    """
    return {row.get("question_id", str, int): row.get("text", str) for row in read_json_lines(path)}


def read_split(path: Path) -> list[Row]:
    """The questions of a split, in the server's order.

    Raises:
        BadEvalData: the file is malformed or empty.
    """
    rows = read_json_lines(path)
    if not rows:
        raise BadEvalData(f"{path} holds no questions; get it from LLaVA's eval.zip")
    return rows


def refuse_missing(missing: Iterable[Any], path: Path, advice: str) -> None:
    """Refuse answers that are incomplete.

    Raises:
        BadEvalData: some are missing; names the first.
    """
    keys = [str(key) for key in missing]
    if keys:
        raise BadEvalData(f"{path}: {len(keys)} questions have no answer, first: {', '.join(keys[:5])}; {advice}")


def vqav2_rows(split: Iterable[Row], texts: dict[str | int, str]) -> tuple[list[dict[str, Any]], list[str | int]]:
    """VQAv2's submission: an answer to every question of the split, in the normal form of VQA; empty where none is.

    LLaVA asks `test-dev` and submits all of `test`, so that most questions may have none.

    Returns:
        The rows, and the question_ids that have no answer.

    Raises:
        BadEvalData: a row of the split is malformed.
    """
    keys = [row.get("question_id", str, int) for row in split]
    rows = [{"question_id": key, "answer": normalise(texts[key]) if key in texts else ""} for key in keys]
    return rows, [key for key in keys if key not in texts]


def vizwiz_rows(split: Iterable[Row], texts: dict[str | int, str], source: Path) -> list[dict[str, Any]]:
    """VizWiz's submission: picture and answer of every question, the answer in the normal form of VQA.

    Raises:
        BadEvalData: a row is malformed, or a question has no answer.
    """
    asked = [(row.get("question_id", str, int), row.get("image", str)) for row in split]
    refuse_missing((key for key, _ in asked if key not in texts), source, "run the same command again to finish it")
    return [{"image": image, "answer": normalise(texts[key])} for key, image in asked]


def mmvet_answers(texts: dict[str | int, str]) -> dict[str, str]:
    """MM-Vet's file: answers by `v1_` and question_id."""
    return {f"v1_{key}": text for key, text in texts.items()}


def mmbench_table(annotation_file: Path, answers_file: Path) -> Any:
    """MMBench's submission as a table: the published columns without pictures, and the predictions.

    With all rounds of a question answered, the last one counts, as in LLaVA.

    Raises:
        BadEvalData: a file cannot be read, or an answer is missing.
        ImportError: pandas is not installed.
    """
    import pandas

    try:
        table: Any = pandas.read_table(annotation_file)
    except (OSError, ValueError) as error:
        raise BadEvalData(f"{annotation_file} cannot be read as a tab-separated table: {error}") from error
    if "index" not in table.columns:
        raise BadEvalData(f"{annotation_file} lacks the column index; get MMBench's published file")
    texts = {str(key): text for key, text in read_texts(answers_file).items()}
    keys = [str(key) for key in table["index"]]
    refuse_missing((key for key in keys if key not in texts), answers_file, "run the same command again to finish it")
    shown = table.drop(columns=[name for name in _MMBENCH_HIDDEN if name in table.columns])
    shown.insert(min(_MMBENCH_PLACE, len(shown.columns)), "prediction", [texts[key] for key in keys])
    return shown


def write_table(table: Any, path: Path) -> None:
    """Write a table as .xlsx; the file is there in whole or not at all.

    Raises:
        ImportError: openpyxl is not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name("part-" + path.name)
    try:
        table.to_excel(part, index=False, engine="openpyxl")
    except ImportError as error:
        raise ImportError(f"{path.name} needs openpyxl: pip install openpyxl") from error
    os.replace(part, path)
