"""Trains tiny Video-LLaVAs without DUET and with it at several budgets, evaluates each, and compares.

    python -m playground.tiny.compare_video --budgets 0,960,136 --seeds 0,1,2 --out playground/tiny/runs/video-compare

One command does everything: the data and the base model are made where they are absent, every run is
`scripts/finetune_duet_video.sh` with its seed and budget (named after the rows of the paper's Table 14; 0 is none), and
the model without reduction is also evaluated with each budget, untrained for it. Flags after `--` are training flags.
A complete run is not repeated, an interrupted one is resumed. Writes `runs.json` and `runs.md` in the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duet.errors import main_guard
from llava.train.hf_plan import HfPlan, resolve_hf
from llava.train.hf_recipes import TINY_VIDEO
from llava.train.launch import Runner, prepare, run_stage
from playground.tiny.evaluate_video import markdown

JOB = "finetune_duet_video"


def label(budget: int, trained: bool = True) -> str:
    """Name of a row."""
    if budget == 0:
        return "full tokens"
    return f"DUET {budget}" if trained else f"DUET {budget}, not trained with it"


def plan(budget: int, seed: int, out: Path, flags: Sequence[str]) -> HfPlan:
    """Work out one training.

    Raises:
        ValueError: a budget that the tiny world has no setting for, or a wrong flag.
    """
    if budget and budget not in TINY_VIDEO.reduction:
        raise ValueError(f"--budgets {budget}: expected 0 or one of {', '.join(map(str, TINY_VIDEO.reduction))}")
    env = {**os.environ, "RECIPE": "tiny", "SEED": str(seed), "DUET_TOKENS": str(budget)}
    return resolve_hf(JOB, env | {"OUTPUT_ROOT": str(out / f"seed{seed}")}, flags)


def reduction_flags(budget: int) -> list[str]:
    """Evaluation flags of a budget."""
    settings = plan(budget, 0, Path("."), ()).stage.flags
    names = ("dominant", "contextual", "layer_list", "image_token_ratio_list")
    return [item for name in names for item in (f"--{name}", str(settings[name]))]


def finished(path: Path, name: str, seed: int) -> bool:
    """Whether a row has its figures."""
    runs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return any((run["name"], run["seed"]) == (name, seed) for run in runs)


def evaluations(budget: int, budgets: Sequence[int]) -> list[tuple[str, list[str]]]:
    """Rows that one trained model gives, and their flags."""
    rows = [(label(budget), [])]
    if budget == 0:
        rows += [(label(other, trained=False), reduction_flags(other)) for other in budgets if other]
    return rows


def run_one(one: HfPlan, budget: int, seed: int, args: argparse.Namespace) -> int:
    """Train and evaluate one model; returns the exit code of the step that failed, or 0."""
    runs, data = args.out / "runs.json", Path(str(one.stage.flags["data_path"])).with_name("heldout.json")
    rows = [row for row in evaluations(budget, args.budgets) if not finished(runs, row[0], seed)]
    if not rows:
        return 0
    with Runner(one.devices) as runner:
        code = prepare(one, runner) or run_stage(one, one.stage, runner)
        for name, flags in rows if code == 0 else []:
            command = [sys.executable, "-m", "playground.tiny.evaluate_video", "--model-path", str(one.stage.output)]
            command += ["--data", str(data), "--name", name, "--seed", str(seed), "--out", str(runs), *flags]
            command += ["--limit", str(args.limit)] if args.limit else []
            code = code or runner.run(f"evaluate: {name}, seed {seed}", command)
    if code == 0 and not args.keep_models:
        for pattern in ("*.safetensors", "checkpoint-*"):
            for path in one.stage.output.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return code


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", default="0,960,136", help="rows of Table 14; 0 is no reduction")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("playground/tiny/runs/video-compare"))
    parser.add_argument("--limit", type=int, help="questions of an evaluation")
    parser.add_argument("--keep-models", action="store_true", help="keep the weights of evaluated models")
    return parser


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    own, flags = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    args = make_parser().parse_args(own)
    try:
        args.budgets = [int(part) for part in args.budgets.split(",")]
        plans = [(budget, int(seed), plan(budget, int(seed), args.out, flags))
                 for seed in args.seeds.split(",") for budget in args.budgets]  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number, (budget, seed, one) in enumerate(plans, start=1):
        print(f"[{number} of {len(plans)}] {label(budget)}, seed {seed}", flush=True)
        if not one.can_run:
            print(one.describe(), file=sys.stderr)
            return 2
        code = run_one(one, budget, seed, args)
        if code != 0:
            return code
        write_table(args.out / "runs.json")
    return 0


def write_table(path: Path) -> None:
    """Write the table of all rows in order: full tokens, then budget by budget."""
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    table = markdown(sorted(runs, key=lambda run: (run["name"] != label(0), run["name"], run["seed"])))
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
