"""Score an answers file on ScienceQA.

python -m llava.eval.eval_science_qa --base-dir playground/data/eval/scienceqa --result-file answers.jsonl \
    --output-file answers_output.jsonl --output-result answers_result.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duet.errors import main_guard
from llava.eval.answers import read_answers
from llava.eval.tasks.base import Answer
from llava.eval.tasks.scienceqa import (
    FAILED,
    OPTIONS,
    choice_index,
    match_answers,
    parse_choice,
    read_problems,
    scienceqa_scores,
)


def analyse(
    problems: Mapping[str, Mapping[str, Any]], found: Mapping[str, Answer], options: Sequence[str]
) -> tuple[dict[str, list], dict[str, Any]]:
    """Build what LLaVA's script writes: the answers sorted into correct and incorrect, and the overall result."""
    sorted_answers: dict[str, list] = {"correct": [], "incorrect": []}
    results, outputs = {}, {}
    for key, problem in problems.items():
        answer = found.get(key, Answer(key, "Unknown", FAILED))
        letter = parse_choice(answer.text, options)
        index = choice_index(letter, len(problem["choices"]), options)
        results[key], outputs[key] = index, answer.text
        sorted_answers["correct" if index == problem["answer"] else "incorrect"].append(
            {
                "question_id": key,
                "parsed_ans": letter,
                "ground_truth": options[problem["answer"]],
                "question": answer.prompt,
                "pred": answer.text,
                "is_multimodal": problem["image"] is not None,
            }
        )
    correct, count = len(sorted_answers["correct"]), len(problems)
    overall = {"acc": correct / count * 100, "correct": correct, "count": count}
    return sorted_answers, {**overall, "results": results, "outputs": outputs}


def summary(result: Mapping[str, Any], scores: Mapping[str, float]) -> str:
    """The line that LLaVA's script prints."""
    line = f"Total: {result['count']}, Correct: {result['correct']}, Accuracy: {scores['accuracy']:.2f}%"
    return f"{line}, IMG-Accuracy: {scores['img_accuracy']:.2f}%" if "img_accuracy" in scores else line


def convert_caps(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an answers file as COCO's captions, `{image_id, caption}`; LLaVA's helper, not used here."""
    return [{"image_id": int(result["question_id"]), "caption": result["text"]} for result in results]


def get_pred_idx(prediction: str, choices: Sequence[str], options: Sequence[str]) -> int:
    """The place of a letter among a problem's choices, or -1; LLaVA's name for `choice_index`."""
    return choice_index(prediction, len(choices), options)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_science_qa", description="Score answers on ScienceQA."
    )
    parser.add_argument("--base-dir", required=True, help="folder with problems.json and pid_splits.json")
    parser.add_argument("--result-file", required=True, help="answers, one JSON object per line")
    parser.add_argument("--output-file", help="where to write the answers, sorted into correct and incorrect")
    parser.add_argument("--output-result", help="where to write accuracy, chosen indices and answers")
    parser.add_argument("--split", default="test", help="split of pid_splits.json")
    parser.add_argument("--options", type=list, default=list(OPTIONS), help="letters of the options, such as ABCDE")
    return parser.parse_args(argv)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for bad input, or 2 when questions have no answer."""
    args = get_args(argv)
    problems = read_problems(Path(args.base_dir), args.split)
    if max(len(problem["choices"]) for problem in problems.values()) > len(args.options):
        raise ValueError(f"--options {''.join(args.options)} has fewer letters than a problem has choices")
    found, missing = match_answers(problems, read_answers(Path(args.result_file)))
    scores = scienceqa_scores({key: answer.text for key, answer in found.items()}, problems, args.options)
    sorted_answers, result = analyse(problems, found, args.options)
    print(summary(result, scores))
    for path, content in ((args.output_file, sorted_answers), (args.output_result, result)):
        if path:
            Path(path).write_text(json.dumps(content, indent=2), encoding="utf-8")
    if missing:
        first = ", ".join(missing[:5])
        print(f"error: {len(missing)} questions have no answer and count as wrong: {first}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
