"""Answer Q-Bench's questions about how good pictures look: the module that LLaVA's `qbench.sh` and `qbench_zh.sh` call.

python -m llava.eval.model_vqa_qbench --model-path MODEL --questions-file llvisionqa_dev.json --image-folder DIR \\
    --answers-file A.jsonl --conv-mode llava_v1 --lang en

Every line of the answers file is a record of the question file with the answer as its `response`. Pictures are prepared
as the model's config says, and decoding is greedy.
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any

from duet.errors import main_guard
from llava.eval import vqa
from llava.eval.files import as_row, read_json
from llava.eval.run_llava import load_image, with_defaults

__all__ = ["eval_model", "load_image", "main", "make_parser", "read_questions"]

MAX_NEW_TOKENS = 1024
CHOOSE = {"en": "Choose between one of the options as follows:", "zh": "在下列选项中选择一个:"}
_LETTERS = "ABCD"


def read_questions(path: Path, lang: str) -> list[vqa.VqaRow]:
    """Read an array of `{img_path, question, candidates, ...}`.

    Args:
        path: the file.
        lang: en or zh.

    Raises:
        BadEvalData: a record is wrong; names it.
    """
    rows = []
    for number, record in enumerate(read_json(path, list)):
        row = as_row(record, f"{path}, record {number}")
        options = row.get("candidates", list)
        lines = [row.get("question", str), CHOOSE[lang]]
        lines += [f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False)]
        text = "".join(f"{line}\n" for line in lines)
        rows.append(vqa.VqaRow(number, text, text, row.get("img_path", str), row.data, "response"))
    return rows


def make_parser() -> argparse.ArgumentParser:
    """The flags of LLaVA's script, and ours."""
    parser = vqa.make_parser("python -m llava.eval.model_vqa_qbench", "Answer Q-Bench.", "", "llava_v1")
    parser.set_defaults(
        image_folder="./playground/data/qbench/images_llvisionqa",
        question_file="./playground/data/qbench/llvisionqa_dev.json",
        temperature=0.0,
    )
    parser.add_argument("--questions-file", dest="question_file", help="llvisionqa_dev.json or another of its kind")
    parser.add_argument("--lang", choices=tuple(CHOOSE), default="en", help="language of the question file")
    return parser


def eval_model(args: Any) -> None:
    """Answer Q-Bench's question file.

    Args:
        args: the flags as attributes (`questions_file` or `question_file`); those that are missing get their defaults.

    Raises:
        BadEvalData: the question file or a picture is missing or wrong.
        ValueError: a wrong request.
    """
    given = argparse.Namespace(**vars(args))
    if hasattr(given, "questions_file"):
        given.question_file = given.questions_file
    args = with_defaults(make_parser(), given)
    vqa.run(args, functools.partial(read_questions, lang=args.lang), MAX_NEW_TOKENS)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return vqa.exit_status(functools.partial(eval_model, make_parser().parse_args(argv)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
