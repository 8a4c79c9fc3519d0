"""FitPrune's calibration: how many visual tokens each decoder layer can spare, measured on sample prompts.

A share ``alpha`` of attention may be lost. For each ``alpha`` the decoder runs with what it removes: at every layer the
tokens whose removal leaves at least ``1 - alpha`` of the attention of an unpruned run, from visual tokens and from text
alike. The mean counts become a small file, from which a schedule for any budget follows without the model.
Source: FitPrune (arXiv 2409.10197) Sec. 3 and its code, whose published lists are for one model.
Shapes: B batch (1 here), L sequence, N visual tokens, D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duet.budget import DecoderShape
from duet.config import DuetConfig
from duet.decoder import run_decoder
from duet.queries import marked_indices
from duet.stage2 import Decision, Stage

FORMAT = "duet-fitprune-1"
WIDTH = 0.01  # of alpha, where the search for a budget stops
_ASK = 0.999  # a keep ratio below 1, so that every stage is asked


@torch.no_grad()
def attention_masses(stage: Stage) -> tuple[Tensor, Tensor]:
    """Return what each token receives from visual tokens (mean over them) and from text after the image (mean over it).

    Rows are added up after taking the largest attention among heads, in the layer that ran last. Shapes: two of [B, L].
    """
    signals = stage.last_signals()
    means = []
    for mask in (stage.state.visual, stage.state.text):
        rows, counted = marked_indices(mask)
        means.append(signals.largest_received(rows, counted) / counted.sum(1, keepdim=True).clamp(min=1))
    return means[0], means[1]


@dataclass(frozen=True)
class Curve:
    """What one ``alpha`` removes.

    Attributes:
        alpha: the share of attention that may be lost.
        removed: after each layer but the last, the mean share of the entering visual tokens that is removed there.
    """

    alpha: float
    removed: tuple[float, ...]

    def left(self) -> list[float]:
        """Return the share of tokens at the input of every layer, the first one included."""
        shares = [1.0]
        for share in self.removed:
            shares.append(max(0.0, shares[-1] - share))
        return shares

    def average(self) -> float:
        """Return the mean of ``left``."""
        left = self.left()
        return sum(left) / len(left)


@dataclass(frozen=True)
class Calibration:
    """The measured curves of one decoder, by rising ``alpha``.

    Attributes:
        layers: decoder depth.
        width: of the hidden states.
        mlp_width: of the MLP.
        samples: prompts that were measured.
        curves: one per ``alpha``; those of 0 and 1, which remove nothing and everything, need not be measured.
        about: where it comes from.
    """

    layers: int
    width: int
    mlp_width: int
    samples: int
    curves: tuple[Curve, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def between(self) -> list[Curve]:
        """Return all curves with the two ends, each keeping at most what the one before it keeps on average."""
        ends = Curve(0.0, (0.0,) * (self.layers - 1)), Curve(1.0, (1.0,) + (0.0,) * (self.layers - 2))
        return sorted((ends[0], *self.curves, ends[1]), key=lambda curve: -curve.average())

    def for_average(self, share: float) -> Curve:
        """Return the curve that keeps ``share`` of the tokens on average over layers, between the two nearest.

        A share that no curve keeps (below one layer's worth) gives the curve that keeps least.
        """
        curves = self.between()
        for more, less in pairwise(curves):
            if more.average() >= share >= less.average():
                step = more.average() - less.average()
                return _mix(more, less, (more.average() - share) / step if step else 0.0)
        return curves[-1]

    def for_alpha(self, alpha: float) -> Curve:
        """Return the curve of an ``alpha`` in [0, 1], between the two nearest that were measured."""
        curves = sorted(self.between(), key=lambda curve: curve.alpha)
        after = next(number for number, curve in enumerate(curves) if number and curve.alpha >= alpha)
        less, more = curves[after - 1], curves[after]
        return _mix(less, more, (alpha - less.alpha) / (more.alpha - less.alpha))

    def for_flops(self, cut: float, tokens: int) -> Curve:
        """Return the curve of the smallest ``alpha`` that saves a share ``cut`` of the FLOPs.

        As published: only the ``tokens`` visual tokens count, and ``alpha`` goes in steps of ``WIDTH``.
        """
        full = self._flops(self.for_alpha(0.0), tokens)
        alphas = (step * WIDTH for step in range(round(1 / WIDTH) + 1))
        curves = (self.for_alpha(alpha) for alpha in alphas)
        return next((c for c in curves if self._flops(c, tokens) <= (1 - cut) * full), self.for_alpha(1.0))

    def _flops(self, curve: Curve, tokens: int) -> float:
        counts = [share * tokens for share in curve.left()]
        after = [*counts[1:], counts[-1]]  # a layer's MLP sees what its attention leaves
        attention = sum(4 * n * self.width**2 + 2 * n * n * self.width for n in counts)
        return attention + sum(3 * n * self.width * self.mlp_width for n in after)

    def save(self, path: Path) -> None:
        """Write the file that the option ``calibration`` names."""
        rounded = [{"alpha": c.alpha, "removed": [round(x, 6) for x in c.removed]} for c in self.curves]
        text = json.dumps({"format": FORMAT, **asdict(self), "curves": rounded, "about": dict(self.about)}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")


def _mix(first: Curve, second: Curve, share: float) -> Curve:
    pairs = zip(first.removed, second.removed, strict=True)
    mixed = tuple(a + (b - a) * share for a, b in pairs)
    return Curve(first.alpha + (second.alpha - first.alpha) * share, mixed)


def read_calibration(path: str | Path) -> Calibration:
    """Read what ``Calibration.save`` wrote.

    Raises:
        ValueError: there is no such file, or it is something else; the message names it.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        curves = tuple(Curve(c["alpha"], tuple(c["removed"])) for c in values.pop("curves"))
        found = Calibration(curves=curves, **values)
        if any(len(curve.removed) != found.layers - 1 for curve in curves):
            raise ValueError("a curve has another number of layers")
    except OSError as error:
        raise ValueError(f"the calibration {path} cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no calibration of the format {FORMAT}: {error}") from error
    return found


class _Observer:
    """A reducer that removes nothing and writes down the attention of every layer, or removes what ``alpha`` allows."""

    def __init__(self, alpha: float | None = None, totals: Sequence[tuple[float, float]] = ()) -> None:
        self._alpha = alpha
        self._given = totals
        self.totals: list[tuple[float, float]] = []
        self.removed: list[int] = []

    def __call__(self, stage: Stage, config: DuetConfig) -> Decision:
        visual = stage.state.visual
        own, cross = (mass[0, visual[0]] for mass in attention_masses(stage))
        keep = visual.clone()
        if self._alpha is None:
            self.totals.append((float(own.sum()), float(cross.sum())))
        else:
            whole = self._given[stage.layer - 1]
            spared = _spared(own, self._alpha, whole[0]) & _spared(cross, self._alpha, whole[1])
            keep[0, visual[0].nonzero()[spared, 0]] = False
        kept = int(keep.sum())
        self.removed += [0] * (stage.layer - 1 - len(self.removed)) + [stage.before[0] - kept]
        return Decision(keep, [kept])


def _spared(mass_N: Tensor, alpha: float, whole: float) -> Tensor:
    """Mark the longest run of smallest masses without which at least ``1 - alpha`` of ``whole`` is left."""
    order = torch.sort(mass_N, stable=True).indices
    left = mass_N.double().sum() - mass_N[order].double().cumsum(0)
    return torch.zeros_like(mass_N, dtype=torch.bool).scatter(0, order, left >= (1 - alpha) * whole)


class Calibrator:
    """Measures curves of a decoder, each ``alpha`` once.

    Args:
        decoder: the model without its head.
        samples: prompts, each as arguments of ``run_decoder``: ``inputs_embeds`` [1, L, D], ``visual_mask`` [1, L], and
            what else it needs. One without an image is left out.

    Raises:
        ValueError: no prompt has an image, or the decoder has a single layer.
    """

    def __init__(self, decoder: nn.Module, samples: Sequence[Mapping[str, Any]]) -> None:
        self._decoder: Any = decoder
        self._depth = len(self._decoder.layers)
        self._samples = [sample for sample in samples if bool(sample["visual_mask"].any())]
        if not self._samples or self._depth < 2:
            raise ValueError(f"{len(samples)} prompts, none with an image, or a single layer: nothing to calibrate")
        schedule = {layer: _ASK for layer in range(1, self._depth)}
        self._config = DuetConfig(stage1="none", stage2="fitprune", schedule=schedule, positions="original")
        self._totals = [self._run(sample, _Observer()).totals for sample in self._samples]
        self._curves: dict[float, Curve] = {}

    @torch.no_grad()
    def _run(self, sample: Mapping[str, Any], observer: _Observer) -> _Observer:
        run_decoder(self._decoder, **sample, config=self._config, reducer=observer)
        return observer

    def curve(self, alpha: float) -> Curve:
        """Return what ``alpha`` removes, averaged over the samples."""
        if alpha not in self._curves:
            sums = [0.0] * (self._depth - 1)
            for sample, totals in zip(self._samples, self._totals, strict=True):
                entering = int(sample["visual_mask"].sum())
                for layer, count in enumerate(self._run(sample, _Observer(alpha, totals)).removed):
                    sums[layer] += count / entering / len(self._samples)
            self._curves[alpha] = Curve(alpha, tuple(sums))
        return self._curves[alpha]

    def search(self, share: float) -> Curve:
        """Return the curve of the smallest ``alpha``, to ``WIDTH``, that keeps at most ``share`` on average."""
        low, high = 0.0, 1.0
        while high - low > WIDTH:
            middle = (low + high) / 2
            low, high = (middle, high) if self.curve(middle).average() > share else (low, middle)
        return self.curve(high)

    def result(self, about: Mapping[str, Any] | None = None) -> Calibration:
        """Return all curves that were measured."""
        shape = DecoderShape.from_config(self._decoder.config)
        curves = tuple(self._curves[alpha] for alpha in sorted(self._curves))
        return Calibration(self._depth, shape.width, shape.mlp_width, len(self._samples), curves, about or {})


def schedule_for(calibration: Calibration, patches: int, tokens: float) -> dict[int, float]:
    """Return the schedule that averages ``tokens`` of ``patches`` visual tokens, in whole tokens."""
    return _schedule([round(share * patches) for share in calibration.for_average(tokens / patches).left()], patches)


def published_schedule(calibration: Calibration, patches: int, cut: float) -> dict[int, float]:
    """Return the schedule that saves a share ``cut`` of the FLOPs, removing the floor of each layer's mean count."""
    counts = [patches]
    for share in calibration.for_flops(cut, patches).removed:
        counts.append(max(0, counts[-1] - math.floor(share * patches + 1e-6)))
    return _schedule(counts, patches)


def _schedule(counts: Sequence[int], patches: int) -> dict[int, float]:
    """Return the stages at which the count falls."""
    stages, previous = {}, patches
    for layer, count in enumerate(counts):
        if count < previous:
            stages[layer] = (count + 0.5) / patches if count else 0.0
        previous = count
    return stages
