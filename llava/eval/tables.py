"""A comparison's table as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from duet.cells import csv_cell, markdown_cell
from llava.eval.lines import MEASURED, Line, Result, Run, spread
from llava.eval.report import BROKEN_MARK, COST_HEADS, TOKENS_NOTE, cost_cells, is_broken, notes, number, title

TIMES = ("s alone", "s/sample")
TIMES_NOTE = (
    "s alone: median seconds of a question that is asked alone, all configurations in turn (--latency). s/sample: mean "
    "over the run, loading included; there questions about one picture share its prefill if the method allows that."
)


def _cell(line: Line, benchmark: str) -> str:
    scores = line.scores(benchmark)
    if not scores:
        return "incomplete" if any(benchmark in result.row.marks for result in line.results) else "n/a"
    percents = line.percents(benchmark)
    share = f" ({fmean(percents):.1f}%)" if percents else ""
    broken = any(is_broken(result.row, benchmark) for result in line.results)
    return spread(scores, 0 if abs(fmean(scores)) >= 200 else 1) + share + (f" {BROKEN_MARK}" if broken else "")


def _table_line(line: Line, names: Sequence[str]) -> str:
    cells = [markdown_cell(cell) for cell in (line.plan.label, *line.plan.point.values())]
    cells += [_cell(line, name) for name in names]
    cells.append(f"{spread(line.averages)}%" if line.averages else "n/a")
    measured = {name: line.mean(name) for name in MEASURED}
    seconds = [number(line.mean("latency"), ".4f"), number(measured["seconds"], ".4f")]
    cells += [number(measured["tokens"], ".2f"), *seconds, *cost_cells(measured)]
    return "| " + " | ".join(cells) + " |"


def markdown(lines: Sequence[Line], names: Sequence[str], patches: int, refused: Sequence[str], heading: str) -> str:
    """One table per budget with the run without reduction as its upper bound, the best average first."""
    baseline = next(line for line in lines if line.plan.config is None)
    varied = list(dict.fromkeys(name for line in lines for name in line.plan.point))
    rows = [result.row for line in lines for result in line.results]
    head = [
        "method",
        *varied,
        *(markdown_cell(title(name, rows)) for name in names),
        "Avg",
        "visual tokens",
        *TIMES,
        *COST_HEADS,
    ]
    out = [heading, ""]
    for budget in sorted({line.plan.budget for line in lines if line.plan.config is not None}, reverse=True):
        group = [line for line in lines if line.plan.budget == budget and line.plan.config is not None]
        group.sort(key=lambda line: (not line.plan.exact, -fmean(line.averages or [0])))
        less = 100 * (1 - budget / patches)
        out += [f"## Avg {budget:g} tokens (↓ {less:.1f}%)" if budget else "## Other settings", ""]
        out += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        bound = _table_line(baseline, names).split(" | ", 1)
        out.append(" | ".join([bound[0] + f" ({patches} tokens)", *["" for _ in varied], bound[1]]))
        out += [_table_line(line, names) for line in group] + [""]
    out.append(
        "In brackets: percent of the run without reduction of the same model; Avg: their mean over benchmarks. "
        "±: standard deviation over seeds and models."
    )
    out += ["", TOKENS_NOTE, "", TIMES_NOTE, "", *notes([baseline.results[0].row], names)]
    out += [
        f"- incomplete: {markdown_cell(f'{result.row.name} ({result.model})')}"
        for line in lines
        for result in line.results
        if len(result.row.scores) < len(result.row.marks)
    ]
    out += [
        f"- {markdown_cell(f'{result.row.name} ({result.model}), {name}: {mark}')}"
        for line in lines
        for result in line.results
        for name, marks in result.row.marks.items()
        for mark in marks
        if mark.startswith(BROKEN_MARK)
    ]
    released = dict.fromkeys(line.plan.label for line in lines if not line.plan.exact)
    if released:
        out.append(f"- as released, at the average that their settings have: {', '.join(released)}")
    out += [f"- not run: {markdown_cell(reason)}" for reason in refused]
    return "\n".join(out).rstrip() + "\n"


def conditions(runs: Sequence[Run]) -> str:
    """What was asked of which model on which machine."""
    records = runs[0][2]
    about, versions = records[0]["about"], records[0]["about"]["versions"]
    asked = ", ".join(f"{markdown_cell(record['title'])} ({record['n_expected']} questions)" for record in records)
    models = ", ".join(dict.fromkeys(markdown_cell(label) for _, label, _ in runs))
    spent = sum(record["seconds_per_sample"] * record["n_scored"] for _, _, group in runs for record in group
                if record["seconds_per_sample"])  # fmt: skip
    machine = f"{about['device']} ({versions['machine']}), torch {versions['torch']}"
    return (
        f"{models}; {asked}; {machine}; {spent / 60:.1f} minutes of answering in all, at batch {records[0]['batch']}."
    )


def _flat(result: Result, names: Sequence[str]) -> dict[str, Any]:
    row, plan = result.row, result.plan
    measured = {name: getattr(row, name) for name in MEASURED}
    scores = {part: value for name in names for part, value in
              ((name, row.scores.get(name)), (f"{name}_percent", row.percent.get(name)))}  # fmt: skip
    head = {"method": plan.label, "budget": plan.budget, **plan.point, "seed": plan.seed, "model": result.model}
    return (
        head
        | {"run": row.name, "avg_percent": row.average, "avg_stderr": result.error, "latency": result.latency}
        | measured
        | scores
    )


def write_csv(path: Path, lines: Sequence[Line], names: Sequence[str]) -> None:
    """One line per run, with all digits."""
    rows = [_flat(result, names) for line in lines for result in line.results]
    heads = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([csv_cell(head) for head in heads])
        writer.writerows([csv_cell(row.get(head)) for head in heads] for row in rows)


def content(lines: Sequence[Line], refused: Sequence[str]) -> dict[str, Any]:
    """Everything, for a JSON file."""
    runs = [
        {
            "method": result.plan.label,
            "budget": result.plan.budget,
            "point": dict(result.plan.point),
            "seed": result.plan.seed,
            "model": result.model,
            "reduction": None if result.plan.config is None else result.plan.config.to_dict(),
            "error": result.error,
            "latency": result.latency,
            **asdict(result.row),
        }
        for line in lines
        for result in line.results
    ]
    return {"runs": runs, "not_run": list(refused)}


def command_line(program: str, argv: Sequence[str] | None) -> str:
    """The command as a reader can give it again."""
    return f"`{program} {shlex.join(sys.argv[1:] if argv is None else argv)}`"
