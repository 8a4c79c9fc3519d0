"""What ``duet.bench`` measured, as Markdown, CSV and JSON, with the goals next to it."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from duet import bench_goals
from duet.bench_run import EAGER, paired_ratio

MIB = 2**20
POSSIBLE = ("tower", "stage1", "projector", "decoder", "stage2", "head", "backward", "optimizer", "decode")


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the numbers: machine, versions, commit, date."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("transformers", "duet-vlm"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["MKL_CBWR"] = os.environ.get("MKL_CBWR", "not set")
    facts["commit"] = _commit()
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def derive(case, full, row, sections: Sequence[str], language: Sequence[str]) -> dict[str, float]:
    """Return the measured and predicted ratios of one configuration against full tokens.

    The optimizer is left out of both: its cost is memory traffic over the parameters, the same for all configurations.
    Only the saving of a step has it in the time that was measured.
    """
    parts = {  # what is timed, and whose FLOPs predict it
        "decoder": (("decoder", "stage2"), ("decoder",)),
        "language": (language, ("decoder", "head")),
        "whole": ([*sections, *(["backward"] if case.kind == "train" else [])], tuple(full.flops)),
    }
    out = {}
    for part, (timed, counted) in parts.items():
        ratio, predicted = paired_ratio(full, row, timed), _ratio(full.flops, row.flops, counted)
        square = _ratio(full.flops_square, row.flops_square, counted)
        out |= {f"{part}_ratio": ratio, f"{part}_predicted": predicted, f"{part}_predicted_square": square}
        out |= {f"{part}_reached": ratio / predicted, f"{part}_reached_square": ratio / square}
    step_ratio, saving = paired_ratio(full, row, ["total"]), 1 - 1 / out["whole_predicted"]
    return out | {
        "step_ratio": step_ratio,
        "saving_reached": (1 - 1 / step_ratio) / saving if saving > 0 else 1.0,
        "decisions": row.median("stage1", "stage2") / full.median(*sections),
        "memory": row.memory.tracked / full.memory.tracked,
    }


def _ratio(full: Mapping[str, float], row: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(full[name] for name in names) / sum(row[name] for name in names)


def markdown(
    results,
    facts: Mapping[str, Any],
    sections: Sequence[str],
    language: Sequence[str],
    baseline: str,
    judge: bool = True,
    points: Sequence[Any] = (),
    fits: Sequence[tuple[Any, Sequence[Any]]] = (),
) -> str:
    """Return the report: facts, tables per case, training at equal memory, stage 1 alone, and the goals.

    The goals are left out when ``judge`` is False.
    """
    lines = ["# Speed and memory: full tokens against DUET", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += [
        "",
        "Times are medians in milliseconds, the total with its smallest and largest value. `transformers` is the model",
        "as the library runs it, `full` all tokens through DUET's loop, `eager` the same reduction forced to attention",
        "maps. Peak memory is what a run needs beyond weights and optimizer state, from the allocator's events; the",
        "resident set's growth is a coarse cross-check. Predicted ratios count the arithmetic that is done: causal",
        "attention computes a triangle. `square` bills it as the full square instead, which is the field's convention",
        "and promises more than there is to gain. `decoder` is its layers with what stage 2 costs between them,",
        "`language` also the head and in training the backward. Possible is what the best matrix product and the best",
        "copy above allow for a section's FLOPs and bytes; the percentage is how much of it is reached.",
        "",
    ]
    goals: list[str] = []
    several = len({case.text for case, _ in results}) > 1
    for case, rows in results:
        full = next(row for row in rows if row.name == baseline)
        lines += [f"## {_title(case)}", "", *_time_table(case, rows, sections), ""]
        lines += [*_ratio_table(case, full, rows, sections, language), ""]
        for table in (_possible_table(rows), _segment_table(rows), _decode_table(case, full, rows), _eager_table(rows)):
            lines += [*table, ""] if table else []
        if judge:
            goals += bench_goals.judge(case, full, rows, derive_all(case, full, rows, sections, language), several)
    for case, found in fits:
        lines += [f"## Training at equal memory, {case.text} text tokens", "", *_memory_table(found), ""]
    if points:
        lines += ["## Stage 1 alone", "", *_growth_table(points), ""]
        goals += bench_goals.judge_growth(points) if judge else []
    if not judge:
        goals = ["Not judged: the quick model is too small for its times to mean anything."]
    return "\n".join([*lines, "## Goals", "", *goals, ""])


def derive_all(case, full, rows, sections: Sequence[str], language: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return ``derive`` of every row by its name."""
    return {row.name: derive(case, full, row, sections, language) for row in rows}


def _title(case) -> str:
    kind = "Prefill" if case.kind == "prefill" else "Training step (forward, backward, AdamW; tower frozen)"
    return f"{kind}, batch {case.batch}, {case.text} text tokens"


def _time_table(case, rows, sections: Sequence[str]) -> list[str]:
    shown = [*sections, *(["backward", "optimizer"] if case.kind == "train" else [])]
    energy = any(row.joules is not None for row in rows)
    head = ["configuration", "tokens in", "average", "total (min to max)", *shown, "peak MiB", "resident MiB"]
    head += ["joules"] if energy else []
    table = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in rows:
        low, high = row.spread("total")
        resident = "-" if row.memory.resident is None else f"{row.memory.resident / MIB:.0f}"
        cells = [row.name, str(row.tokens_entering), f"{row.tokens_average:g}"]
        cells += [f"{1e3 * row.median('total'):.0f} ({1e3 * low:.0f} to {1e3 * high:.0f})"]
        cells += [f"{1e3 * row.median(section):.1f}" for section in shown]
        cells += [f"{row.memory.tracked / MIB:.0f}", resident]
        table.append(_line([*cells, *([_joules(row)] if energy else [])]))
    return table


def _joules(row) -> str:
    return "-" if row.joules is None else f"{row.joules:.1f}"


def _ratio_table(case, full, rows, sections, language) -> list[str]:
    head = ["full / configuration", "decoder", "predicted", "reached", "language", "predicted", "reached", "of square"]
    head += ["whole", "predicted", "reached"]
    head += ["with optimizer", "saving reached"] if case.kind == "train" else []
    head += ["decisions / full", "memory / full"]
    table = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in rows:
        d = derive(case, full, row, sections, language)
        cells = [
            row.name,
            *_reached(d, "decoder"),
            *_reached(d, "language"),
            f"{d['language_reached_square']:.1%}",
            *_reached(d, "whole"),
        ]
        cells += [f"{d['step_ratio']:.2f}", f"{d['saving_reached']:.1%}"] if case.kind == "train" else []
        table.append(_line([*cells, f"{d['decisions']:.2%}", f"{d['memory']:.2f}"]))
    return table


def _reached(d: Mapping[str, float], part: str) -> list[str]:
    return [f"{d[part + '_ratio']:.2f}", f"{d[part + '_predicted']:.2f}", f"{d[part + '_reached']:.1%}"]


def possible_share(row, section: str) -> float | None:
    """Return which share of what the machine allows a section reaches; None where nothing is predicted or measured."""
    least = row.possible.get(section, 0.0)
    if not least or section not in row.seconds[0]:
        return None
    taken = row.median(section)
    return least / taken if taken else None


def _possible_table(rows) -> list[str]:
    """Least milliseconds that the machine allows for each section, and how much of them is reached."""
    names = [name for name in (rows[0].possible or ()) if name != "decode"]
    if not names:
        return []
    head = ["possible", *names, "whole"]
    table = [_line([*head]), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in rows:
        cells = [row.name]
        for name in names:
            share = possible_share(row, name)
            cells.append("-" if share is None else f"{1e3 * row.possible[name]:.1f} ({share:.0%})")
        least = sum(row.possible.get(name, 0.0) for name in names)
        cells.append(f"{1e3 * least:.0f} ({least / row.median('total'):.0%})")
        table.append(_line(cells))
    return table


def _segment_table(rows) -> list[str]:
    """Milliseconds of the decoder's segments, which end where tokens are dropped."""
    most = max((row.segments for row in rows), key=len)
    if len(most) < 2:
        return []
    table = [_line(["decoder, segment by segment", *most]), _line(["---", *["---:"] * len(most)])]
    for row in rows:
        cells = [f"{1e3 * row.median(name):.1f}" if name in row.segments else "" for name in most]
        table.append(_line([row.name, *cells]))
    return table


def _decode_table(case, full, rows) -> list[str]:
    """Tokens per second of decoding, and what the cache holds."""
    if any(row.kv_bytes is None for row in rows):
        return []
    timed = "decode" in rows[0].seconds[0]
    head = ["decode", *(["ms a step", "possible", "tokens/s", "full / configuration"] if timed else [])]
    head += ["KV MiB", "KV / full", "predicted"]
    table = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in rows:
        cells = [row.name]
        if timed:
            seconds, share = row.median("decode"), possible_share(row, "decode")
            cells += [
                f"{1e3 * seconds:.2f}",
                "-" if share is None else f"{1e3 * row.possible['decode']:.2f} ({share:.0%})",
            ]
            cells += [f"{case.batch / seconds:.1f}", f"{paired_ratio(full, row, ['decode']):.2f}"]
        cells += [f"{row.kv_bytes / MIB:.1f}", f"{row.kv_bytes / full.kv_bytes:.3f}"]
        table.append(_line([*cells, f"{row.kv_predicted / full.kv_predicted:.3f}"]))
    return table


def eager_pairs(rows) -> list[tuple[Any, Any]]:
    """Return each configuration with its twin that is forced to eager maps."""
    by_name = {row.name: row for row in rows}
    return [(by_name[row.name.removesuffix(EAGER)], row) for row in rows if row.name.endswith(EAGER)]


def _eager_table(rows) -> list[str]:
    """How much faster and smaller than eager maps."""
    pairs = eager_pairs(rows)
    if not pairs:
        return []
    head = ["eager maps / configuration", "whole", "tower", "decoder", "stage1 and stage2", "extra memory / eager"]
    table = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row, eager in pairs:
        groups = (["total"], ["tower"], ["decoder"], ["stage1", "stage2"])
        cells = [f"{paired_ratio(eager, row, group):.2f}" if row.spread(group[0])[0] else "-" for group in groups]
        table.append(_line([row.name, *cells, f"{row.memory.tracked / eager.memory.tracked:.1%}"]))
    return table


def _memory_table(fits) -> list[str]:
    full = fits[0]
    about = f"The largest batch whose step needs no more memory than full tokens need for {full.batch}."
    head = ["configuration", "batch", "peak MiB", "ms a step", "ms a sample", "full / configuration"]
    table = [about, "", _line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for fit in fits:
        cells = [fit.name, str(fit.batch), f"{fit.memory / MIB:.0f}", f"{1e3 * fit.per_sample * fit.batch:.0f}"]
        table.append(_line([*cells, f"{1e3 * fit.per_sample:.0f}", f"{full.per_sample / fit.per_sample:.2f}"]))
    return table


def _growth_table(points) -> list[str]:
    table = [_line(["series", "tokens", "ms", "microseconds a token", "MiB", "bytes a token"])]
    table.append(_line(["---", *["---:"] * 5]))
    for point in points:
        cells = [
            point.series,
            str(point.tokens),
            f"{1e3 * point.median:.2f}",
            f"{1e6 * point.median / point.tokens:.2f}",
        ]
        table.append(_line([*cells, f"{point.memory / MIB:.1f}", f"{point.memory / point.tokens:.0f}"]))
    return table


def csv_text(results, sections: Sequence[str], language: Sequence[str], baseline: str) -> str:
    """Return one line per case and configuration; seconds and bytes."""
    out = io.StringIO()
    writer = None
    for case, rows in results:
        full = next(row for row in rows if row.name == baseline)
        for row in rows:
            record: dict[str, Any] = {"kind": case.kind, "batch": case.batch, "text": case.text}
            record["configuration"] = row.name
            record |= {"tokens_entering": row.tokens_entering, "tokens_average": row.tokens_average}
            record |= {s: round(row.median(s), 6) for s in (*sections, "backward", "optimizer", "total")}
            record |= {"total_min": round(row.spread("total")[0], 6), "total_max": round(row.spread("total")[1], 6)}
            record |= {"peak_bytes": row.memory.tracked, "resident_bytes": row.memory.resident}
            record |= {"kv_bytes": row.kv_bytes, "kv_predicted": row.kv_predicted, "joules": row.joules}
            record["decode"] = round(row.median("decode"), 6) if "decode" in row.seconds[0] else None
            record |= {f"possible_{name}": round(row.possible.get(name, 0.0), 6) for name in POSSIBLE}
            record |= {name: round(value, 5) for name, value in derive(case, full, row, sections, language).items()}
            if writer is None:
                writer = csv.DictWriter(out, fieldnames=list(record), lineterminator="\n")
                writer.writeheader()
            writer.writerow(record)
    return out.getvalue()


def stage1_csv(points) -> str:
    """Return one line per point of stage 1 alone; seconds and bytes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["series", "tokens", "seconds", "seconds_min", "seconds_max", "peak_bytes"])
    for point in points:
        seconds = [round(value, 6) for value in (point.median, min(point.seconds), max(point.seconds))]
        writer.writerow([point.series, point.tokens, *seconds, point.memory])
    return out.getvalue()


def json_text(results, facts: Mapping[str, Any], points: Sequence[Any] = (), fits: Sequence[Any] = ()) -> str:
    """Return every single measurement."""
    measured = {
        "environment": dict(facts),
        "cases": [{"case": asdict(case), "rows": [asdict(row) for row in rows]} for case, rows in results],
        "equal_memory": [{"case": asdict(case), "fits": [asdict(fit) for fit in found]} for case, found in fits],
        "stage1": [asdict(point) for point in points],
    }
    return json.dumps(measured, indent=1) + "\n"


def write(path: str | None, make: Callable[[], str]) -> None:
    """Write a report where one is wanted, making its folder."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(make(), encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
