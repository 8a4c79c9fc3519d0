"""The table that compares evaluated runs."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from duet.cells import markdown_cell
from playground.tiny.questions import CHANCE, KINDS


def _figure(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    text = f"{scale * mean(values):.{digits}f}"
    return f"{text} ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else text


def _row(name: str, runs: list[dict]) -> str:
    broken = any(run.get("broken") for run in runs)
    cells = [
        markdown_cell(name) + (" **(BROKEN, no result)**" if broken else ""),
        str(len(runs)),
        _figure([run["average_tokens"] for run in runs]),
    ]
    cells.append(_figure([run["mean"] for run in runs], 100))
    for kind in KINDS:
        values = [run["accuracy"][kind] for run in runs if kind in run["accuracy"]]
        cells.append(_figure(values, 100) if values else "n/a")
    cells.append(_figure([1000 * run["seconds_per_question"] for run in runs], 1, 0))
    cells.append(_figure([run["peak_memory_mib"] for run in runs], 1, 0))
    for key, digits in (("seconds_per_step", 3), ("peak_memory_mib", 0)):
        values = [run["training"][key] for run in runs if run.get("training", {}).get(key) is not None]
        cells.append(_figure(values, 1, digits) if values else "n/a")
    return "| " + " | ".join(cells) + " |"


def markdown(runs: list[dict]) -> str:
    """A Markdown table with one row per name (mean ± standard deviation over seeds) and a row of chance."""
    head = ["run", "seeds", "average visual tokens", "mean %", *(f"{kind} %" for kind in KINDS)]
    head += ["ms per question", "peak MiB", "training s/step", "training peak MiB"]
    chance = mean(CHANCE.values())
    row = ["chance", "", "", f"{100 * chance:.1f}", *(f"{100 * CHANCE[kind]:.1f}" for kind in KINDS), "", "", "", ""]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), "| " + " | ".join(row) + " |"]
    for name in dict.fromkeys(run["name"] for run in runs):
        lines.append(_row(name, [run for run in runs if run["name"] == name]))
    return "\n".join(lines) + "\n"


def write_table(runs: list[dict], path: Path) -> str:
    """Write the table and return it."""
    text = markdown(runs)
    path.write_text(text, encoding="utf-8")
    return text
