"""Make VQAv2's submission from answers: LLaVA's script with LLaVA's flags.

python scripts/convert_vqav2_for_submission.py --split llava_vqav2_mscoco_test-dev2015 --ckpt llava-v1.5-13b
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from duet.errors import main_guard
from llava.command import exit_status
from llava.eval.answers import write_json
from llava.eval.submissions import read_split, read_texts, refuse_missing, vqav2_rows

WHOLE_TEST = "llava_vqav2_mscoco_test2015.jsonl"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make VQAv2's submission from answers.")
    parser.add_argument("--dir", type=Path, default=Path("./playground/data/eval/vqav2"), help="folder of VQAv2")
    parser.add_argument("--ckpt", required=True, help="the model's name: folder of its answers")
    parser.add_argument("--split", required=True, help="which questions were asked: folder of the answers")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Write DIR/answers_upload/SPLIT/CKPT.json.

    Raises:
        BadEvalData: a file is missing or malformed, or a question that was asked has no answer.
    """
    source = args.dir / "answers" / args.split / args.ckpt / "merge.jsonl"
    texts = read_texts(source)
    asked = args.dir / f"{args.split}.jsonl"
    if asked.is_file():
        keys = [row.get("question_id", str, int) for row in read_split(asked)]
        refuse_missing((key for key in keys if key not in texts), source, "run the same command again to finish it")
    split = read_split(args.dir / WHOLE_TEST)
    rows, missing = vqav2_rows(split, texts)
    target = args.dir / "answers_upload" / args.split / f"{args.ckpt}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, rows)
    print(f"total results: {len(texts)}, total split: {len(split)}, without an answer: {len(missing)}")


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(functools.partial(convert, parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
