"""Score a folder of MME result files (`<category>.txt`), as the official `calculation.py`.

python -m llava.eval.eval_mme --results_dir playground/data/eval/MME/eval_tool/answers/NAME
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from duet.errors import main_guard
from llava.eval.tasks.mme import COGNITION, PERCEPTION, absent_categories, score_folder


def report(points: Mapping[str, float]) -> str:
    """The lines that the official script prints, and the sum."""
    lines = []
    for title, categories in (("Perception", PERCEPTION), ("Cognition", COGNITION)):
        lines += [f"=========== {title} ===========", f"total score: {points[title.lower()]} \n"]
        lines += [f"\t {category}  score: {points[category]}" for category in categories if category in points] + ["\n"]
    return "\n".join([*lines, f"Perception + Cognition: {points['total']:.2f}"])


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for bad input, or 2 when a category has no file."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.eval_mme", description="Score MME result files.")
    parser.add_argument("--results_dir", "--results-dir", required=True, help="folder with <category>.txt")
    args = parser.parse_args(argv)
    points = score_folder(Path(args.results_dir))
    print(report(points))
    if absent := absent_categories(points):
        print(f"error: no file for {', '.join(absent)}; the sums are without them", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
