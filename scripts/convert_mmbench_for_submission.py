"""Make MMBench's submission from answers: LLaVA's script with LLaVA's flags. Needs pandas and openpyxl.

python scripts/convert_mmbench_for_submission.py --annotation-file mmbench_dev_20230712.tsv --result-dir answers \
    --upload-dir upload --experiment llava-v1.5-13b
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from duet.errors import main_guard
from llava.command import exit_status
from llava.eval.submissions import mmbench_table, write_table


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make MMBench's submission from answers.")
    parser.add_argument("--annotation-file", type=Path, required=True, help="MMBench's table")
    parser.add_argument("--result-dir", type=Path, required=True, help="folder with EXPERIMENT.jsonl")
    parser.add_argument("--upload-dir", type=Path, required=True, help="folder for EXPERIMENT.xlsx")
    parser.add_argument("--experiment", required=True, help="name of both files")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Write the submission.

    Raises:
        BadEvalData: a file is missing or malformed, or a question has no answer.
        ImportError: pandas or openpyxl is not installed.
    """
    table = mmbench_table(args.annotation_file, args.result_dir / f"{args.experiment}.jsonl")
    write_table(table, args.upload_dir / f"{args.experiment}.xlsx")


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(functools.partial(convert, get_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
