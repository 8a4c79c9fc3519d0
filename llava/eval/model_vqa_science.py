"""Answer ScienceQA's question file: LLaVA's entry point with LLaVA's flags.

python -m llava.eval.model_vqa_science --model-path MODEL --question-file llava_test_CQM-A.json --image-folder DIR \\
    --answers-file A.jsonl --single-pred-prompt --temperature 0 --conv-mode vicuna_v1
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any

from PIL import Image

from duet.errors import main_guard
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval import vqa
from llava.eval.files import as_row, read_json
from llava.eval.run_llava import with_defaults
from llava.eval.tasks.base import LETTER_ANSWER, BadEvalData
from llava.eval.tasks.scienceqa import ScienceQa
from llava.eval.vqa import get_chunk, split_list

__all__ = ["eval_model", "get_chunk", "main", "make_parser", "open_picture", "read_questions", "split_list"]

MAX_NEW_TOKENS = 1024


def read_questions(path: Path, single_pred_prompt: bool) -> list[vqa.VqaRow]:
    """Read an array of `{id, image?, conversations}`; the first turn is asked.

    Args:
        path: the file.
        single_pred_prompt: ask for the letter only.

    Raises:
        BadEvalData: a record is wrong; names it.
    """
    rows = []
    for number, record in enumerate(read_json(path, list)):
        row = as_row(record, f"{path}, record {number}")
        turns = row.get("conversations", list)
        if not turns or not isinstance(turns[0], dict) or not isinstance(turns[0].get("value"), str):
            raise BadEvalData(f"{row.where}: 'conversations' must begin with a turn that has a 'value'")
        text = turns[0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        text += LETTER_ANSWER if single_pred_prompt else ""
        image = row.get("image", str) if "image" in row.data else None
        prompt = f"{DEFAULT_IMAGE_TOKEN}\n{text}" if image else text
        rows.append(vqa.VqaRow(row.get("id", str, int), text, prompt, image))
    return rows


def open_picture(path: Path, orientation: str = "exif") -> list[Image.Image]:
    """A picture in the mode of its file, as LLaVA gives ScienceQA's to the model."""
    task = ScienceQa()
    task.orientation = orientation
    return [task.open_visual(path)]


def make_parser() -> argparse.ArgumentParser:
    """LLaVA's flags with LLaVA's defaults, and ours."""
    parser = vqa.make_parser(
        "python -m llava.eval.model_vqa_science", "Answer ScienceQA.", "tables/question.json", "llava_v0"
    )
    parser.add_argument("--answer-prompter", action="store_true", help="accepted for old scripts; without effect")
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for the letter only")
    return parser


def eval_model(args: Any) -> None:
    """Answer ScienceQA's question file.

    Args:
        args: LLaVA's flags as attributes; those that are missing get their defaults.

    Raises:
        BadEvalData: the question file or a picture is missing or wrong.
        ValueError: a wrong request.
    """
    args = with_defaults(make_parser(), args)
    read = functools.partial(read_questions, single_pred_prompt=args.single_pred_prompt)
    pictures = vqa.FolderPictures(Path(os.path.expanduser(args.image_folder)), open_picture)
    vqa.run(args, read, MAX_NEW_TOKENS, pictures)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return vqa.exit_status(functools.partial(eval_model, make_parser().parse_args(argv)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
