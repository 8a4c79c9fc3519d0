"""Make the file that MM-Vet's evaluator reads: LLaVA's script with LLaVA's flags.

python scripts/convert_mmvet_for_eval.py --src answers.jsonl --dst results.json
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from duet.errors import main_guard
from llava.command import exit_status
from llava.eval.answers import write_json
from llava.eval.submissions import mmvet_answers, read_texts


def convert(src: str, dst: str) -> None:
    """Write the answers by MM-Vet's names.

    Raises:
        BadEvalData: the answers file is missing or malformed.
    """
    answers = mmvet_answers(read_texts(Path(src)))
    Path(dst).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(dst), answers)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make the file that MM-Vet's evaluator reads.")
    parser.add_argument("--src", required=True, help="answers, one JSON object per line")
    parser.add_argument("--dst", required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    return exit_status(functools.partial(convert, args.src, args.dst))


if __name__ == "__main__":
    raise SystemExit(main())
