"""ScienceQA with GPT-4 as the judge between its answer and the model's: LLaVA's entry point.

python -m llava.eval.eval_science_qa_gpt4_requery --base-dir scienceqa --gpt4-result gpt4.json \\
    --requery-result requery.jsonl --our-result answers.jsonl --output-result result.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from duet.errors import main_guard
from llava.eval.answers import write_json
from llava.eval.eval_science_qa import convert_caps
from llava.eval.eval_science_qa_gpt4 import Chosen, add_arguments, get_pred_idx, read_gpt4, read_own, share
from llava.eval.tasks.base import BadEvalData
from llava.eval.tasks.scienceqa import FAILED, read_problems

__all__ = ["convert_caps", "get_args", "get_pred_idx", "main"]

_MISSING = "MISSING"


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_science_qa_gpt4_requery", description="ScienceQA with GPT-4 as the judge."
    )
    add_arguments(parser)
    parser.add_argument("--requery-result", required=True, help="the judge's answers, one JSON object per line")
    parser.add_argument("--output-result", required=True, help="where to write accuracy and chosen indices")
    return parser.parse_args(argv)


def wrong_one(prompt: str, right: str, ours: Chosen, theirs: Chosen, judged: Chosen) -> str:
    """What is printed about a problem that the judge gets wrong."""
    said = (("Our", ours), ("GPT-4", theirs), ("Requery", judged))
    return "\n".join([f"Question ({right}): {prompt}", *(f"{who} ({a.letter}): {a.text}" for who, a in said), ""])


def evaluate(args: argparse.Namespace) -> tuple[Counter, dict[str, int], list[str]]:
    """Count; returns the counts, the chosen index of every problem, and a text for each one that the judge gets wrong.

    Raises:
        BadEvalData: a file is malformed, or an answer of the model or of GPT-4 is missing.
    """
    problems = read_problems(Path(args.base_dir), args.split)
    own, gpt4, requery = read_own(args.our_result), read_gpt4(args.gpt4_result), read_own(args.requery_result)
    for path, found in ((args.our_result, own), (args.gpt4_result, gpt4)):
        absent = [key for key in problems if key not in found]
        if absent:
            raise BadEvalData(f"{path}: {len(absent)} problems have no answer, first: {', '.join(absent[:5])}")
    counts: Counter = Counter(total=len(problems))
    indices, wrong = {}, []
    for key, problem in problems.items():
        answer = problem["answer"]
        ours = Chosen.read(own[key].get("text", str), problem, args.options)
        theirs = Chosen.read(gpt4[key], problem, args.options)
        judged = Chosen.read(requery[key].get("text", str) if key in requery else _MISSING, problem, args.options)
        final = ours.index if judged.letter == FAILED else judged.index
        indices[key] = final
        counts["our"] += ours.index == answer
        counts["gpt4"] += theirs.index == answer
        counts["gpt4_failed"] += theirs.letter == FAILED
        counts["gpt4_ours"] += (ours if theirs.letter == FAILED else theirs).index == answer
        counts["requery"] += final == answer
        counts["upper"] += answer in (theirs.index, ours.index)
        if judged.letter != FAILED and final != answer:
            prompt = own[key].data.get("prompt", "")
            wrong.append(wrong_one(prompt, args.options[answer], ours, theirs, judged))
    return counts, indices, wrong


def report(counts: Counter) -> list[str]:
    """LLaVA's lines."""
    lines = (
        ("Our-Correct", "our", "Accuracy"),
        ("GPT-4-Correct", "gpt4", "Accuracy"),
        ("GPT-4 NO-ANS (RANDOM)", "gpt4_failed", "Percentage"),
        ("GPT-4-OursVisual-Correct", "gpt4_ours", "Accuracy"),
        ("Requery-Correct", "requery", "Accuracy"),
        ("Correct upper", "upper", "Accuracy"),
    )
    total = counts["total"]
    return [f"Total: {total}, {name}: {counts[key]}, {what}: {share(counts[key], total)}" for name, key, what in lines]


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 for bad input."""
    args = get_args(argv)
    counts, indices, wrong = evaluate(args)
    print("\n".join([*wrong, *report(counts)]))
    figures: dict[str, Any] = {"acc": counts["requery"] / counts["total"] * 100, "correct": counts["requery"]}
    write_json(Path(args.output_result), figures | {"count": counts["total"], "results": indices, "outputs": {}})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
