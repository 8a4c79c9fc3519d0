"""Convert answers to the file that GQA's official evaluator reads.

python scripts/convert_gqa_for_eval.py --src answers.jsonl --dst testdev_balanced_predictions.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from duet.errors import main_guard
from llava.eval.answers import read_answers
from llava.eval.tasks.gqa import predictions_file


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 for bad input."""
    parser = argparse.ArgumentParser(description="Convert answers for GQA's official evaluator.")
    parser.add_argument("--src", required=True, help="answers, one JSON object per line")
    parser.add_argument("--dst", required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    rows = predictions_file(read_answers(Path(args.src)))
    Path(args.dst).write_text(json.dumps(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
