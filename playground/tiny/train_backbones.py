"""Makes the tiny tower and the tiny language model: `python -m playground.tiny.train_backbones --out DIR`."""

from __future__ import annotations

import argparse
import logging
import os

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


def main() -> None:
    """Train what `--only` names (default: both), tower first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="playground/tiny/weights")
    parser.add_argument("--work", default="playground/tiny/runs/backbones", help="resumable state and the log")
    parser.add_argument("--only", choices=("tower", "llm"))
    parser.add_argument("--tower-minutes", type=float, default=TowerRecipe.minutes)
    parser.add_argument("--ranks", type=int, default=2, help="processes with one thread each")
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    launch(train, args.ranks, args)


if __name__ == "__main__":
    main()
