"""Run plans on one or several models, and write what came out after each of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval import __main__ as single
from llava.eval.answers import write_json
from llava.eval.latency import latencies
from llava.eval.lines import Line, Run, make_lines
from llava.eval.plans import Geometry, Plan, read_geometry
from llava.eval.processes import Processes
from llava.eval.report import columns
from llava.eval.tables import conditions, content, markdown, write_csv
from llava.mm_utils import get_model_name_from_path
from llava.sanity import refuse

MODEL_HELP = "checkpoint folder or hub name; several, separated by commas, are one model trained from several seeds"


def add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what all comparisons take, on top of the flags of a single evaluation."""
    single.add_run_arguments(parser, MODEL_HELP)
    parser.add_argument("--seeds", default="0,1,2", help="for the methods that choose at random")
    parser.add_argument(
        "--latency", type=int, default=0, metavar="N", help="also time N questions alone with every configuration"
    )


def model_paths(text: str) -> list[str]:
    """The models of a comparison."""
    return [path.strip() for path in text.split(",") if path.strip()]


def common_geometry(args: argparse.Namespace) -> Geometry:
    """Read the models' geometry from their configurations.

    Raises:
        ValueError: no model is named, or they differ.
    """
    found = {path: read_geometry(path, args.model_base) for path in model_paths(args.model_path)}
    sizes = {(geometry.patches, geometry.layers) for geometry in found.values()}
    if len(sizes) != 1:
        described = ", ".join(f"{path}: {g.patches} patches, {g.layers} layers" for path, g in found.items())
        raise ValueError(f"--model-path must name models of one size, got {described or 'none'}")
    return next(iter(found.values()))


@dataclass
class Grid:
    """The runs of one comparison.

    Attributes:
        args: the command line.
        processes: this process among all.
        plans: what to run, the run without reduction first.
        geometry: of the models.
        refused: what cannot be run and why.
        tolerant: name a plan that a model refuses instead of raising.
        stem: first part of the names of the files below `args.out`.
        heading: the table's first lines.
        draw: draws the lines to a file; returns False where that is not possible.
        say: writes a line for the user.
        runs: what was run so far.
        latency: seconds of a single question by model and run.
    """

    args: argparse.Namespace
    processes: Processes
    plans: Sequence[Plan]
    geometry: Geometry
    refused: list[str]
    tolerant: bool
    stem: str
    heading: str
    draw: Callable[[Path, Sequence[Line]], bool]
    say: Callable[[str], None]
    runs: list[Run] = field(default_factory=list)
    latency: dict[tuple[str, str], float] = field(default_factory=dict)

    def run(self) -> bool:
        """Run everything; returns whether every question was answered.

        Raises:
            ValueError: a wrong request or wrong data.
            BrokenResult: what came out of a run is no result; everything is written.
        """
        complete, broken = True, {}
        paths = model_paths(self.args.model_path)
        names = [get_model_name_from_path(path) for path in paths]
        for path, name in zip(paths, names, strict=True):
            session = single.open_session(_with(self.args, model_path=path), self.processes)
            label = name if names.count(name) == 1 else f"{name}-{session.fingerprint[:6]}"
            complete &= self._run_model(session, label)
            broken |= {f"{label}, {name}": found for name, found in session.broken.items()}
            if self.args.latency:
                ran = {plan.name: plan for plan, model, _ in self.runs if model == label}
                taken = latencies(session, list(ran.values()), self.args.latency)
                self.latency |= {(label, run): seconds for run, seconds in taken.items()}
        if self.runs:
            lines = self._write()
            if not self.draw(self._file("png"), lines):
                self.say("no plot: matplotlib is not installed (pip install -e '.[demo]')")
            self.say(self._file("md").read_text(encoding="utf-8"))
        refuse(broken)
        return complete

    def _run_model(self, session: single.Session, label: str) -> bool:
        complete = True
        options = _with(self.args, out=self.args.out / label)
        for number, plan in enumerate(self.plans, start=1):
            if self.processes.first:
                self.say(f"[{number} of {len(self.plans)}] {label}: {plan.name}")
            try:
                session.model.set_reduction(plan.config)
                records, answered = session.records(single.run_options(options, plan.name))
            except (ValueError, NotImplementedError) as error:
                if not self.tolerant or plan.config is None:
                    raise
                self.refused.append(f"{plan.label} at {plan.budget:g}: {error}")
                continue
            complete &= answered
            if records:
                self.runs.append((plan, label, records))
                self._write()
        return complete

    def _file(self, suffix: str) -> Path:
        return self.args.out / f"{self.stem}.{suffix}"

    def _write(self) -> list[Line]:
        """Write what is there so far; returns the table's lines."""
        lines = make_lines(self.runs, self.latency)
        names = columns([result.row for line in lines for result in line.results])
        heading = f"{self.heading}\n\n{conditions(self.runs)}"
        text = markdown(lines, names, self.geometry.patches, self.refused, heading)
        self._file("md").write_text(text, encoding="utf-8")
        write_csv(self._file("csv"), lines, names)
        write_json(self._file("json"), content(lines, self.refused))
        return lines


def _with(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**(vars(args) | changes))
