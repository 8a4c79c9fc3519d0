"""One table over all runs of a results folder, as in the paper: score and percent of a baseline, and their average.

    python -m llava.eval.report RESULTS --baseline NAME [--out RESULTS/report] [--benchmarks pope,gqa] [--paper]

Writes Markdown, CSV and JSON and prints the Markdown. Exit status: 0; 1 for a wrong request; 2 if a result is
incomplete (its score is then left out of the table); 3 if one is marked as broken.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from duet.cells import csv_cell, markdown_cell, one_line
from duet.errors import main_guard
from llava.eval.answers import write_json
from llava.eval.files import read_json
from llava.eval.paper import PAPER_METRICS, PAPER_ROWS
from llava.eval.runner import RESULT_SUFFIX
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import BadEvalData
from llava.sanity import BROKEN

# The paper's columns come first, in its order; others follow by name.
ORDER = ("pope", "scienceqa", "textvqa", "mme", "gqa", "seed_image", "tgif_qa", "msvd_qa", "msrvtt_qa")
NEEDED = (
    "name", "benchmark", "title", "headline", "metrics", "n_expected", "n_missing", "n_unparsed", "missing_skipped",
    "visual_tokens", "seconds_per_sample", "digest", "notes",
)  # fmt: skip


BROKEN_MARK = "BROKEN"
TOKENS_NOTE = (
    "Visual tokens: measured, mean over decoder layers and over samples with a picture; entering: in the first layer; "
    "retained: in the last layer that has any. GFLOPs (multiply and add count as two) and KV bytes of one sample's "
    "prefill, from the tokens that every layer saw."
)
TOKEN_COUNTS = ("average", "entering", "retained")
COSTS = ("prefill_flops", "tower_flops", "kv_bytes")
COST_HEADS = ("entering", "retained", "prefill GFLOPs", "tower GFLOPs", "KV MiB")


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: what was run.
        scores: score by benchmark, in its own unit.
        metrics: what the score is, by benchmark, where that is known.
        percent: percent of the baseline's score, where both have one.
        average: mean of `percent`, or None.
        compared: how many benchmarks that is.
        tokens: visual tokens per layer on average over samples with a picture, or None.
        entering, retained: visual tokens in the first layer, and in the last one that has any, or None.
        prefill_flops, tower_flops, kv_bytes: of a sample with a picture, or None.
        seconds: seconds a sample, averaged over benchmarks, or None.
        untouched: per stage: samples in which it removed nothing, and samples with a picture.
        marks: what a reader must know about a score, by benchmark.
        titles: heads of the benchmarks' columns.
    """

    name: str
    scores: dict[str, float]
    metrics: dict[str, str] = field(default_factory=dict)
    percent: dict[str, float] = field(default_factory=dict)
    average: float | None = None
    compared: int = 0
    tokens: float | None = None
    entering: float | None = None
    retained: float | None = None
    prefill_flops: float | None = None
    tower_flops: float | None = None
    kv_bytes: float | None = None
    seconds: float | None = None
    untouched: dict[str, tuple[int, int]] = field(default_factory=dict)
    marks: dict[str, list[str]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read all results below a folder.

    Raises:
        BadEvalData: there are none, one is malformed, or a row has two results for one benchmark.
    """
    paths = sorted(folder.rglob(f"*{RESULT_SUFFIX}"))
    if not paths:
        raise BadEvalData(f"{folder} has no *{RESULT_SUFFIX}; run python -m llava.eval with --out {folder} first")
    found: dict[tuple[str, str], Path] = {}
    records = []
    for path in paths:
        record = read_json(path, dict)
        lacking = [key for key in NEEDED if key not in record]
        if lacking:
            raise BadEvalData(f"{path}: {', '.join(lacking)} missing; run the benchmark again")
        place = (record["name"], record["benchmark"])
        if place in found:
            raise BadEvalData(
                f"row {place[0]!r} has two results for {place[1]}, of different settings: {found[place]} and {path}; "
                "remove one, or give the runs different --name"
            )
        found[place] = path
        records.append(record)
    return records


def incomplete(record: Mapping[str, Any]) -> bool:
    """Whether answers are missing and nobody said that this is meant."""
    return bool(record["n_missing"]) and not record["missing_skipped"]


def make_row(name: str, records: Sequence[Mapping[str, Any]]) -> Row:
    """Put one row's results together; incomplete ones have no score."""
    row = Row(name, {r["benchmark"]: r["metrics"][r["headline"]] for r in records if not incomplete(r)})
    row.metrics = {r["benchmark"]: r["headline"] for r in records}
    row.titles = {r["benchmark"]: r["title"] for r in records}
    row.tokens, row.entering, row.retained = (_measured(records, f"{what}_tokens") for what in TOKEN_COUNTS)
    row.prefill_flops, row.tower_flops, row.kv_bytes = (_measured(records, what) for what in COSTS)
    seconds = [r["seconds_per_sample"] for r in records if r["seconds_per_sample"] is not None]
    row.seconds = fmean(seconds) if seconds else None
    for record in records:
        for stage, count in record["visual_tokens"]["untouched"].items():
            before = row.untouched.get(stage, (0, 0))
            row.untouched[stage] = (before[0] + count, before[1] + record["visual_tokens"]["samples"])
        row.marks[record["benchmark"]] = _marks(record)
    return row


def _measured(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """A number of the ledger, averaged over the samples with a picture of all benchmarks that have it."""
    ledgers = [record["visual_tokens"] for record in records if record["visual_tokens"].get(name) is not None]
    samples = sum(ledger["samples"] for ledger in ledgers)
    return sum(ledger[name] * ledger["samples"] for ledger in ledgers) / samples if samples else None


def _marks(record: Mapping[str, Any]) -> list[str]:
    marks = [f"{BROKEN_MARK}, no result: {finding}" for finding in record.get("broken", [])] + list(record["notes"])
    missing = f"{record['n_missing']} of {record['n_expected']} questions have no answer"
    if record["n_missing"]:
        marks.append(f"{missing}; no score" if incomplete(record) else f"{missing} and count as wrong")
    if record["n_unparsed"] and not any(note.startswith(f"{record['n_unparsed']} answers") for note in marks):
        marks.append(f"{record['n_unparsed']} answers could not be read and count as the official rule says")
    if record["visual_tokens"].get("cut"):
        marks.append(f"{record['visual_tokens']['cut']} prompts filled the model's context and may have been cut")
    return marks


def comparable(baseline: Row, row: Row) -> dict[str, float]:
    """The baseline's scores that are the same metric as the row's: a rule's score is no percentage of a judge's."""
    return {
        name: score
        for name, score in baseline.scores.items()
        if len({row.metrics[name] for row in (baseline, row) if name in row.metrics}) < 2
    }


def compare(row: Row, baseline: Mapping[str, float]) -> None:
    """Fill in percent of the baseline (of 0 there is none), and their mean over the benchmarks that both have."""
    row.percent = {name: 100 * score / baseline[name] for name, score in row.scores.items() if baseline.get(name)}
    row.compared = len(row.percent)
    row.average = fmean(row.percent.values()) if row.percent else None


def make_rows(records: Sequence[Mapping[str, Any]], baseline: str | None, paper: bool = False) -> list[Row]:
    """The table's rows: the baseline first, then the others by name.

    Args:
        records: results.
        baseline: a row's name, or one of `PAPER_ROWS`; None compares with nothing.
        paper: add the paper's rows on the benchmarks that were run; their percentages are of the paper's baseline.

    Raises:
        BadEvalData: there is no such baseline.
    """
    names = sorted({record["name"] for record in records})
    rows = {name: make_row(name, [r for r in records if r["name"] == name]) for name in names}
    wanted = [name for name in PAPER_ROWS if name not in rows and (name == baseline or paper)]
    run = {record["benchmark"] for record in records}
    for name in wanted:
        scores = {benchmark: score for benchmark, score in PAPER_ROWS[name].items() if benchmark in run}
        if scores or name == baseline:
            rows[name] = Row(name, scores, PAPER_METRICS)
    if baseline is not None:
        if baseline not in rows:
            known = [*names, *(name for name in PAPER_ROWS if "duet" not in name)]
            raise BadEvalData(f"no baseline {baseline!r}; known: {', '.join(known)}")
        for row in rows.values():
            published = PAPER_ROWS[row.name.split("-duet")[0]] if row.name in wanted else None
            compare(row, published or comparable(rows[baseline], row))
    return sorted(rows.values(), key=lambda row: (row.name != baseline, row.name in wanted, row.name))


def columns(rows: Sequence[Row]) -> list[str]:
    """The benchmarks that have a score or a mark, in the paper's order."""
    names = {name for row in rows for name in (*row.scores, *row.marks)}
    return [*(name for name in ORDER if name in names), *sorted(names - set(ORDER))]


def title(benchmark: str, rows: Sequence[Row] = ()) -> str:
    """The head of a benchmark's column: as the benchmark says, else as its runs do (a part of one), else its name."""
    if benchmark in TASKS.names():
        return TASKS.get(benchmark).title
    return next((row.titles[benchmark] for row in rows if benchmark in row.titles), benchmark)


def _cell(row: Row, benchmark: str) -> str:
    if benchmark not in row.scores:
        return "incomplete" if benchmark in row.marks else "n/a"
    score = row.scores[benchmark]
    text = f"{score:.0f}" if abs(score) >= 200 else f"{score:.1f}"
    text += f" {BROKEN_MARK}" if is_broken(row, benchmark) else ""
    return f"{text} ({row.percent[benchmark]:.1f}%)" if benchmark in row.percent else text


def is_broken(row: Row, benchmark: str) -> bool:
    """Whether a score is marked as no result."""
    return any(mark.startswith(BROKEN_MARK) for mark in row.marks.get(benchmark, []))


def number(value: float | None, form: str) -> str:
    """A number for a table; n/a where there is none."""
    return "n/a" if value is None else format(value, form)


def cost_cells(measured: Mapping[str, float | None]) -> list[str]:
    """The cells below `COST_HEADS`, from a row's attributes."""
    counts = [number(measured[name], ".1f") for name in ("entering", "retained")]
    units = {"prefill_flops": 1e9, "tower_flops": 1e9, "kv_bytes": 2**20}
    scaled = [(measured[name], unit) for name, unit in units.items()]
    return counts + [number(None if value is None else value / unit, ",.2f") for value, unit in scaled]


def markdown(rows: Sequence[Row], baseline: str | None) -> str:
    """The table, what was measured, and the notes."""
    names = columns(rows)
    head = [
        "run",
        "visual tokens",
        *(markdown_cell(title(name, rows)) for name in names),
        "Avg",
        "s/sample",
        *COST_HEADS,
        "untouched by a stage",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        average = "n/a" if row.average is None else f"{row.average:.1f}% of {row.compared}"
        untouched = ", ".join(f"{stage}: {count}/{of}" for stage, (count, of) in row.untouched.items()) or "n/a"
        cells = [markdown_cell(row.name), number(row.tokens, ".2f"), *(_cell(row, name) for name in names), average]
        lines.append(
            "| "
            + " | ".join([*cells, number(row.seconds, ".4f"), *cost_cells(vars(row)), markdown_cell(untouched)])
            + " |"
        )
    if baseline is not None:
        percent = (
            f"In brackets: percent of {markdown_cell(baseline)} (of the paper's own baseline in the paper's rows)."
        )
        lines += ["", f"{percent} Avg: their mean, and over how many benchmarks."]
    tokens = f"{TOKENS_NOTE} n/a: published rows, and runs from before it was measured."
    return "\n".join([*lines, "", tokens, "", *notes(rows, names)]).rstrip() + "\n"


def notes(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Every mark once, with the rows that it holds for unless it holds for all that have the benchmark."""
    lines = []
    for name in names:
        having = [row for row in rows if name in row.marks]
        for mark in dict.fromkeys(mark for row in having for mark in row.marks[name]):
            holds = [row.name for row in having if mark in row.marks[name]]
            whose = "" if len(holds) == len(having) else f" ({', '.join(holds)})"
            lines.append(f"- {markdown_cell(f'{title(name, rows)}{whose}: {mark}')}")
    return lines


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """The table with all digits: per benchmark a score and a percentage."""
    names = columns(rows)
    stages = list(dict.fromkeys(stage for row in rows for stage in row.untouched))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        head = ["run", "visual_tokens", *(part for name in names for part in (name, f"{name}_percent"))]
        head += ["avg_percent", "avg_of", "seconds_per_sample", "entering_tokens", "retained_tokens", *COSTS]
        writer.writerow([csv_cell(cell) for cell in [*head, *(f"untouched {s}" for s in stages)]])
        for row in rows:
            scores = [part for name in names for part in (row.scores.get(name), row.percent.get(name))]
            counts = [row.untouched[stage][0] if stage in row.untouched else None for stage in stages]
            measured = [row.seconds, row.entering, row.retained, row.prefill_flops, row.tower_flops, row.kv_bytes]
            writer.writerow([csv_cell(row.name), row.tokens, *scores, row.average, row.compared, *measured, *counts])


def write_report(records: Sequence[Mapping[str, Any]], rows: Sequence[Row], baseline: str | None, out: Path) -> str:
    """Write `out`.md, .csv and .json; returns the Markdown."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(rows, baseline)
    out.with_name(out.name + ".md").write_text(text, encoding="utf-8")
    write_csv(rows, out.with_name(out.name + ".csv"))
    content = {"baseline": baseline, "rows": [asdict(row) for row in rows], "results": list(records)}
    write_json(out.with_name(out.name + ".json"), content)
    return text


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="the --out of python -m llava.eval")
    parser.add_argument("--baseline", default=None, help="row that the others are percentages of, or paper-7b")
    parser.add_argument("--out", type=Path, default=None, help="first part of the files' names (RESULTS/report)")
    parser.add_argument("--benchmarks", default=None, help="only these, separated by commas")
    parser.add_argument("--paper", action="store_true", help="also show the paper's rows")
    return parser


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    records = read_records(args.results)
    if args.benchmarks:
        wanted = {TASKS.get(name.strip()).name for name in args.benchmarks.split(",")}
        records = [record for record in records if record["benchmark"] in wanted]
    rows = make_rows(records, args.baseline, args.paper)
    print(write_report(records, rows, args.baseline, args.out or args.results / "report"), end="")
    broken = [record for record in records if record.get("broken")]
    for record in filter(incomplete, records):
        _say(f"incomplete: {record['name']}, {record['benchmark']}: {record['n_missing']} missing")
    for record in broken:
        _say(f"broken: {record['name']}, {record['benchmark']}: {'; '.join(record['broken'])}")
    if broken:
        return BROKEN
    return 2 if any(map(incomplete, records)) else 0


def _say(text: str) -> None:
    print(one_line(text), file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
