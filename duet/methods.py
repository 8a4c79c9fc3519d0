"""The methods of the comparison tables by name, with the free parameter of each solved for a budget.

A budget is the average number of visual tokens per decoder layer (``budget.average_tokens``), whatever a method's own
paper counts. Layers are written for 32 and rescaled, as presets are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from duet import budget
from duet.config import DuetConfig
from duet.presets import PRESETS
from duet.stage1 import VISION_REDUCERS
from duet.stage2 import LANGUAGE_REDUCERS

_DEPTH = 32
_CONTEXTUAL_SHARE = 5 / 32  # VisionZip: 162 + 30, 108 + 20, 54 + 10
TOLERANCE = 0.5  # tokens


class BudgetError(ValueError):
    """A method cannot reach a budget; the message says how near it comes."""


@dataclass(frozen=True)
class Method:
    """How one method spends a budget.

    Attributes:
        stage1: vision reducer, or ``"none"``.
        schedule: after how many of 32 layers it drops, with the keep ratio of the published setting.
        solve: which number is free: ``"entering"`` tokens, or the ``"ratios"`` of the schedule.
        options: further fields of ``DuetConfig``.
        source: where the setting is published.
        split: contextual tokens by the number that enters, where they are published; else VisionZip's share.
    """

    stage1: str
    schedule: Mapping[int, float]
    solve: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    split: Mapping[int, int] = field(default_factory=dict)


_DUET = {16: 0.5, 24: 0.0}
_PYRAMID = {8: 0.5, 16: 0.25, 24: 0.125}
_TABLE_12 = {row.entering: row.contextual for row in PRESETS["llava-1.5-7b"].values()}


def _vision(stage1: str, source: str) -> Method:
    return Method(stage1, {}, "entering", source)


METHODS: dict[str, Method] = {
    "duet": Method("local_cluster", _DUET, "entering", "DUET-VLM (C), Tables 1 and 12", split=_TABLE_12),
    "duet-all": Method("local_cluster", _DUET, "entering", "DUET-VLM (C+all), Table 8", {"queries": "all"}, _TABLE_12),
    "duet-salient": Method(
        "local_cluster", _DUET, "entering", "DUET-VLM (C+S), Table 8", {"queries": "salient"}, _TABLE_12
    ),
    "duet-vanilla": Method("visionzip", _DUET, "entering", "DUET-VLM without local clusters, Table 7"),
    "duet-release": Method(
        "local_cluster", _DUET, "entering", "the released code", {"variant": "release", "queries": "all"}, _TABLE_12
    ),
    "local_cluster": _vision("local_cluster", "DUET-VLM VZ(C), stage 1 alone"),
    "visionzip": _vision("visionzip", "VisionZip (arXiv 2412.04467)"),
    "fastervlm": _vision("fastervlm", "FasterVLM (arXiv 2412.01818)"),
    "hired": _vision("hired", "HiRED (arXiv 2408.10945)"),
    "prumerge": _vision("prumerge", "PruMerge (arXiv 2403.15388), fixed count"),
    "vispruner": _vision("vispruner", "VisPruner"),
    "divprune": _vision("divprune", "DivPrune (arXiv 2503.02175)"),
    "tome": _vision("tome", "ToMe (arXiv 2210.09461), in the tower"),
    "tome_post": _vision("tome_post", "ToMe (arXiv 2210.09461), after the tower"),
    "average_pool": _vision("average_pool", "baseline"),
    "downsample": _vision("downsample", "VTC-Bench (arXiv 2510.07143)"),
    "random": _vision("random", "baseline"),
    "pyramiddrop": Method("none", _PYRAMID, "ratios", "PyramidDrop (arXiv 2410.17247)"),
    "pyramiddrop-early": Method("none", {4: 0.5, 8: 0.25, 16: 0.125}, "ratios", "PyramidDrop with earlier stages"),
    "fastv": Method("none", {2: 0.5}, "ratios", "FastV (arXiv 2403.06764), K = 2", {"stage2": "fastv"}),
    "fastv-all": Method(
        "none", {1: 0.5}, "ratios", "FastV as SparseVLM's authors ran it", {"stage2": "fastv", "queries": "all"}
    ),
    "dart": Method("none", {2: 0.5}, "ratios", "DART (arXiv 2502.11494)", {"stage2": "dart"}),
    "random-llm": Method("none", {2: 0.5}, "ratios", "baseline", {"stage2": "random"}),
}


def check_pair(vision: str, language: str) -> None:
    """Refuse two reducers that cannot be combined; either may be ``"none"``.

    Raises:
        ValueError: one is unknown, or both are of one kind; the message says which reducers there are.
    """
    vision_names, language_names = VISION_REDUCERS.names(), LANGUAGE_REDUCERS.names()
    pair = f"{vision}+{language}"
    if vision == language == "none":
        raise ValueError("none+none reduces nothing; name a vision or a language reducer")
    if language in vision_names and language not in language_names:
        raise ValueError(
            f"{pair}: {language} is a vision reducer, and a pair has one of each, VISION+LANGUAGE; "
            f"language reducers: {', '.join(language_names)}"
        )
    if vision in language_names and vision not in vision_names:
        raise ValueError(f"{pair}: {vision} is a language reducer; write it second, for example none+{vision}")
    if vision != "none":
        VISION_REDUCERS.get(vision)
    if language != "none":
        LANGUAGE_REDUCERS.get(language)


def find(name: str) -> Method:
    """Return a method, or the combination of two, ``VISION+LANGUAGE``.

    Either half is an entry of ``METHODS`` of its kind, a reducer's name, or ``"none"``. A pair drops where its language
    half does (a reducer without an entry: where DUET does), and the number of tokens that enter is what a budget sets.

    Raises:
        ValueError: there is no such method, or the two cannot be combined.
    """
    if name in METHODS:
        return METHODS[name]
    if "+" not in name:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(sorted(METHODS))}, or VISION+LANGUAGE")
    first, second = name.rsplit("+", 1)
    vision, language = METHODS.get(first), METHODS.get(second)
    # An entry of the other kind, or of both kinds, cannot be a half; its name may still be a reducer's.
    vision = vision if vision is not None and not vision.schedule else Method(first, {}, "entering", first)
    if language is None or language.stage1 != "none":
        schedule = {} if second == "none" else _DUET
        language = Method("none", schedule, "ratios", second, {} if second == "none" else {"stage2": second})
    check_pair(vision.stage1, "none" if second == "none" else str(language.options.get("stage2", "text_guided")))
    if vision.stage1 == "none":
        return language
    options = {**vision.options, **language.options}
    return Method(vision.stage1, language.schedule, "entering", f"{vision.source}; {language.source}", options)


def solve(name: str, tokens: float, patches: int, num_layers: int, **overrides: Any) -> DuetConfig:
    """Return a method's configuration for a budget.

    Args:
        name: a key of ``METHODS``, or a pair (``find``).
        tokens: wanted average of visual tokens per layer, for one image.
        patches: patches of an image.
        num_layers: depth of the decoder.
        **overrides: fields of ``DuetConfig`` that do not touch the budget, for example ``seed=3``.

    Raises:
        BudgetError: the nearest average that the method reaches is more than half a token away.
        ValueError: unknown method.
    """
    method = find(name)
    # A drop after the first layers of 32 stays a drop after at least one layer of a shallower model.
    layers = {max(1, round(layer * num_layers / _DEPTH)): ratio for layer, ratio in method.schedule.items()}
    values = {"stage1": method.stage1, "schedule": layers, "depth": num_layers, **method.options}
    base = DuetConfig(**(values | overrides))
    solver: Callable[..., DuetConfig] = _solve_entering if method.solve == "entering" else _solve_ratios
    config = solver(base, tokens, patches, num_layers)
    if method.solve == "entering" and config.entering in method.split:
        contextual = method.split[config.entering]
        config = replace(config, dominant=config.entering - contextual, contextual=contextual)
    reached = config.average_tokens(patches, num_layers)
    if abs(reached - tokens) > TOLERANCE:
        raise BudgetError(
            f"{name} cannot average {tokens:g} of {patches} visual tokens over {num_layers} layers; the nearest is "
            f"{reached:g}, {abs(reached - tokens):.1f} tokens {'above' if reached > tokens else 'below'}"
        )
    return config


def _solve_entering(base: DuetConfig, tokens: float, patches: int, num_layers: int) -> DuetConfig:
    entering = min(budget.solve_entering(tokens, base.schedule, num_layers), patches)
    if entering == patches and not base.counts_class_token:
        return replace(base, dominant=patches, contextual=0)
    contextual = round(entering * _CONTEXTUAL_SHARE)
    return replace(base, dominant=entering - contextual, contextual=contextual)


def _solve_ratios(base: DuetConfig, tokens: float, patches: int, num_layers: int) -> DuetConfig:
    """Find the ratio ``r`` for which stage ``m`` keeps ``r ** m`` of the tokens, in whole tokens."""
    layers = sorted(base.schedule)
    weights = _weights(layers, num_layers)

    def schedule(counts: list[int]) -> dict[int, float]:
        return {layer: min(1.0, (n + 0.5) / patches) if n else 0.0 for layer, n in zip(layers, counts, strict=True)}

    def average(counts: list[int]) -> float:
        return budget.average_tokens(patches, schedule(counts), num_layers)

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        exact = sum(weight * middle**m for m, weight in enumerate(weights)) * patches
        low, high = (middle, high) if exact < tokens else (low, middle)
    counts = [math.floor(patches * low ** (m + 1) + 1e-6) for m in range(len(layers))]
    if abs(average(counts) - tokens) > TOLERANCE:  # floors cost too much: the first stage keeps more, if it may
        more = round((tokens - average(counts)) / weights[1])
        counts[0] = max(counts[1] if len(counts) > 1 else 0, min(patches, counts[0] + more))
    return replace(base, schedule=schedule(counts))


def _weights(layers: list[int], num_layers: int) -> list[float]:
    """Return the share of layers that each segment between drops has."""
    edges = [0, *layers, num_layers]
    return [(stop - start) / num_layers for start, stop in pairwise(edges)]
