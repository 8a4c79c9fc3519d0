"""How a method's free number follows from a budget: what ``duet.methods`` calls for each row of its table.

A budget is the average number of visual tokens per decoder layer. Published numbers are for 576 patches and are scaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from duet import budget
from duet.calibrate import published_schedule, read_calibration, schedule_for
from duet.config import DuetConfig

PATCHES = 576  # of LLaVA-1.5, for which settings are published
TOLERANCE = 0.5  # tokens
_CONTEXTUAL_SHARE = 5 / 32  # VisionZip: 162 + 30, 108 + 20, 54 + 10
_SAME_SHARE = 0.01  # how near a budget's share of the patches must be to a published one's


class BudgetError(ValueError):
    """A method cannot be set to a budget; the message says how near it comes, or what it needs."""


def entering(
    base: DuetConfig, tokens: float, patches: int, num_layers: int, split: Mapping[int, int] | None = None
) -> DuetConfig:
    """Set how many tokens enter the decoder; ``split`` has the published contextual ones by the number that enters."""
    count = min(budget.solve_entering(tokens, base.schedule, num_layers), patches)
    if count == patches:
        return replace(base, dominant=patches, contextual=0)
    contextual = (split or {}).get(count, round(count * _CONTEXTUAL_SHARE))
    return replace(base, dominant=count - contextual, contextual=contextual)


def ratios(base: DuetConfig, tokens: float, patches: int, num_layers: int) -> DuetConfig:
    """Find the ratio ``r`` for which stage ``m`` keeps ``r ** m`` of the tokens, in whole tokens."""
    layers = sorted(base.schedule)
    weights = _weights(layers, num_layers)

    def average(counts: list[int]) -> float:
        return budget.average_tokens(patches, stages(layers, counts, patches), num_layers)

    ratio = _bisect(lambda r: sum(w * r**m for m, w in enumerate(weights)) * patches, tokens, 1.0)
    counts = [math.floor(patches * ratio ** (m + 1) + 1e-6) for m in range(len(layers))]
    if abs(average(counts) - tokens) > TOLERANCE:  # floors cost too much: the first stage keeps more, if it may
        more = round((tokens - average(counts)) / weights[1])
        counts[0] = max(counts[1] if len(counts) > 1 else 0, min(patches, counts[0] + more))
    return replace(base, schedule=stages(layers, counts, patches))


def lists(
    base: DuetConfig,
    tokens: float,
    patches: int,
    num_layers: int,
    layers: Sequence[int],
    published: Mapping[int, Sequence[int]],
) -> DuetConfig:
    """Take the published counts of the nearest budget where their true average fits, else scale them until it does.

    Args:
        layers: after which layers the counts hold; of several at one layer the last holds.
        published: counts after each of them by budget.
    """
    counts = _nearest_list(published, tokens, patches)
    config = replace(base, schedule=stages(layers, counts, patches))
    if abs(config.average_tokens(patches, num_layers) - tokens) <= TOLERANCE:
        return config
    places = dict(zip(layers, counts, strict=True))
    shape, weights = list(places.values()), _weights(list(places), num_layers)

    def scaled(factor: float) -> list[float]:
        return [min(patches, factor * count) for count in shape]

    def exact(factor: float) -> float:
        return weights[0] * patches + sum(w * n for w, n in zip(weights[1:], scaled(factor), strict=True))

    factor = _bisect(exact, tokens, patches / max(1, min(shape)))
    return replace(base, schedule=stages(list(places), [round(n) for n in scaled(factor)], patches))


def released(
    base: DuetConfig, tokens: float, patches: int, layers: Sequence[int], published: Mapping[int, Any]
) -> DuetConfig:
    """Take what was published for a budget, whatever its true average is: counts after each layer, or options.

    Raises:
        BudgetError: nothing was published for this share of the patches.
    """
    if isinstance(found := _published(published, tokens, patches), Mapping):
        options = {name: value * patches / PATCHES for name, value in found.items()}
        return replace(base, options={**base.options, **options})
    return replace(base, schedule=stages(layers, _nearest_list(published, tokens, patches), patches))


def calibrated(
    base: DuetConfig, tokens: float, patches: int, num_layers: int, published: Mapping[int, float]
) -> DuetConfig:
    """Make FitPrune's schedule from the calibration that the option of that name gives.

    Args:
        published: shares of the FLOPs that the authors save for a budget; empty to meet the budget instead.

    Raises:
        BudgetError: there is no calibration; the message says which command makes one.
        ValueError: it cannot be read, or is of another model.
    """
    path = base.option("calibration")
    if not path:
        raise BudgetError(
            "fitprune needs a calibration of the model, a file that `python -m llava.eval.calibrate --model-path MODEL "
            "--data-path QUESTIONS.json --image-folder FOLDER --out FILE` writes (duet.calibrate.Calibrator for other "
            "models); then give the option calibration=FILE (--reduction_options calibration=FILE)"
        )
    calibration = read_calibration(path)
    if calibration.layers != num_layers:
        raise ValueError(
            f"the calibration {path} is of a decoder with {calibration.layers} layers, not {num_layers}; make one of "
            "this model"
        )
    if published:
        schedule = published_schedule(calibration, patches, _published(published, tokens, patches))
    else:
        schedule = schedule_for(calibration, patches, tokens)
    options = {name: value for name, value in base.options.items() if name != "calibration"}  # the schedule says it all
    return replace(base, schedule=schedule, depth=num_layers, options=options)


def stages(layers: Sequence[int], counts: Sequence[int], patches: int) -> dict[int, float]:
    """Return the schedule that keeps these counts, each at most the one before it."""
    out, least = {}, patches
    for layer, count in zip(layers, counts, strict=True):
        least = min(least, count)
        out[layer] = min(1.0, (least + 0.5) / patches) if least else 0.0
    return out


def _nearest(published: Mapping[int, Any], tokens: float, patches: int) -> int:
    """Return the published budget whose share of the patches is nearest."""
    return min(published, key=lambda known: abs(known / PATCHES - tokens / patches))


def _nearest_list(published: Mapping[int, Sequence[int]], tokens: float, patches: int) -> list[int]:
    counts = published[_nearest(published, tokens, patches)]
    return [round(count * patches / PATCHES) for count in counts]


def _published(published: Mapping[int, Any], tokens: float, patches: int) -> Any:
    """Return what was published for a share of the patches."""
    nominal = _nearest(published, tokens, patches)
    if abs(nominal / PATCHES - tokens / patches) > _SAME_SHARE:
        known = ", ".join(str(n) for n in sorted(published, reverse=True))
        raise BudgetError(
            f"{tokens:g} of {patches} visual tokens: settings are published for {known} of {PATCHES} only"
        )
    return published[nominal]


def _bisect(average: Any, wanted: float, high: float) -> float:
    """Return where a rising function of [0, ``high``] reaches ``wanted``, or the nearer end."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if average(middle) < wanted else (low, middle)
    return low


def _weights(layers: Sequence[int], num_layers: int) -> list[float]:
    """Return the share of layers that each segment between drops has."""
    edges = [0, *layers, num_layers]
    return [(stop - start) / num_layers for start, stop in pairwise(edges)]
