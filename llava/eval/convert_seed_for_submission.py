"""Score an answers file on SEED-Bench and write the file for its leaderboard.

python -m llava.eval.convert_seed_for_submission --annotation-file SEED-Bench.json --result-file answers.jsonl \
    --result-upload-file upload.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from duet.errors import main_guard
from llava.eval.answers import read_answers
from llava.eval.tasks.seed import Problem, SeedResult, read_problems, score_answers

_TITLES = {"total": "Total", "image": "image", "video": "video"}


def report(metrics: Mapping[str, float]) -> str:
    """The lines that LLaVA's script prints: every type, then the total, image and video."""
    kinds = [f"{name}: {value:.2f}%" for name, value in metrics.items() if name not in _TITLES]
    parts = [f"{title} accuracy: {metrics[name]:.2f}%" for name, title in _TITLES.items() if name in metrics]
    return "\n".join(kinds + parts)


def write_upload(problems: Mapping[str | int, Problem], result: SeedResult, path: Path) -> None:
    """Write one line for every question that counts, in the annotations' order and with their spelling of ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for key in result.expected:
            row = {"question_id": problems[key].question_id, "prediction": result.texts[key]}
            file.write(json.dumps(row) + "\n")


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for bad input, or 2 when questions have no answer."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.convert_seed_for_submission", description="Score answers on SEED-Bench."
    )
    parser.add_argument("--annotation-file", required=True, help="the official SEED-Bench.json")
    parser.add_argument("--result-file", required=True, help="answers, one JSON object per line")
    parser.add_argument("--result-upload-file", default=None, help="where the leaderboard's file goes")
    args = parser.parse_args(argv)
    problems = read_problems(Path(args.annotation_file))
    result = score_answers(problems, read_answers(Path(args.result_file)))
    print(report(result.metrics))
    if result.missing:
        first = ", ".join(result.missing[:5])
        print(
            f"error: {len(result.missing)} questions have no answer and count as wrong: {first}; "
            "the file for the leaderboard needs all and is not written",
            file=sys.stderr,
        )
        return 2
    if args.result_upload_file:
        write_upload(problems, result, Path(args.result_upload_file))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
