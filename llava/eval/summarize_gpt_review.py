"""Mean figures of GPT-4 reviews by category: LLaVA's entry point with LLaVA's flags.

python -m llava.eval.summarize_gpt_review -f reviews/llava-v1.5-13b.jsonl

Each line: category, own answers in percent of the reference's, and both means times ten.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from duet.errors import main_guard
from llava.eval.files import read_json_lines
from llava.eval.gpt_review import UNREADABLE
from llava.eval.tasks.base import BadEvalData

_PREFIXES = ("gpt4_text", "reviews_", "review_")
_LINE = "=" * 33


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.summarize_gpt_review", description="Mean figures of GPT-4 reviews."
    )
    parser.add_argument("-d", "--dir", help="folder with review files")
    parser.add_argument("-v", "--version", help="only files of this judge: 0314 or 0613")
    parser.add_argument("-s", "--select", nargs="*", help="only files whose names hold all of these")
    parser.add_argument("-f", "--files", nargs="*", default=[], help="these files, below --dir if that is given")
    parser.add_argument("-i", "--ignore", nargs="*", default=[], help="question_ids to leave out")
    return parser.parse_args(argv)


def find_files(args: argparse.Namespace) -> list[Path]:
    """The review files that the flags name, by name.

    Raises:
        ValueError: there are none.
    """
    folder = Path(args.dir) if args.dir else Path()
    if args.files:
        return [folder / name for name in sorted(args.files)]
    if not args.dir:
        raise ValueError("nothing to summarise: pass --files or --dir")
    found = sorted(folder.glob("*.jsonl"))
    if "review" not in args.dir:
        found = [path for path in found if path.name.startswith(_PREFIXES)]
    if not found:
        raise ValueError(f"{args.dir} has no review files (.jsonl, names that begin with {', '.join(_PREFIXES)})")
    return found


def wanted(config: str, args: argparse.Namespace) -> bool:
    """Do --select and --version let this file through?"""
    version = "0613" if "0613" in config else "0314"
    return all(part in config for part in args.select or []) and args.version in (None, version)


def read_scores(path: Path, ignore: Collection[str]) -> tuple[dict[str, list[list[float]]], int]:
    """Read one file's pairs of figures by category, with `all` among them, and how many reviews have none.

    Raises:
        BadEvalData: a row is malformed, or none is left.
    """
    scores: dict[str, list[list[float]]] = {"all": []}
    unreadable = 0
    for row in read_json_lines(path):
        if str(row.get("question_id", str, int)) in ignore:
            continue
        pair = row.get("tuple" if "tuple" in row.data else "score", list)
        if pair == UNREADABLE:
            unreadable += 1
            continue
        if len(pair) != 2 or not all(isinstance(figure, int | float) for figure in pair):
            raise BadEvalData(f"{row.where}: expected two figures, found {pair!r}")
        scores["all"].append(pair)
        if "category" in row.data:
            scores.setdefault(row.get("category", str), []).append(pair)
    if not scores["all"]:
        raise BadEvalData(f"{path} has no review with two figures")
    return scores, unreadable


def lines(scores: dict[str, list[list[float]]]) -> list[str]:
    """LLaVA's lines, one a category."""
    found = []
    for name, pairs in sorted(scores.items()):
        reference, own = (round(sum(column) / len(pairs), 3) for column in zip(*pairs, strict=True))
        if not reference:
            raise BadEvalData(f"category {name}: the reference answers have 0 points, so nothing can be compared")
        found.append(f"{name} {round(own / reference * 100, 1)} {round(reference * 10, 1)} {round(own * 10, 1)}")
    return found


def summarize(path: Path, config: str, ignore: Sequence[str]) -> int:
    """Print one file's figures; returns how many reviews were left out because they have none.

    Raises:
        BadEvalData: the file is malformed.
    """
    scores, unreadable = read_scores(path, ignore)
    print("\n".join([config, *lines(scores), _LINE]))
    if unreadable:
        print(f"error: {path}: {unreadable} reviews have no figures and are not in the means", file=sys.stderr)
    return unreadable


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for bad input, or 2 where reviews have no figures."""
    args = parse_args(argv)
    unreadable = 0
    for path in find_files(args):
        config = path.name.replace("gpt4_text_", "").replace(".jsonl", "")
        if wanted(config, args):
            unreadable += summarize(path, config, args.ignore)
    return 2 if unreadable else 0


if __name__ == "__main__":
    raise SystemExit(main())
