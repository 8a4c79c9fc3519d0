"""Answer MMBench's table: LLaVA's entry point with LLaVA's flags.

python -m llava.eval.model_vqa_mmbench --model-path MODEL --question-file mmbench_dev_20230712.tsv \\
    --answers-file A.jsonl --single-pred-prompt --temperature 0 --conv-mode vicuna_v1

Needs pandas. With --all-rounds every question is asked once for each rotation of its options ("circular").
"""

from __future__ import annotations

import argparse
import base64
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from duet.errors import main_guard
from llava.eval import vqa
from llava.eval.run_llava import with_defaults
from llava.eval.tasks.base import LETTER_ANSWER, BadEvalData
from llava.eval.vqa import get_chunk, split_list
from llava.pictures import read_picture

__all__ = [
    "all_options",
    "eval_model",
    "get_chunk",
    "get_options",
    "is_none",
    "main",
    "make_parser",
    "read_table",
    "split_list",
]

MAX_NEW_TOKENS = 1024
all_options = ["A", "B", "C", "D"]
ASK_FOR_LETTER = {"en": LETTER_ANSWER, "cn": "\n请直接回答选项字母。"}
_COLUMNS = ("index", "question", "hint", "image", "A", "B")
_REFERENCE = 20
"""A picture's field that is shorter than this is the index of the row that has the picture."""


def is_none(value: Any) -> bool:
    """Is this how a table says that there is nothing?"""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.lower() in ("nan", "none"))


def get_options(row: Mapping[str, Any], options: Sequence[str]) -> list[Any]:
    """A row's options up to the first one that it has not.

    Args:
        row: fields by name.
        options: the names, such as ABCD.
    """
    found = []
    for option in options:
        value = row.get(option)
        if is_none(value):
            break
        found.append(value)
    return found


class TablePictures:
    """Pictures in a table's `image` column, by their row's index.

    Args:
        rows: the table.
        where: its name, for messages.
    """

    folder = Path()

    def __init__(self, rows: Sequence[Mapping[str, Any]], where: str) -> None:
        self._where = where
        self._encoded = {str(row["index"]): str(row["image"]) for row in rows}

    def find(self, rows: Sequence[vqa.VqaRow]) -> list[tuple[Path, ...]]:
        """A name for the picture of every row, for `open`."""
        return [(Path(str(row.image)),) for row in rows]

    def open(self, path: Path, orientation: str = "exif") -> list[Image.Image]:
        """Decode the picture of a row as RGB; see `llava.pictures.read_picture`.

        Raises:
            BadEvalData: there is none, or it is damaged.
        """
        text = self._encoded.get(path.name, "nan")
        if len(text) < _REFERENCE and not is_none(text):
            text = self._encoded.get(text.removesuffix(".0"), "nan")
        if is_none(text):
            raise BadEvalData(f"{self._where}: the row with index {path.name} has no picture; get the file again")
        try:
            return [read_picture(base64.b64decode(text), orientation)]
        except ValueError as error:
            raise BadEvalData(f"{self._where}: the picture of index {path.name} cannot be read: {error}") from error


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read MMBench's tab-separated table, one dict a row.

    Raises:
        BadEvalData: it cannot be read, or lacks a column.
        ImportError: pandas is not installed.
    """
    import pandas

    try:
        table: Any = pandas.read_table(path, dtype=dict.fromkeys(("question", "hint", "image", *all_options), str))
    except (OSError, ValueError) as error:
        raise BadEvalData(f"{path} cannot be read as a tab-separated table: {error}") from error
    lacking = [name for name in _COLUMNS if name not in table.columns]
    if lacking:
        raise BadEvalData(f"{path} lacks the columns {', '.join(lacking)}; get MMBench's published file")
    return table.to_dict("records")


def ask_rounds(row: Mapping[str, Any], all_rounds: bool, suffix: str) -> Iterator[vqa.VqaRow]:
    """The questions that one row of the table asks: one, or one for each rotation of its options."""
    options, letters = get_options(row, all_options), all_options
    letters = all_options[: len(options)]
    for turn in range(len(options) if all_rounds else 1):
        turned = options[turn:] + options[:turn]
        hint = [] if is_none(row["hint"]) else [str(row["hint"])]
        lines = [*hint, str(row["question"]), *(f"{a}. {b}" for a, b in zip(letters, turned, strict=True))]
        prompt = "\n".join(lines)
        extra = {"round_id": turn, "options": turned, "option_char": letters[turn:] + letters[:turn]}
        yield vqa.VqaRow(row["index"], prompt + suffix, prompt, str(row["index"]), extra)


def make_parser() -> argparse.ArgumentParser:
    """LLaVA's flags with LLaVA's defaults, and ours."""
    parser = vqa.make_parser(
        "python -m llava.eval.model_vqa_mmbench", "Answer MMBench.", "tables/question.jsonl", "llava_v1"
    )
    parser.add_argument("--all-rounds", action="store_true", help="ask with every rotation of the options")
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for the letter only")
    parser.add_argument("--lang", default="en", help="en or cn: language in which the letter is asked for")
    return parser


def eval_model(args: Any) -> None:
    """Answer MMBench's table.

    Args:
        args: LLaVA's flags as attributes; those that are missing get their defaults.

    Raises:
        BadEvalData: the table is missing or wrong.
        ValueError: a wrong request.
        ImportError: pandas is not installed.
    """
    args = with_defaults(make_parser(), args)
    path = Path(os.path.expanduser(args.question_file))
    table = read_table(path)
    suffix = ASK_FOR_LETTER["cn" if args.lang == "cn" else "en"] if args.single_pred_prompt else ""

    def read(_: Path) -> list[vqa.VqaRow]:
        # LLaVA cuts the table into chunks, not the questions: all rounds of a row stay together.
        part = get_chunk(table, args.num_chunks, args.chunk_idx)
        return [question for row in part for question in ask_rounds(row, args.all_rounds, suffix)]

    whole = argparse.Namespace(**(vars(args) | {"num_chunks": 1, "chunk_idx": 0}))
    vqa.run(whole, read, MAX_NEW_TOKENS, TablePictures(table, str(path)))


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return vqa.exit_status(functools.partial(eval_model, make_parser().parse_args(argv)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
