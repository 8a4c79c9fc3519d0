"""The picture of a ``duet.bench`` run: where the time of each configuration goes, and how stage 1 grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECTION_COLOURS = {
    "tower": "#4c72b0", "stage1": "#dd8452", "projector": "#55a868", "decoder": "#8172b3", "stage2": "#c44e52",
    "head": "#937860", "loss": "#da8bc3", "backward": "#8c8c8c", "optimizer": "#ccb974", "other": "#d0d0d0",
}  # fmt: skip


def check_plotting() -> None:
    """Leave with a clear message where matplotlib is missing, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib; pip install 'matplotlib>=3.9', or leave it out") from error


def save_plot(path: str, results: Sequence[tuple[Any, Sequence[Any]]], points: Sequence[Any], title: str) -> None:
    """Draw one panel per case, stacked by section with a mark at what the machine allows, and two for stage 1.

    Args:
        path: where to; the ending decides the format.
        results: cases with their rows.
        points: ``bench_stage1.Point``s, maybe none.
        title: device and date.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = len(results) + (2 if points else 0)
    columns = min(3, max(1, panels))
    lines = -(-panels // columns)
    tallest = max([len(rows) for _, rows in results], default=6)
    figure = Figure(figsize=(5.5 * columns, (1.6 + 0.3 * max(6, tallest)) * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    axes = [figure.add_subplot(lines, columns, number + 1) for number in range(panels)]
    for axis, (case, rows) in zip(axes, results, strict=False):
        _draw_case(axis, case, rows)
    if points:
        _draw_growth(axes[-2], points, "seconds", lambda point: point.median)
        _draw_growth(axes[-1], points, "MiB beyond the features", lambda point: point.memory / 2**20)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_case(axis: Any, case: Any, rows: Sequence[Any]) -> None:
    for place, row in enumerate(rows):
        left = 0.0
        for section, colour in SECTION_COLOURS.items():
            width = 1e3 * row.median(section)
            axis.barh(place, width, left=left, color=colour, label=section if place == 0 else None)
            left += width
        least = 1e3 * sum(value for name, value in row.possible.items() if name != "decode")
        axis.plot([least, least], [place - 0.4, place + 0.4], color="black", label=None if place else "possible")
    axis.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("ms")
    axis.set_title(f"{case.kind}, batch {case.batch}, {case.text} text tokens", fontsize=9)
    axis.legend(fontsize=6)


def _draw_growth(axis: Any, points: Sequence[Any], unit: str, value: Any) -> None:
    for series in dict.fromkeys(point.series for point in points):
        mine = sorted((point for point in points if point.series == series), key=lambda point: point.tokens)
        tokens, values = [point.tokens for point in mine], [value(point) for point in mine]
        (line,) = axis.plot(tokens, values, marker="o", label=series)
        straight = [values[0] * n / tokens[0] for n in tokens]
        axis.plot(tokens, straight, linestyle=":", color=line.get_color(), label="linear from the first")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("visual tokens")
    axis.set_ylabel(unit)
    axis.set_title("stage 1", fontsize=9)
    axis.legend(fontsize=6)
