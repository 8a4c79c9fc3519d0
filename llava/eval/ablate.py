"""The paper's ablations and figures by name, on any model and any benchmarks.

    duet ablate fig3 --model-path MODEL --benchmarks textvqa
    duet ablate fig4 --model-path MODEL --image FILE --question TEXT

Each writes a table, CSV, JSON and a plot below --out; runs are shared with `duet compare` and with each other. fig4 and
fig6 draw heat maps of one picture instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from duet.errors import main_guard
from llava.eval import __main__ as single
from llava.eval import heat_maps
from llava.eval.ablations import ABLATIONS
from llava.eval.grid import Grid, add_grid_arguments, common_geometry
from llava.eval.plans import baseline, numbers
from llava.eval.processes import Processes
from llava.eval.tables import command_line


def usage() -> str:
    """What there is."""
    lines = [f"  {name:<10} {one.what} ({one.place})" for name, one in ABLATIONS.items()]
    lines += [f"  {name:<10} {what}" for name, what in heat_maps.FIGURES.items()]
    return "\n".join(["usage: duet ablate NAME --model-path MODEL --benchmarks NAMES ... (--help after NAME)", *lines])


def make_parser(name: str) -> argparse.ArgumentParser:
    """The command line of one ablation."""
    ablation = ABLATIONS[name]
    parser = argparse.ArgumentParser(prog=f"duet ablate {name}", description=f"{ablation.what}; {ablation.place}.")
    add_grid_arguments(parser)
    if ablation.budgets:
        default = ",".join(map(str, ablation.budgets))
        parser.add_argument("--budgets", default=default, help="visual tokens per layer on average")
    return parser


def run(args: argparse.Namespace, processes: Processes) -> bool:
    """Run one ablation; returns whether every question was answered.

    Raises:
        ValueError: a wrong request or wrong data.
    """
    single.check_arguments(args)
    ablation = ABLATIONS[args.ablation]
    budgets = numbers("budgets", args.budgets, 1) if ablation.budgets else []
    geometry = common_geometry(args)
    plans, refused = ablation.plan(geometry, budgets)
    for plan in plans:
        if plan.config is not None:
            plan.config.validate(geometry.patches, geometry.layers)
    heading = f"# {ablation.what[0].upper()}{ablation.what[1:]}\n\n{ablation.place}. {args.command}"
    stem = f"ablate-{args.ablation}"
    everything = [baseline(), *plans]
    return Grid(args, processes, everything, geometry, refused, False, stem, heading, ablation.draw, print).run()


def draw_heat_maps(name: str, argv: Sequence[str]) -> int:
    """Draw one of the figures of a single picture; returns the exit status."""
    args = heat_maps.make_parser(name).parse_args(argv)
    words = heat_maps.draw(args, name)
    print(f"{args.out}: {', '.join(words)}")
    return 0


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    name = given[0] if given else ""
    if name in heat_maps.FIGURES:
        return draw_heat_maps(name, given[1:])
    if name in ("--help", "-h"):
        print(usage())
        return 0
    if name not in ABLATIONS:
        print(f"error: {f'unknown ablation {name!r}' if name else 'no ablation'}\n{usage()}", file=sys.stderr)
        return 1
    chosen = argparse.Namespace(ablation=name, command=command_line("duet ablate", given))
    return single.guarded(make_parser(name).parse_args(given[1:], chosen), run)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
