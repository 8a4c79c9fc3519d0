"""ScienceQA with GPT-4's answers where they can be read and the model's elsewhere: LLaVA's entry point.

python -m llava.eval.eval_science_qa_gpt4 --base-dir scienceqa --gpt4-result gpt4.json --our-result answers.jsonl
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet.errors import main_guard
from llava.eval.eval_science_qa import convert_caps
from llava.eval.files import Row, read_json, read_json_lines
from llava.eval.tasks.base import BadEvalData
from llava.eval.tasks.scienceqa import FAILED, OPTIONS, choice_index, read_problems, sentence_choice

__all__ = ["convert_caps", "get_args", "get_pred_idx", "main"]

_GUESSES = random.Random(0)


def get_pred_idx(prediction: str, choices: Sequence[str], options: Sequence[str]) -> int:
    """The place of a letter among a problem's choices; a guess where it is none of them, the same in every run."""
    index = choice_index(prediction, len(choices), options)
    return index if index >= 0 else _GUESSES.randrange(len(choices))


@dataclass(frozen=True)
class Chosen:
    """What an answer chooses: its text, the letter in it or "FAILED", and the place of that letter or a guess."""

    text: str
    letter: str
    index: int

    @classmethod
    def read(cls, text: str, problem: Mapping[str, Any], options: Sequence[str]) -> Chosen:
        """Read an answer to a problem."""
        letter = sentence_choice(text)
        return cls(text, letter, get_pred_idx(letter, problem["choices"], options))


def read_own(path: str) -> dict[str, Row]:
    """An answers file by question id.

    Raises:
        BadEvalData: it is malformed.
    """
    return {str(row.get("question_id", str, int)): row for row in read_json_lines(Path(path))}


def read_gpt4(path: str) -> dict[str, str]:
    """GPT-4's answers by question id: `outputs` of a result file.

    Raises:
        BadEvalData: it is malformed.
    """
    return Row(read_json(Path(path), dict), path).get("outputs", dict)


def share(count: int, total: int) -> str:
    """A part in percent, as LLaVA's scripts print it."""
    return f"{count / total * 100:.2f}%"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that both of LLaVA's scripts have."""
    parser.add_argument("--base-dir", required=True, help="folder with problems.json and pid_splits.json")
    parser.add_argument("--gpt4-result", required=True, help="JSON with GPT-4's answers under outputs")
    parser.add_argument("--our-result", required=True, help="the model's answers, one JSON object per line")
    parser.add_argument("--split", default="test", help="split of pid_splits.json")
    parser.add_argument("--options", type=list, default=list(OPTIONS), help="letters of the options, such as ABCDE")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_science_qa_gpt4", description="ScienceQA with GPT-4's answers."
    )
    add_arguments(parser)
    return parser.parse_args(argv)


def summarize(args: argparse.Namespace) -> list[str]:
    """LLaVA's three lines, over the problems that both have answered.

    Raises:
        BadEvalData: a file is malformed, or they share no problem.
    """
    problems = read_problems(Path(args.base_dir), args.split)
    own, gpt4 = read_own(args.our_result), read_gpt4(args.gpt4_result)
    correct = upper = failed = total = 0
    for key, problem in problems.items():
        if key not in own or key not in gpt4:
            continue
        ours = Chosen.read(own[key].get("text", str), problem, args.options)
        theirs = Chosen.read(gpt4[key], problem, args.options)
        final = ours.index if theirs.letter == FAILED else theirs.index
        total += 1
        failed += theirs.letter == FAILED
        correct += final == problem["answer"]
        upper += problem["answer"] in (final, ours.index)
    if not total:
        raise BadEvalData(f"{args.our_result} and {args.gpt4_result} share no problem of the split {args.split!r}")
    return [
        f"Total: {total}, Correct: {correct}, Accuracy: {share(correct, total)}",
        f"Total: {total}, Correct (upper): {upper}, Accuracy: {share(upper, total)}",
        f"Total: {total}, GPT-4 NO-ANS (RANDOM): {failed}, Percentage: {share(failed, total)}",
    ]


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 for bad input."""
    args = get_args(argv)
    print("\n".join(summarize(args)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
