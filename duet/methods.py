"""The methods of the comparison tables by name, with the free parameter of each solved for a budget.

A budget is the average number of visual tokens per decoder layer (``budget.average_tokens``), whatever a method's own
paper counts. Layers are written for 32 and rescaled, as presets are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from duet import solvers
from duet.config import DuetConfig
from duet.presets import PRESETS
from duet.solvers import PATCHES, TOLERANCE, BudgetError
from duet.stage1 import VISION_REDUCERS
from duet.stage2 import LANGUAGE_REDUCERS

__all__ = ["METHODS", "TOLERANCE", "BudgetError", "Method", "check_pair", "find", "solve"]
_DEPTH = 32


@dataclass(frozen=True)
class Method:
    """How one method spends a budget.

    Attributes:
        stage1: vision reducer, or ``"none"``.
        schedule: after how many of 32 layers it drops, with the keep ratio of the published setting.
        solve: which number is free: ``"entering"`` tokens; the ``"ratios"`` of the schedule; a factor on the published
            ``"lists"``; nothing, what is ``"published"`` holds; all stages, from a file (``"calibrated"``); or nothing,
            because stage 1 is ``"adaptive"``.
        options: further fields of ``DuetConfig``.
        source: where the setting is published.
        split: contextual tokens by the number that enters, where they are published; else VisionZip's share.
        published: what the authors set for a budget of 576 patches: the tokens that are left after each stage, reducer
            options, or the share of FLOPs to save.
    """

    stage1: str
    schedule: Mapping[int, float]
    solve: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    split: Mapping[int, int] = field(default_factory=dict)
    published: Mapping[int, Any] = field(default_factory=dict)

    @property
    def meets_budgets(self) -> bool:
        """Whether the true average is what was asked for; a setting as it was released has the average that it has."""
        return self.solve not in ("published", "adaptive") and not (self.solve == "calibrated" and self.published)


_DUET = {16: 0.5, 24: 0.0}
_PYRAMID = {8: 0.5, 16: 0.25, 24: 0.125}
_TABLE_12 = {row.entering: row.contextual for row in PRESETS["llava-1.5-7b"].values()}


# SparseVLM's counts after its three stages, recycled tokens included (its version 2.0 has none). As released the stages
# follow layers 3, 7 and 16 and are billed one layer early; one layer earlier the claimed averages are true.
_SPARSE_15 = {192: (309, 204, 113), 128: (312, 117, 39), 64: (82, 32, 18)}
_SPARSE_20 = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
_RANKS = {192: {"scale": 13.5, "bias": 0.0}, 128: {"scale": 9.0, "bias": 6.0}, 64: {"scale": 0.8, "bias": 0.0}}
_KEEP = {"positions": "original"}
_PATCH = {"positions": "patch"}


def _vision(stage1: str, source: str, options: Mapping[str, Any] | None = None) -> Method:
    return Method(stage1, {}, "entering", source, options or {})


def _listed(
    solve: str, source: str, layers: Sequence[int], published: Mapping[int, Sequence[int]], **fields: Any
) -> Method:
    return Method("none", solvers.stages(layers, published[192], PATCHES), solve, source, fields, published=published)


_ROWS: dict[str, Method] = {
    "duet": Method("local_cluster", _DUET, "entering", "DUET-VLM (C), Tables 1 and 12", split=_TABLE_12),
    "duet-all": Method("local_cluster", _DUET, "entering", "DUET-VLM (C+all), Table 8", {"queries": "all"}, _TABLE_12),
    "duet-salient": Method(
        "local_cluster", _DUET, "entering", "DUET-VLM (C+S), Table 8", {"queries": "salient"}, _TABLE_12
    ),
    "duet-raster": Method(
        "local_cluster", _DUET, "entering", "(C), and merged tokens stand where their centres were; ours",
        {"options": {"order": "raster"}}, _TABLE_12,
    ),
    "duet-patch": Method(
        "local_cluster", _DUET, "entering", "(C+all), and tokens keep the positions of their patches; ours",
        {"queries": "all", **_PATCH}, _TABLE_12,
    ),
    "duet-vanilla": Method("visionzip", _DUET, "entering", "DUET-VLM without local clusters, Table 7"),
    "duet-release": Method(
        "local_cluster", _DUET, "entering", "the released code", {"variant": "release", "queries": "all"}, _TABLE_12
    ),
    "local_cluster": _vision("local_cluster", "DUET-VLM VZ(C), stage 1 alone"),
    "visionzip": _vision("visionzip", "VisionZip (arXiv 2412.04467)"),
    "visionzip-patch": _vision("visionzip", "VisionZip, and tokens keep the positions of their patches; ours", _PATCH),
    "random-patch": _vision("random", "baseline, and tokens keep the positions of their patches", _PATCH),
    "fastervlm": _vision("fastervlm", "FasterVLM (arXiv 2412.01818)"),
    "hired": _vision("hired", "HiRED (arXiv 2408.10945)"),
    "prumerge": _vision("prumerge", "PruMerge (arXiv 2403.15388), fixed count"),
    "prumerge_plus": _vision("prumerge_plus", "PruMerge+ (arXiv 2403.15388), fixed count"),
    "prumerge_adaptive": Method("prumerge_adaptive", {}, "adaptive", "PruMerge, about 32 of 576 tokens"),
    "prumerge_plus_adaptive": Method("prumerge_plus_adaptive", {}, "adaptive", "PruMerge+, about 144 of 576 tokens"),
    "vispruner": _vision("vispruner", "VisPruner"),
    "cdpruner": _vision("cdpruner", "CDPruner (arXiv 2506.10967)"),
    "divprune": _vision("divprune", "DivPrune (arXiv 2503.02175)"),
    "tome": _vision("tome", "ToMe (arXiv 2210.09461), in the tower"),
    "tome_post": _vision("tome_post", "ToMe (arXiv 2210.09461), after the tower"),
    "average_pool": _vision("average_pool", "baseline"),
    "downsample": _vision("downsample", "VTC-Bench (arXiv 2510.07143)"),
    "random": _vision("random", "baseline"),
    "pyramiddrop": Method("none", _PYRAMID, "ratios", "PyramidDrop (arXiv 2410.17247)"),
    "pyramiddrop-early": Method("none", {4: 0.5, 8: 0.25, 16: 0.125}, "ratios", "PyramidDrop with earlier stages"),
    "pyramiddrop-earliest": Method("none", {2: 0.5, 8: 0.25, 16: 0.125}, "ratios", "PyramidDrop with earlier stages"),
    "fastv": Method("none", {2: 0.5}, "ratios", "FastV (arXiv 2403.06764), K = 2", {"stage2": "fastv", **_KEEP}),
    "fastv-all": _listed(
        "lists", "FastV as SparseVLM's authors ran it, K = 1, which comparison tables copy",
        (1,), {192: (180,), 128: (114,), 64: (48,)}, stage2="fastv", options={"rows": "every"}, **_KEEP,
    ),
    "fitprune": Method("none", {}, "calibrated", "FitPrune (arXiv 2409.10197)", {"stage2": "fitprune", **_KEEP}),
    "fitprune-release": Method(
        "none", {}, "calibrated", "FitPrune, by the share of FLOPs that it saves", {"stage2": "fitprune", **_KEEP},
        published={192: 0.7, 128: 0.8, 64: 0.9},
    ),
    "sparsevlm-1.0": Method(
        "none", {2: 0.5, 6: 0.25, 15: 0.125, 19: 0.0625}, "ratios",
        "SparseVLM 1.0 (arXiv 2410.04417), its stages with counts that a budget sets", {"stage2": "sparsevlm"},
    ),
    "sparsevlm-1.0-release": Method(
        "none", dict.fromkeys((3, 7, 16, 20), 0.999), "published", "SparseVLM 1.0, counts from a rank",
        {"stage2": "sparsevlm", "options": _RANKS[192]}, published=_RANKS,
    ),
    "sparsevlm-1.5": _listed("lists", "SparseVLM 1.5, stages where its averages are true", (2, 6, 15), _SPARSE_15,
        stage2="sparsevlm"),
    "sparsevlm-1.5-release": _listed("published", "SparseVLM 1.5", (3, 7, 16), _SPARSE_15, stage2="sparsevlm"),
    "sparsevlm-2.0": _listed("lists", "SparseVLM 2.0, stages where its averages are true", (2, 6, 15), _SPARSE_20,
        stage2="sparsevlm", options={"recycle": False, "plus": True}, **_KEEP),
    "sparsevlm-2.0-release": _listed("published", "SparseVLM 2.0", (3, 7, 16), _SPARSE_20,
        stage2="sparsevlm", options={"recycle": False, "plus": True, "heads": 14}, **_KEEP),
    "dart": Method("none", {2: 0.5}, "ratios", "DART (arXiv 2502.11494)", {"stage2": "dart", **_KEEP}),
    "dart-release": _listed("published", "DART, which counts what is left after its one stage", (2,),
        {192: (188,), 128: (124,), 64: (60,)}, stage2="dart", **_KEEP),
    "random-llm": Method("none", {2: 0.5}, "ratios", "baseline", {"stage2": "random", **_KEEP}),
}  # fmt: skip


def _language(method: Method) -> str:
    """Return the name of a method's language reducer, or ``"none"``."""
    drops = method.schedule or "stage2" in method.options
    return str(method.options.get("stage2", "text_guided")) if drops else "none"


def _available(method: Method) -> bool:
    """Return whether the method's reducers are there: a reducer's file may be absent, and then its rows are, too."""
    return method.stage1 in ("none", *VISION_REDUCERS.names()) and _language(method) in (
        "none", *LANGUAGE_REDUCERS.names(),
    )  # fmt: skip


METHODS: dict[str, Method] = {name: method for name, method in _ROWS.items() if _available(method)}


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
    check_pair(vision.stage1, _language(language))
    if vision.stage1 == "none":
        return language
    if language.solve == "calibrated":
        raise ValueError(
            f"{name}: the stages of {second} follow from a budget of its own, so that it cannot share one; give the "
            "stages by hand"
        )
    options = {**vision.options, **language.options}
    options["options"] = {**vision.options.get("options", {}), **language.options.get("options", {})}
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
        BudgetError: the nearest average that the method reaches is more than half a token away, or none can be set.
        ValueError: unknown method.
    """
    method = find(name)
    # A drop after the first layers of 32 stays a drop after at least one layer of a shallower model.
    layers = [max(1, round(layer * num_layers / _DEPTH)) for layer in method.schedule]
    schedule = dict(zip(layers, method.schedule.values(), strict=True))
    values = {"stage1": method.stage1, "schedule": schedule, "depth": num_layers, **method.options} | overrides
    values["options"] = {**method.options.get("options", {}), **overrides.get("options", {})}
    base = DuetConfig(**values)
    if base.adaptive:
        raise BudgetError(
            f"{name} finds the number of tokens of each image by itself, so that no budget can be set; run it with "
            f"stage1={base.stage1!r} and read its average from the ledger, or take a method with a fixed number"
        )
    config = _solve(method, base, tokens, patches, num_layers, layers)
    reached = config.average_tokens(patches, num_layers)
    if method.meets_budgets and abs(reached - tokens) > TOLERANCE:
        raise BudgetError(
            f"{name} cannot average {tokens:g} of {patches} visual tokens over {num_layers} layers; the nearest is "
            f"{reached:g}, {abs(reached - tokens):.1f} tokens {'above' if reached > tokens else 'below'}"
        )
    return config


def _solve(
    method: Method, base: DuetConfig, tokens: float, patches: int, num_layers: int, layers: Sequence[int]
) -> DuetConfig:
    if method.solve == "entering":
        return solvers.entering(base, tokens, patches, num_layers, method.split)
    if method.solve == "ratios":
        return solvers.ratios(base, tokens, patches, num_layers)
    if method.solve == "lists":
        return solvers.lists(base, tokens, patches, num_layers, layers, method.published)
    if method.solve == "published":
        return solvers.released(base, tokens, patches, layers, method.published)
    return solvers.calibrated(base, tokens, patches, num_layers, method.published)
