"""Compare reduction methods on one model: methods by budgets by benchmarks by seeds; a table, CSV, JSON and plots.

    duet compare --model-path MODEL --methods duet,fastv,visionzip+fastv --budgets 192,128,64 --benchmarks all
    duet compare --model-path MODEL --methods all --benchmarks tiny --limit-pictures 40

Budgets are true averages of visual tokens per decoder layer; a method that cannot reach one is named with the reason.
`--methods all` takes every method, and names those that cannot run at all as well. A pair VISION+LANGUAGE drops where
its language half does. Every run is stored by its settings: what is complete is reused, by other comparisons with the
same --out too, and the same command goes on after an interruption. Exit status as of `python -m llava.eval`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from duet.errors import main_guard
from llava.eval import __main__ as single
from llava.eval.calibrate import FILE_NAME
from llava.eval.grid import Grid, add_grid_arguments, common_geometry, model_paths
from llava.eval.plans import choose_methods, numbers, solved_plans
from llava.eval.plots import against_cost
from llava.eval.processes import Processes
from llava.eval.tables import command_line


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="duet compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_grid_arguments(parser)
    parser.add_argument("--methods", default="duet,visionzip,pyramiddrop,fastv,random", help="names and pairs, or all")
    parser.add_argument("--budgets", default="192,128,64", help="visual tokens per layer on average")
    parser.add_argument(
        "--calibration", default=None, help=f"of duet calibrate (default: {FILE_NAME} in the model's folder)"
    )
    return parser


def find_calibration(args: argparse.Namespace) -> str | None:
    """The calibration file that was given, or the one next to the (first) model if there is one."""
    beside = Path(model_paths(args.model_path)[0]) / FILE_NAME
    return args.calibration or (str(beside) if beside.is_file() else None)


def run(args: argparse.Namespace, processes: Processes) -> bool:
    """Run everything; returns whether every question was answered.

    Raises:
        ValueError: a wrong request or wrong data.
    """
    single.check_arguments(args)
    methods, tolerant = choose_methods(args.methods)
    budgets, seeds = numbers("budgets", args.budgets, 1), numbers("seeds", args.seeds)
    geometry = common_geometry(args)
    plans, refused = solved_plans(methods, budgets, seeds, geometry, tolerant, find_calibration(args))
    heading = f"# Methods at equal average tokens\n\n{args.command}"
    grid = Grid(args, processes, plans, geometry, refused, tolerant, "compare", heading, against_cost, print)
    return grid.run()


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = make_parser().parse_args(argv, argparse.Namespace(command=command_line("duet compare", argv)))
    return single.guarded(args, run)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
