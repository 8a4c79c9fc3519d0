"""Score answers files on TextVQA.

python -m llava.eval.eval_textvqa --annotation-file playground/data/eval/textvqa/TextVQA_0.5.1_val.json \
    --result-file answers.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from duet.errors import main_guard
from llava.eval.answers import read_answers
from llava.eval.tasks.base import BadEvalData
from llava.eval.tasks.textvqa import (
    ground_truth,
    match_answers,
    question_of_prompt,
    read_annotations,
    textvqa_scores,
)


def prompt_processor(prompt: str) -> str:
    """See `question_of_prompt`; LLaVA's name for it."""
    return question_of_prompt(prompt)


def eval_single(annotation_file: str | Path, result_file: str | Path) -> list[str]:
    """Score one answers file and print LLaVA's two lines: the mean is over the rows of the file.

    Args:
        annotation_file: TextVQA_0.5.1_val.json.
        result_file: Answers, one JSON object per line.

    Returns:
        question_ids without an answer.

    Raises:
        BadEvalData: A file is empty or malformed, or the answers belong to other questions.
    """
    annotations, result_file = read_annotations(Path(annotation_file)), Path(result_file)
    print(result_file.stem)
    found, missing = match_answers(annotations, read_answers(result_file))
    scores = textvqa_scores({key: answer.text for key, answer in found.items()}, ground_truth(annotations))
    if not scores:
        raise BadEvalData(f"{result_file} has no answers")
    print(f"Samples: {len(scores)}\nAccuracy: {100 * sum(scores.values()) / len(scores):.2f}%\n")
    return missing


def result_files(result_file: str | None, result_dir: str | None) -> list[Path]:
    """The answers files to score.

    Raises:
        ValueError: There are none.
    """
    files = [Path(result_file)] if result_file else []
    files += sorted(Path(result_dir).glob("*.jsonl")) if result_dir else []
    if not files:
        where = f"{result_dir} has no .jsonl files" if result_dir else "pass --result-file or --result-dir"
        raise ValueError(f"no answers to score: {where}")
    return files


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.eval_textvqa", description="Score answers on TextVQA.")
    parser.add_argument("--annotation-file", required=True, help="TextVQA_0.5.1_val.json")
    parser.add_argument("--result-file", help="answers, one JSON object per line")
    parser.add_argument("--result-dir", help="folder whose .jsonl files are all scored")
    return parser.parse_args(argv)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for bad input, or 2 when questions have no answer."""
    args = get_args(argv)
    incomplete = False
    for path in result_files(args.result_file, args.result_dir):
        missing = eval_single(args.annotation_file, path)
        if missing:
            incomplete = True
            first = ", ".join(missing[:5])
            print(
                f"error: {path}: {len(missing)} questions have no answer and are not in the mean, first "
                f"question_id: {first}",
                file=sys.stderr,
            )
    return 2 if incomplete else 0


if __name__ == "__main__":
    raise SystemExit(main())
