"""ScienceQA's problems as LLaVA's training records: LLaVA's script with LLaVA's tasks and flags.

python scripts/convert_sqa_to_llava.py convert_to_llava --base-dir ScienceQA/data/scienceqa --split train \
    --prompt-format QCM-LEA
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert_sqa_to_llava_base_prompt import build_prompt_chatbot

from duet.errors import main_guard
from llava.command import exit_status
from llava.eval.answers import write_json, write_lines
from llava.eval.files import Row, read_json
from llava.eval.tasks.base import BadEvalData


def _records(base_dir: str, split: str, prompt_format: str) -> Iterator[tuple[str, dict[str, str], str, str]]:
    """Id, picture (a dict, empty where there is none), question and answer of every problem of a split."""
    folder = Path(base_dir)
    keys = Row(read_json(folder / "pid_splits.json", dict), str(folder / "pid_splits.json")).get(split, list)
    problems = read_json(folder / "problems.json", dict)
    absent = [key for key in keys if key not in problems]
    if absent:
        raise BadEvalData(f"{folder}: problems.json lacks {len(absent)} problems of the split {split!r}: {absent[:5]}")
    for key, (question, answer) in build_prompt_chatbot(problems, keys, prompt_format).items():
        name = problems[key]["image"]
        picture = {} if name is None else {"image": os.path.join(key, name)}
        yield key, picture, _without(question, "Question: "), _without(answer, "Answer: ")


def _without(text: str, label: str) -> str:
    """LLaVA's rule: where a text begins with a label, it loses it everywhere."""
    return text.replace(label, "") if text.startswith(label) else text


def convert_to_llava(base_dir: str, split: str, prompt_format: str = "QCM-LEA") -> None:
    """Write BASE_DIR/llava_SPLIT_FORMAT.json: an array of records with two turns, the image mark behind the question.

    Args:
        base_dir: folder with problems.json and pid_splits.json.
        split: train, val, test or another split there.
        prompt_format: see `convert_sqa_to_llava_base_prompt`.

    Raises:
        BadEvalData: a file is missing or malformed.
        ValueError: the format is unknown.
    """
    records: list[dict[str, Any]] = []
    for key, picture, question, answer in _records(base_dir, split, prompt_format):
        asked = f"{question}\n<image>" if picture else question
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        records.append({"id": key, **picture, "conversations": turns})
    write_json(Path(base_dir) / f"llava_{split}_{prompt_format}.json", records)
    print(f"Number of samples: {len(records)}")


def convert_to_jsonl(base_dir: str, split: str, prompt_format: str = "QCM-LEPA") -> None:
    """Write BASE_DIR/scienceqa_SPLIT_FORMAT.jsonl: rows of `instruction` and `output`; see `convert_to_llava`."""
    rows = [
        {"id": key, **picture, "instruction": f"{question}\n<image>" if picture else question, "output": answer}
        for key, picture, question, answer in _records(base_dir, split, prompt_format)
    ]
    write_lines(Path(base_dir) / f"scienceqa_{split}_{prompt_format}.jsonl", rows)


TASKS = {"convert_to_llava": convert_to_llava, "convert_to_jsonl": convert_to_jsonl}


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="ScienceQA's problems as LLaVA's training records.")
    parser.add_argument("task", choices=tuple(TASKS))
    parser.add_argument("--base-dir", "--base_dir", required=True, help="folder with problems.json and pid_splits.json")
    parser.add_argument("--split", required=True, help="train, val, trainval, test, ...")
    parser.add_argument("--prompt-format", "--prompt_format", help="such as QCM-LEA (default: the task's)")
    args = parser.parse_args(argv)
    given = {"prompt_format": args.prompt_format} if args.prompt_format else {}
    return exit_status(functools.partial(TASKS[args.task], args.base_dir, args.split, **given))


if __name__ == "__main__":
    raise SystemExit(main())
