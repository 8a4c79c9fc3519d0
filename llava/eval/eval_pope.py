"""Score an answers file on POPE.

python -m llava.eval.eval_pope --annotation-dir playground/data/eval/pope/coco \
    --question-file playground/data/eval/pope/llava_pope_test.jsonl --result-file answers.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duet.errors import main_guard
from llava.eval.answers import read_answers
from llava.eval.files import read_json_lines
from llava.eval.tasks.base import BadEvalData
from llava.eval.tasks.pope import PopeCounts, PopeResult, parse_pope, pope_metrics, read_questions, score_answers


def figures(counts: PopeCounts) -> str:
    """The lines that LLaVA's `eval_pope` prints."""
    numbers = (counts.f1, counts.accuracy, counts.precision, counts.recall, counts.yes_ratio)
    return "\n".join(
        (
            "TP\tFP\tTN\tFN\t",
            f"{counts.tp}\t{counts.fp}\t{counts.tn}\t{counts.fn}",
            f"Accuracy: {counts.accuracy}",
            f"Precision: {counts.precision}",
            f"Recall: {counts.recall}",
            f"F1 score: {counts.f1}",
            f"Yes ratio: {counts.yes_ratio}",
            ", ".join(f"{number:.3f}" for number in numbers),
        )
    )


def report(category: str, counts: PopeCounts) -> str:
    """The lines that LLaVA's script prints for one category."""
    return f"Category: {category}, # samples: {counts.total}\n{figures(counts)}\n{'=' * 36}"


def eval_pope(answers: Sequence[dict[str, Any]], label_file: str) -> PopeCounts:
    """Score one category as LLaVA's function does: answers and labels belong together by their places.

    The command line below matches them by picture and question instead, which cannot shift.

    Args:
        answers: rows with a `text`, which becomes "yes" or "no" in place.
        label_file: `coco_pope_<category>.json`.

    Raises:
        BadEvalData: the label file is malformed, or has another number of rows.
    """
    labels = [row.get("label", str) for row in read_json_lines(Path(label_file))]
    if len(labels) != len(answers):
        raise BadEvalData(f"{label_file} has {len(labels)} labels for {len(answers)} answers; they go by their places")
    for answer in answers:
        answer["text"] = parse_pope(answer["text"])
    counts = pope_metrics(zip(labels, (answer["text"] for answer in answers), strict=True))
    print(figures(counts))
    return counts


def evaluate(annotation_dir: str, question_file: str, result_file: str) -> PopeResult:
    """Score a file of answers.

    Raises:
        ValueError: A file is missing or malformed, or the answers belong to other questions.
    """
    questions = read_questions(Path(annotation_dir), Path(question_file), Path())
    return score_answers(questions, read_answers(Path(result_file)))


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for bad input, or 2 when questions have no answer."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.eval_pope", description="Score answers on POPE.")
    parser.add_argument("--annotation-dir", required=True, help="folder with coco_pope_<category>.json")
    parser.add_argument("--question-file", required=True, help="LLaVA's llava_pope_test.jsonl")
    parser.add_argument("--result-file", required=True, help="answers, one JSON object per line")
    args = parser.parse_args(argv)
    result = evaluate(args.annotation_dir, args.question_file, args.result_file)
    for category, counts in result.counts.items():
        print(report(category, counts))
    print(f"Average F1: {100 * result.mean('f1'):.2f}")
    if result.missing:
        first = ", ".join(result.missing[:5])
        print(f"error: {len(result.missing)} questions have no answer and count as wrong: {first}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
