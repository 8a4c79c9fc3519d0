"""Makes the tiny tower and the tiny language model: `python -m playground.tiny.train_backbones --out DIR`."""

from __future__ import annotations

import argparse
import logging
import os

from duet.errors import main_guard
from playground.tiny.llm import LlmRecipe, train_llm
from playground.tiny.parallel import barrier, launch
from playground.tiny.tower import TowerRecipe, train_tower


def train(args: argparse.Namespace) -> None:
    """Both trainings, on every rank."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(os.path.join(args.work, "log.txt"))],
    )
    if args.only != "llm":
        recipe = TowerRecipe(minutes=args.tower_minutes)
        train_tower(os.path.join(args.out, "clip"), recipe, os.path.join(args.work, "tower.pt"))
        barrier()
    if args.only != "tower":
        tower = os.path.join(args.out, "clip")
        train_llm(
            os.path.join(args.out, "llm"), tower, LlmRecipe(minutes=args.llm_minutes), os.path.join(args.work, "llm.pt")
        )


@main_guard
def main() -> None:
    """Train what `--only` names (default: both), tower first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="playground/tiny/weights")
    parser.add_argument("--work", default="playground/tiny/runs/backbones", help="resumable state and the log")
    parser.add_argument("--only", choices=("tower", "llm"))
    parser.add_argument("--tower-minutes", type=float, default=TowerRecipe.minutes)
    parser.add_argument("--llm-minutes", type=float, default=LlmRecipe.minutes)
    parser.add_argument("--ranks", type=int, default=2, help="processes with one thread each")
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    launch(train, args.ranks, args)


if __name__ == "__main__":
    raise SystemExit(main())
