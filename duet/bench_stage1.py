"""How the time and memory of stage 1 grow with the number of visual tokens (``duet.bench --stage1_tokens``).

A picture comes to a tower in one of two ways: as one sequence in which every patch sees all others (Qwen's
full-attention blocks), or as passes of 576 patches (tiles of LLaVA-NeXT, frames of a video), each ranked by itself. A
sequence is ranked by all of its patches, or (``readers``) by 576 of them. What is kept is the same at every size, so
that the growth is that of the ranking.

Shapes: B passes, N patches of a pass, D width.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from duet.bench_shapes import PATCHES
from duet.config import DuetConfig
from duet.probe import peak_memory, seconds_of
from duet.signals import TowerSignals
from duet.stage1 import VISION_REDUCERS, TowerOutput

SEQUENCE, PASSES = "one sequence", f"passes of {PATCHES}"
FEW_READERS = f"one sequence, {PATCHES} readers"


@dataclass
class Point:
    """Stage 1 at one number of visual tokens: seconds of every run, and bytes beyond the features."""

    series: str
    tokens: int
    memory: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


class _Attention(nn.Module):
    """The part of a tower block that stage 1 reads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5


def run_stage1(
    shape: Any, sizes: Sequence[int], rounds: int, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]
) -> list[Point]:
    """Measure DUET's stage 1 at several numbers of visual tokens, all sizes and series interleaved.

    Args:
        shape: whose tower's width and heads to take.
        sizes: visual tokens; at least 576 each. The series of passes rounds them to whole passes.
        rounds: timed runs of each size.
        device, dtype: where and in what.
        say: where progress goes.
    """
    attention = _Attention(shape.tower_width, shape.tower_heads).to(device, dtype)
    work: list[tuple[Point, Callable[[], object]]] = []
    for series in (SEQUENCE, FEW_READERS, PASSES):
        config = DuetConfig(dominant=300, contextual=7, options={"readers": PATCHES} if series == FEW_READERS else {})
        method: Any = VISION_REDUCERS.get(config.stage1)
        reducer = partial(method, config=config)
        for size in sizes:
            passes = max(1, round(size / PATCHES)) if series == PASSES else 1
            patches = PATCHES if series == PASSES else size
            run = _run(reducer, attention, passes, patches, shape.tower_width)
            work.append((Point(series, passes * patches, peak_memory(run, device).tracked), run))
            say(f"stage 1, {series}, {passes * patches} tokens: memory")
    for number in range(rounds):
        for point, run in work:
            point.seconds.append(seconds_of(run, device))
        say(f"stage 1: round {number + 1} of {rounds}")
    return [point for point, _ in work]


def _run(reducer: Any, attention: Any, passes: int, patches: int, width: int) -> Callable[[], object]:
    weights = attention.q_proj.weight
    block = SimpleNamespace(layer_norm1=nn.Identity(), self_attn=attention)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(passes, patches, width, generator=generator).to(weights)
    pixels = weights.new_zeros(passes, 3, 1, 1)

    def run() -> object:
        with torch.inference_mode():
            tower = TowerOutput(hidden, TowerSignals(hidden, attention, False), False, (1, patches), pixels, block)
            return reducer(tower)

    return run


def exponent(tokens: Sequence[int], values: Sequence[float]) -> float:
    """Return the power of the number of tokens with which values grow: the slope of the best line through logarithms.

    1 is linear growth, 2 quadratic.
    """
    x, y = [math.log(n) for n in tokens], [math.log(value) for value in values]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def growth(points: Sequence[Point]) -> dict[str, tuple[float, float]]:
    """Return the exponents of time and memory of each series that has two sizes or more."""
    out = {}
    for series in dict.fromkeys(point.series for point in points):
        mine = [point for point in points if point.series == series]
        tokens = [point.tokens for point in mine]
        if len(set(tokens)) > 1:
            out[series] = (
                exponent(tokens, [point.median for point in mine]),
                exponent(tokens, [point.memory for point in mine]),
            )
    return out
