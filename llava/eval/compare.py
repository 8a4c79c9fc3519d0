"""Compare reduction methods on one model: methods by budgets by benchmarks by seeds; a table, CSV and plots.

    python -m llava.eval.compare --model-path MODEL --methods duet,fastv,visionzip --budgets 192,128,64 --benchmarks all

Every run is one row of `python -m llava.eval`; runs that are complete are reused, and the same command goes on after an
interruption. Budgets are true averages of visual tokens per decoder layer; a method that cannot reach one is named with
the reason. `--methods all` names every method. Exit status as of `python -m llava.eval`.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from duet import DuetConfig
from duet.methods import METHODS, BudgetError, solve
from llava.eval import __main__ as single
from llava.eval.processes import Processes
from llava.eval.report import columns, make_rows, read_records, title

BASELINE = "full"
RANDOM = frozenset({"random", "random-llm"})


@dataclass(frozen=True)
class Plan:
    """One run: a method at a budget, with a seed where it draws at random."""

    method: str
    budget: int
    config: DuetConfig | None
    seed: int | None = None

    @property
    def group(self) -> str:
        """Name of the line that the run belongs to; seeds share one."""
        return self.method if self.config is None else f"{self.method}-{self.budget}"

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.group if self.seed is None else f"{self.group}-seed{self.seed}"


@dataclass
class Line:
    """One line of the table, over seeds.

    Attributes:
        method: its name.
        budget: wanted visual tokens, 0 for the baseline.
        tokens: measured average per layer.
        scores: by benchmark, one number per seed.
        averages: percent of the baseline, averaged over benchmarks, one number per seed.
        seconds: a sample, mean over seeds.
    """

    method: str
    budget: int
    tokens: float | None
    seconds: float | None
    scores: dict[str, list[float]] = field(default_factory=dict)
    averages: list[float] = field(default_factory=list)


def choose_methods(names: str) -> list[str]:
    """The methods by name, in the order of `duet.methods.METHODS`.

    Raises:
        ValueError: one is unknown.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = sorted(set(wanted) - set(METHODS) - {"all"})
    if unknown or not wanted:
        raise ValueError(f"--methods: unknown {', '.join(unknown) or 'empty list'}; known: all, {', '.join(METHODS)}")
    return [name for name in METHODS if "all" in wanted or name in wanted]


def numbers(flag: str, text: str) -> list[int]:
    """Read a comma list of whole numbers.

    Raises:
        ValueError: naming the flag.
    """
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"--{flag} {text}: expected whole numbers, separated by commas") from error
    if not found or min(found) < 0:
        raise ValueError(f"--{flag} {text}: expected numbers that are not negative")
    return list(dict.fromkeys(found))


def make_plans(
    methods: Sequence[str], budgets: Sequence[int], seeds: Sequence[int], patches: int, layers: int
) -> tuple[list[Plan], list[str]]:
    """Solve every method's budget; returns the runs, the baseline first, and what cannot be run and why."""
    plans, refused = [Plan(BASELINE, 0, None)], []
    for budget in budgets:
        for method in methods:
            try:
                if method in RANDOM:
                    plans += [Plan(method, budget, solve(method, budget, patches, layers, seed=s), s) for s in seeds]
                else:
                    plans.append(Plan(method, budget, solve(method, budget, patches, layers)))
            except BudgetError as error:
                refused.append(str(error))
    return plans, refused


def make_lines(out: Path, plans: Sequence[Plan]) -> list[Line]:
    """Read the results back and put seeds together."""
    names = {plan.name for plan in plans}
    rows = {row.name: row for row in make_rows([r for r in read_records(out) if r["name"] in names], BASELINE)}
    lines: dict[str, Line] = {}
    for plan in plans:
        row = rows[plan.name]
        line = lines.setdefault(plan.group, Line(plan.method, plan.budget, row.tokens, row.seconds))
        for benchmark, score in row.scores.items():
            line.scores.setdefault(benchmark, []).append(score)
        if row.average is not None:
            line.averages.append(row.average)
    return list(lines.values())


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, with the standard deviation over seeds where there are several."""
    if not values:
        return "n/a"
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(lines: Sequence[Line], names: Sequence[str], refused: Sequence[str]) -> str:
    """One table per budget, best average first."""
    head = ["method", "visual tokens", *map(title, names), "Avg %", "s/sample"]
    rule = "|" + "---|" * len(head)
    baseline = next(line for line in lines if line.method == BASELINE)
    out = []
    for budget in sorted({line.budget for line in lines if line.budget}, reverse=True):
        group = sorted((line for line in lines if line.budget == budget), key=lambda line: -fmean(line.averages or [0]))
        out += [f"## {budget} visual tokens", "", "| " + " | ".join(head) + " |", rule]
        for line in [baseline, *group]:
            cells = [line.method, "n/a" if line.tokens is None else f"{line.tokens:.2f}"]
            cells += [spread(line.scores.get(name, [])) for name in names]
            cells += [spread(line.averages), "n/a" if line.seconds is None else f"{line.seconds:.4f}"]
            out.append("| " + " | ".join(cells) + " |")
        out.append("")
    out.append(
        "Avg: mean over benchmarks of the percentage of the run without reduction. ±: standard deviation over seeds."
    )
    out += ["", *(f"- not run: {reason}" for reason in refused)]
    return "\n".join(out).rstrip() + "\n"


def write_csv(path: Path, lines: Sequence[Line], names: Sequence[str]) -> None:
    """One line per method, budget and seed."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["method", "budget", "visual_tokens", "seconds_per_sample", "seed_number", "avg_percent", *names]
        )
        for line in lines:
            for number in range(max(1, len(line.averages))):
                scores = [line.scores.get(name, [])[number : number + 1] for name in names]
                average = line.averages[number] if number < len(line.averages) else None
                row = [line.method, line.budget, line.tokens, line.seconds, number, average]
                writer.writerow([*row, *(value[0] if value else None for value in scores)])


def plot(path: Path, lines: Sequence[Line]) -> bool:
    """Draw accuracy against tokens and against time; returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axis, what, label in zip(
        panels, ("tokens", "seconds"), ("visual tokens per layer", "seconds a sample"), strict=True
    ):
        for method in dict.fromkeys(line.method for line in lines):
            own = sorted((getattr(line, what) or 0, line.averages) for line in lines if line.method == method)
            places, values = [place for place, _ in own], [fmean(average or [0]) for _, average in own]
            errors = [stdev(average) if len(average) > 1 else 0.0 for _, average in own]
            axis.errorbar(places, values, yerr=errors, marker="o", capsize=3, label=method)
        axis.set_xlabel(label)
    panels[0].set_ylabel("% of the run without reduction")
    panels[1].legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
    return True


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    single.add_run_arguments(parser)
    parser.add_argument("--methods", default="duet,visionzip,pyramiddrop,fastv,random", help="names, or all")
    parser.add_argument("--budgets", default="192,128,64", help="visual tokens per layer on average")
    parser.add_argument("--seeds", default="0,1,2", help="for the methods that draw at random")
    return parser


def run(args: argparse.Namespace, processes: Processes) -> bool:
    """Run everything; returns whether every question was answered.

    Raises:
        ValueError: a wrong request or wrong data.
    """
    methods = choose_methods(args.methods)
    budgets, seeds = numbers("budgets", args.budgets), numbers("seeds", args.seeds)
    session = single.open_session(args, processes)
    model = session.model
    plans, refused = make_plans(
        methods, budgets, seeds, model.get_vision_tower().num_patches, model.config.num_hidden_layers
    )
    complete = True
    for number, plan in enumerate(plans, start=1):
        if processes.first:
            print(f"[{number} of {len(plans)}] {plan.name}")
        model.set_reduction(plan.config)
        complete &= session.run(single.run_options(args, plan.name))
    if processes.first and args.limit is None:
        lines = make_lines(args.out, plans)
        names = columns(make_rows([r for r in read_records(args.out) if r["name"] == BASELINE], BASELINE))
        text = markdown(lines, names, refused)
        (args.out / "compare.md").write_text(text, encoding="utf-8")
        write_csv(args.out / "compare.csv", lines, names)
        if not plot(args.out / "compare.png", lines):
            print("no plot: matplotlib is not installed (pip install -e '.[demo]')", file=sys.stderr)
        print(text, end="")
    return complete


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return single.guarded(make_parser().parse_args(argv), run)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
