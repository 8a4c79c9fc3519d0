"""Plots of comparisons and ablations: percent of the run without reduction, with error bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

from llava.eval.lines import Line

MARKERS = "osD^vP*X"
VALUE_LABEL = "% of the run without reduction"


def _figure(panels: int, width: float, height: float = 5) -> tuple[Any, Any] | None:
    """A figure and its axes; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, sharey=True, squeeze=False)[0]


def _curve(axis: Any, places: Sequence[float], lines: Sequence[Line], label: str, **style: Any) -> None:
    """One curve in the order of its places; error bars are `Line.error`."""
    order = sorted(range(len(lines)), key=lambda index: places[index])
    values = [fmean(lines[index].averages) for index in order]
    errors = [lines[index].error or 0.0 for index in order]
    axis.errorbar(
        [places[index] for index in order], values, yerr=errors, capsize=2, elinewidth=0.7, label=label, **style
    )


def _finish(figure: Any, axes: Any, path: Path) -> bool:
    axes[0].set_ylabel(VALUE_LABEL)
    for axis in axes:
        axis.grid(alpha=0.3)
    entries = axes[-1].get_legend_handles_labels()
    if entries[0]:
        figure.legend(*entries, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def scored(lines: Sequence[Line]) -> list[Line]:
    """The lines that have an average to draw."""
    return [line for line in lines if line.averages]


def against_cost(path: Path, lines: Sequence[Line]) -> bool:
    """Draw accuracy against measured tokens and against seconds, a curve per method.

    Seconds are those of a question that is asked alone where that was measured, else those of the runs.

    Returns:
        False where matplotlib is not installed.
    """
    lines = scored(lines)
    labels = list(dict.fromkeys(line.plan.label for line in lines))
    made = _figure(2, 14, max(5, 1 + 0.2 * len(labels)))
    if made is None:
        return False
    figure, axes = made
    alone = any(line.mean("latency") is not None for line in lines)
    time, time_label = ("latency", "seconds of one question") if alone else ("seconds", "seconds a sample, in batches")
    for axis, what, name in zip(axes, ("tokens", time), ("visual tokens per layer", time_label), strict=True):
        for number, (label, marker) in enumerate(zip(labels, cycle(MARKERS), strict=False)):
            own = [line for line in lines if line.plan.label == label and line.mean(what) is not None]
            places = [line.mean(what) or 0.0 for line in own]
            _curve(axis, places, own, label, marker=marker, color=f"C{number % 10}")
        axis.set_xlabel(name)
    return _finish(figure, axes, path)


def against_point(
    path: Path,
    lines: Sequence[Line],
    axis_name: str,
    place: Callable[[Line], float],
    panel: Callable[[Line], str],
    curve: Callable[[Line], str],
    crossed: Callable[[Line], bool] = lambda line: False,
    note: Callable[[Line], str] | None = None,
) -> bool:
    """Draw accuracy against what an ablation varies.

    Args:
        path: of the picture.
        lines: the table's lines; the run without reduction is a dotted level.
        axis_name: what the horizontal axis is.
        place: where a line stands on it.
        panel: in which panel, by title.
        curve: on which curve, by label.
        crossed: whether it is marked by a red cross and stands on no curve.
        note: what is written next to its point.

    Returns:
        False where matplotlib is not installed.
    """
    reduced = [line for line in scored(lines) if line.plan.config is not None]
    panels = list(dict.fromkeys(map(panel, reduced)))
    made = _figure(max(1, len(panels)), 4 + 4 * max(1, len(panels)))
    if made is None:
        return False
    figure, axes = made
    colours = {label: f"C{number % 10}" for number, label in enumerate(dict.fromkeys(map(curve, reduced)))}
    for axis, title in zip(axes, panels, strict=False):
        shown = [line for line in reduced if panel(line) == title]
        for label in dict.fromkeys(map(curve, shown)):
            own = [line for line in shown if curve(line) == label and not crossed(line)]
            if own:
                _curve(axis, [place(line) for line in own], own, label, marker="o", color=colours[label])
        gone = [line for line in shown if crossed(line)]
        if gone:
            _curve(axis, [place(line) for line in gone], gone, "no visual token left", fmt="x", color="red")
        for line in shown:
            if note is None:
                break
            spot = (place(line), fmean(line.averages))
            axis.annotate(note(line), spot, (5, 3), textcoords="offset points", fontsize="x-small")
        axis.axhline(100, color="grey", linestyle=":", linewidth=1)
        axis.set_title(title)
        axis.set_xlabel(axis_name)
    return _finish(figure, axes, path)


def bars(path: Path, lines: Sequence[Line]) -> bool:
    """Draw a group of bars per budget, a bar per line; False where matplotlib is not installed."""
    made = _figure(1, 10)
    if made is None:
        return False
    figure, axes = made
    reduced = [line for line in scored(lines) if line.plan.config is not None]
    budgets = sorted({line.plan.budget for line in reduced}, reverse=True)
    labels = list(dict.fromkeys(line.plan.label for line in reduced))
    width = 0.8 / max(1, len(labels))
    for number, label in enumerate(labels):
        own: Mapping[float, Line] = {line.plan.budget: line for line in reduced if line.plan.label == label}
        places = [budgets.index(budget) + (number + 0.5) * width - 0.4 for budget in own]
        heights = [fmean(line.averages) for line in own.values()]
        errors = [line.error or 0.0 for line in own.values()]
        axes[0].bar(places, heights, width, yerr=errors, capsize=3, label=label)
    axes[0].set_xticks(range(len(budgets)), [f"{budget:g} tokens" for budget in budgets])
    lowest = min((fmean(line.averages) - (line.error or 0) for line in reduced), default=0)
    axes[0].set_ylim(bottom=max(0, lowest - 5))
    return _finish(figure, axes, path)
