"""The lines of a comparison's table: runs of one setting, put together over seeds and models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from llava.eval.plans import BASELINE, Plan
from llava.eval.report import COSTS, Row, comparable, compare, incomplete, make_row

Records = list[dict[str, Any]]
Run = tuple[Plan, str, Records]
"""What was planned, the model's name, and a record for each benchmark."""
MEASURED = ("tokens", "entering", "retained", "seconds", *COSTS)


@dataclass
class Result:
    """One run.

    Attributes:
        plan: what was run.
        model: on which model.
        row: scores and what was measured.
        error: standard error of the row's average that the number of questions alone gives, None where unknown.
        latency: seconds of a question that is asked alone, None where it was not measured.
    """

    plan: Plan
    model: str
    row: Row
    error: float | None = None
    latency: float | None = None


@dataclass
class Line:
    """One line of a table: runs that differ in seed or model alone."""

    plan: Plan
    results: list[Result] = field(default_factory=list)

    def scores(self, benchmark: str) -> list[float]:
        """Score of every run that has one."""
        return [result.row.scores[benchmark] for result in self.results if benchmark in result.row.scores]

    def percents(self, benchmark: str) -> list[float]:
        """Percent of the same model's baseline."""
        return [result.row.percent[benchmark] for result in self.results if benchmark in result.row.percent]

    @property
    def averages(self) -> list[float]:
        """Percent of the baseline, averaged over benchmarks, of every run."""
        return [result.row.average for result in self.results if result.row.average is not None]

    @property
    def error(self) -> float | None:
        """Half an error bar: the standard deviation over runs, or what the number of questions gives for one run."""
        if len(self.averages) > 1:
            return stdev(self.averages)
        return self.results[0].error if self.results else None

    def mean(self, what: str) -> float | None:
        """`latency` or one of the `MEASURED` numbers, averaged over runs."""
        of = [result if what == "latency" else result.row for result in self.results]
        found = [value for one in of if (value := getattr(one, what)) is not None]
        return fmean(found) if found else None


def make_lines(runs: Sequence[Run], latency: Mapping[tuple[str, str], float] | None = None) -> list[Line]:
    """Put the runs' records together, each as a percentage of its own model's run without reduction.

    Args:
        runs: the records.
        latency: seconds by (model, run).
    """
    lines: dict[tuple, Line] = {}
    for model in dict.fromkeys(label for _, label, _ in runs):
        own = [(plan, records) for plan, label, records in runs if label == model]
        base_records = next(records for plan, records in own if plan.config is None)
        base = make_row(BASELINE, base_records)
        for plan, records in own:
            row = make_row(plan.name, records)
            reference = comparable(base, row)
            compare(row, reference)
            line = lines.setdefault(plan.line, Line(plan))
            seconds = (latency or {}).get((model, plan.name))
            line.results.append(Result(plan, model, row, _sampling_error(records, reference), seconds))
    return list(lines.values())


def _sampling_error(records: Records, reference: Mapping[str, float]) -> float | None:
    """Standard error of the average percentage, where every benchmark says that of its headline."""
    found = [
        (record["metrics"].get(f"{record['headline']}_stderr"), reference.get(record["benchmark"]))
        for record in records
        if not incomplete(record)
    ]
    if not found or any(error is None or not base for error, base in found):
        return None
    return sqrt(sum((100 * error / base) ** 2 for error, base in found)) / len(found)  # type: ignore[operator]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, with the standard deviation over runs where there are several."""
    if not values:
        return "n/a"
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
