"""Convert answers to the file that GQA's official evaluator reads.

python scripts/convert_gqa_for_eval.py --src answers.jsonl --dst testdev_balanced_predictions.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llava.eval.answers import read_answers
from llava.eval.tasks.gqa import predictions_file


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 for bad input."""
    parser = argparse.ArgumentParser(description="Convert answers for GQA's official evaluator.")
    parser.add_argument("--src", required=True, help="answers, one JSON object per line")
    parser.add_argument("--dst", required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    try:
        rows = predictions_file(read_answers(Path(args.src)))
        Path(args.dst).write_text(json.dumps(rows), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
