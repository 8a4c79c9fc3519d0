"""What ``duet.bench`` measured, as Markdown, CSV and JSON, with the goals next to it."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

GOAL_LANGUAGE = 0.85  # of the speed-up that the FLOPs predict for the language part
GOAL_DECISIONS = 0.03  # of the full prefill, for stage 1 and stage 2 together
MIB = 2**20


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


def paired_ratio(full, row, sections: Sequence[str]) -> float:
    """Median over rounds of (full / row), each round with its own pair."""
    pairs = zip(full.seconds, row.seconds, strict=True)
    return statistics.median(sum(a[s] for s in sections) / sum(b[s] for s in sections) for a, b in pairs)


def derive(case, full, row, sections: Sequence[str], language: Sequence[str]) -> dict[str, float]:
    """Return the measured and predicted ratios of one configuration against full tokens.

    The optimizer is left out of both: its cost is memory traffic over the parameters, the same for all configurations.
    """
    whole = [*sections, *(["backward"] if case.kind == "train" else [])]
    out = {
        "language_ratio": paired_ratio(full, row, language),
        "language_predicted": full.flops["language"] / row.flops["language"],
        "language_predicted_square": full.flops_square["language"] / row.flops_square["language"],
        "whole_ratio": paired_ratio(full, row, whole),
        "whole_predicted": sum(full.flops.values()) / sum(row.flops.values()),
        "step_ratio": paired_ratio(full, row, ["total"]),
        "decisions": row.median("stage1", "stage2") / full.median(*sections),
        "memory": row.memory.tracked / full.memory.tracked,
    }
    return out | {
        "language_reached": out["language_ratio"] / out["language_predicted"],
        "language_reached_square": out["language_ratio"] / out["language_predicted_square"],
        "whole_reached": out["whole_ratio"] / out["whole_predicted"],
    }


def markdown(
    results,
    facts: Mapping[str, Any],
    sections: Sequence[str],
    language: Sequence[str],
    baseline: str,
    judge: bool = True,
) -> str:
    """Return the report: facts, one pair of tables per case, and the goals (left out when ``judge`` is False)."""
    lines = ["# Speed and memory: full tokens against DUET", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += [
        "",
        "Times are medians in milliseconds, the total with its smallest and largest value. `transformers` is the model",
        "as the library runs it, `full` all tokens through DUET's loop. Peak memory is what a run needs beyond weights",
        "and optimizer state, from the allocator's events; the resident set's growth is a coarse cross-check.",
        "Predicted ratios count the arithmetic that is done: causal attention computes a triangle. `square` bills it",
        "as the full square instead, which is the field's convention and promises more than there is to gain.",
        "",
    ]
    goals: list[str] = []
    for case, rows in results:
        full = next(row for row in rows if row.name == baseline)
        lines += [f"## {_title(case)}", "", *_time_table(case, rows, sections), ""]
        lines += [*_ratio_table(case, full, rows, sections, language), ""]
        goals += _goals(case, full, rows, sections, language)
    if not judge:
        goals = ["Not judged: the quick model is too small for its times to mean anything."]
    return "\n".join([*lines, "## Goals", "", *goals, ""])


def _title(case) -> str:
    kind = "Prefill" if case.kind == "prefill" else "Training step (forward, backward, AdamW; tower frozen)"
    return f"{kind}, batch {case.batch}"


def _time_table(case, rows, sections: Sequence[str]) -> list[str]:
    shown = [*sections, *(["backward", "optimizer"] if case.kind == "train" else [])]
    head = ["configuration", "tokens in", "average", "total (min to max)", *shown, "peak MiB", "resident MiB"]
    table = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in rows:
        low, high = row.spread("total")
        resident = "-" if row.memory.resident is None else f"{row.memory.resident / MIB:.0f}"
        cells = [row.name, str(row.tokens_entering), f"{row.tokens_average:g}"]
        cells += [f"{1e3 * row.median('total'):.0f} ({1e3 * low:.0f} to {1e3 * high:.0f})"]
        cells += [f"{1e3 * row.median(section):.1f}" for section in shown]
        table.append(_line([*cells, f"{row.memory.tracked / MIB:.0f}", resident]))
    return table


def _ratio_table(case, full, rows, sections, language) -> list[str]:
    head = ["full / configuration", "language", "predicted", "reached", "predicted (square)", "reached (square)"]
    head += ["whole", "predicted", "reached"]
    head += ["with optimizer"] if case.kind == "train" else []
    head += ["decisions / full", "memory / full"]
    table = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in rows:
        d = derive(case, full, row, sections, language)
        cells = [
            row.name,
            f"{d['language_ratio']:.2f}",
            f"{d['language_predicted']:.2f}",
            f"{d['language_reached']:.1%}",
            f"{d['language_predicted_square']:.2f}",
            f"{d['language_reached_square']:.1%}",
        ]
        cells += [f"{d['whole_ratio']:.2f}", f"{d['whole_predicted']:.2f}", f"{d['whole_reached']:.1%}"]
        cells += [f"{d['step_ratio']:.2f}"] if case.kind == "train" else []
        table.append(_line([*cells, f"{d['decisions']:.2%}", f"{d['memory']:.2f}"]))
    return table


def _goals(case, full, rows, sections, language) -> list[str]:
    lines = []
    for row in rows:
        if not row.name.startswith("duet"):
            continue
        d = derive(case, full, row, sections, language)
        lines += [
            _goal(
                d["language_reached"] >= GOAL_LANGUAGE,
                case,
                row,
                f"language part {d['language_reached']:.1%} of predicted "
                f"({d['language_reached_square']:.1%} of square)",
                "85 %",
            ),
            _goal(d["memory"] <= 1.0, case, row, f"peak memory {d['memory']:.1%} of full", "100 % at most"),
        ]
        if case.kind == "prefill":
            lines.append(
                _goal(
                    d["decisions"] <= GOAL_DECISIONS,
                    case,
                    row,
                    f"decisions {d['decisions']:.2%} of the prefill",
                    "3 % at most",
                )
            )
    return lines


def _goal(met: bool, case, row, what: str, goal: str) -> str:
    return f"- {'met' if met else 'MISSED'}: {case.kind} batch {case.batch}, {row.name}: {what} (goal {goal})"


def csv_text(results, sections: Sequence[str], language: Sequence[str], baseline: str) -> str:
    """Return one line per case and configuration; seconds and bytes."""
    out = io.StringIO()
    writer = None
    for case, rows in results:
        full = next(row for row in rows if row.name == baseline)
        for row in rows:
            record: dict[str, Any] = {"kind": case.kind, "batch": case.batch, "configuration": row.name}
            record |= {"tokens_entering": row.tokens_entering, "tokens_average": row.tokens_average}
            record |= {s: round(row.median(s), 6) for s in (*sections, "backward", "optimizer", "total")}
            record |= {"total_min": round(row.spread("total")[0], 6), "total_max": round(row.spread("total")[1], 6)}
            record |= {"peak_bytes": row.memory.tracked, "resident_bytes": row.memory.resident}
            record |= {name: round(value, 5) for name, value in derive(case, full, row, sections, language).items()}
            if writer is None:
                writer = csv.DictWriter(out, fieldnames=list(record), lineterminator="\n")
                writer.writeheader()
            writer.writerow(record)
    return out.getvalue()


def json_text(results, facts: Mapping[str, Any]) -> str:
    """Return every single measurement."""
    cases = [{"case": asdict(case), "rows": [asdict(row) for row in rows]} for case, rows in results]
    return json.dumps({"environment": dict(facts), "cases": cases}, indent=1) + "\n"


def write(path: str | None, make: Callable[[], str]) -> None:
    """Write a report where one is wanted, making its folder."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(make(), encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
