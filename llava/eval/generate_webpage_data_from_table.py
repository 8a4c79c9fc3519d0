"""Join questions, answers and reviews into the data file of LLaVA's comparison page: LLaVA's entry point.

python -m llava.eval.generate_webpage_data_from_table --questions table/question.jsonl \\
    --answers vicuna=table/answer/answer_vicuna-13b.jsonl --ours table/results/ours.jsonl \\
    --reviews vicuna=table/review/review_vicuna-13b_ours.jsonl --output webpage/data.json

The page is LLaVA's; it is not part of this package.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duet.errors import main_guard
from llava.eval.answers import write_json
from llava.eval.files import as_row, read_json_lines
from llava.eval.tasks.base import BadEvalData

models = ["vicuna"]
"""The model that LLaVA's page compares with."""

_FIGURES = re.compile(r"\d+[, ]+\d+")


def read_jsonl(path: str, key: str | None = None) -> Any:
    """Read a file with one object a line.

    Args:
        path: the file.
        key: a field by whose value the rows are wanted.

    Returns:
        The rows, or with a key a dict of them in the order of its values.

    Raises:
        BadEvalData: the file is malformed, or a row lacks the key.
    """
    rows = read_json_lines(Path(path).expanduser())
    if key is None:
        return [row.data for row in rows]
    return {row.data[key]: row.data for row in sorted(rows, key=lambda row: row.get(key, int, str))}


def trim_hanging_lines(s: str, n: int) -> str:
    """The text without its first `n` lines, and without white space around the rest."""
    s = s.strip()
    for _ in range(n):
        s = s.partition("\n")[2].strip()
    return s


def clean_review(text: str) -> str:
    """A review without its line of figures, with the assistants' names in bold."""
    text = text.strip()
    first, _, rest = text.partition("\n")
    text = rest if _FIGURES.match(first) else text
    for name in ("Assistant 1", "Assistant 2"):
        text = text.replace(name, f"**{name}**")
    return text


def join(
    questions: Mapping[Any, dict], answers: Mapping[str, Mapping[Any, dict]], reviews: Mapping[str, Mapping[Any, dict]]
) -> list[dict[str, Any]]:
    """The page's records, one a question.

    Args:
        questions: by question_id.
        answers: by model and question_id.
        reviews: the same.

    Raises:
        BadEvalData: an answer or a review is missing.
    """

    def field_of(kind: str, table: Mapping[str, Mapping[Any, dict]], name: str, key: Any) -> dict[str, Any]:
        absent = [model for model, rows in table.items() if key not in rows]
        if absent:
            raise BadEvalData(f"question {key} has no {kind} of {', '.join(absent)}")
        return {m: as_row(rows[key], f"{kind} of {m}, question {key}").data.get(name, "") for m, rows in table.items()}

    return [
        {
            "id": key,
            "category": question.get("category", ""),
            "question": question.get("text", ""),
            "answers": field_of("answer", answers, "text", key),
            "evaluations": {
                name: clean_review(text) for name, text in field_of("review", reviews, "content", key).items()
            },
            "scores": field_of("review", reviews, "tuple", key),
        }
        for key, question in questions.items()
    ]


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text!r}")
    return name, path


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.generate_webpage_data_from_table", description="Data of LLaVA's comparison page."
    )
    parser.add_argument("--questions", default="table/question.jsonl")
    parser.add_argument(
        "--answers", nargs="+", type=_named, metavar="NAME=FILE",
        default=[("vicuna", "table/answer/answer_vicuna-13b.jsonl")], help="answers of the models compared with",
    )  # fmt: skip
    parser.add_argument("--ours", default="table/results/llama-13b-hf-alpaca.jsonl", help="own answers")
    parser.add_argument(
        "--reviews", nargs="+", type=_named, metavar="NAME=FILE",
        default=[("vicuna", "table/review/review_vicuna-13b_llama-13b-hf-alpaca.jsonl")],
        help="reviews of own answers against each of these models",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("webpage/data.json"))
    args = parser.parse_args(argv)
    key = "question_id"
    answers = {name: read_jsonl(path, key) for name, path in [*args.answers, ("ours", args.ours)]}
    reviews = {name: read_jsonl(path, key) for name, path in args.reviews}
    records = join(read_jsonl(args.questions, key), answers, reviews)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, {"questions": records, "models": [name for name, _ in args.answers]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
