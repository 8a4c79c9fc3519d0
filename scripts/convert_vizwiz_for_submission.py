"""Make VizWiz's submission from answers: LLaVA's script with LLaVA's flags.

python scripts/convert_vizwiz_for_submission.py --annotation-file llava_test.jsonl --result-file answers.jsonl \
    --result-upload-file upload.json
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from duet.errors import main_guard
from llava.command import exit_status
from llava.eval.answers import write_json
from llava.eval.submissions import read_split, read_texts, vizwiz_rows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make VizWiz's submission from answers.")
    parser.add_argument("--annotation-file", type=Path, required=True, help="LLaVA's llava_test.jsonl")
    parser.add_argument("--result-file", type=Path, required=True, help="answers, one JSON object per line")
    parser.add_argument("--result-upload-file", type=Path, required=True, help="file to write")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Write the submission.

    Raises:
        BadEvalData: a file is missing or malformed, or a question has no answer.
    """
    split, texts = read_split(args.annotation_file), read_texts(args.result_file)
    rows = vizwiz_rows(split, texts, args.result_file)
    args.result_upload_file.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.result_upload_file, rows)
    print(f"total results: {len(texts)}, total split: {len(split)}")


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(functools.partial(convert, parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
