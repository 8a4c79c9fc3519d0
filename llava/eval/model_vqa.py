"""Answer a question file, up to 1024 tokens an answer: LLaVA's entry point with LLaVA's flags.

python -m llava.eval.model_vqa --model-path MODEL --question-file Q.jsonl --image-folder DIR --answers-file A.jsonl \\
    --temperature 0 --conv-mode vicuna_v1
"""

from __future__ import annotations

import argparse
import functools
import os
from typing import Any

from duet.errors import main_guard
from llava.eval import vqa
from llava.eval.run_llava import with_defaults
from llava.eval.vqa import get_chunk, split_list

__all__ = ["eval_model", "get_chunk", "main", "make_parser", "split_list"]

MAX_NEW_TOKENS = 1024


def make_parser() -> argparse.ArgumentParser:
    """LLaVA's flags with LLaVA's defaults, and ours."""
    return vqa.make_parser(
        "python -m llava.eval.model_vqa", "Answer a question file.", "tables/question.jsonl", "llava_v1"
    )


def eval_model(args: Any) -> None:
    """Answer a question file.

    Args:
        args: LLaVA's flags as attributes; those that are missing get their defaults.

    Raises:
        BadEvalData: the question file or a picture is missing or wrong.
        ValueError: a wrong request.
    """
    vqa.run(with_defaults(make_parser(), args), vqa.read_questions, MAX_NEW_TOKENS)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return vqa.exit_status(functools.partial(eval_model, make_parser().parse_args(argv)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
