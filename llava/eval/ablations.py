"""The configurations of the paper's ablations, by name. What varies is the paper's; values that it omits are ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from duet import DuetConfig
from duet.methods import METHODS, BudgetError, solve
from duet.stage1 import VISION_REDUCERS
from llava.eval.lines import Line
from llava.eval.plans import DEPTH, Geometry, Plan
from llava.eval.plots import against_point, bars

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12)
SPLIT_WIDTHS = (2, 4, 6, 8)
CONTEXTUAL_SHARES = (0.02, 0.05, 0.1, 0.17, 0.25, 0.4)
STAGES: tuple[int, ...] = (8, 16, 24)
DROPPED = (0.0, 0.25, 0.5, 0.75)
PDROP_BUDGET = 270

Planned = tuple[list[Plan], list[str]]
Planner = Callable[[Geometry, Sequence[int]], Planned]


@dataclass(frozen=True)
class Ablation:
    """One table or figure.

    Attributes:
        place: where the paper has it, and on which benchmarks.
        what: what is varied.
        budgets: wanted averages where the command names none; empty where budgets are not wanted.
        plan: gives the runs without the baseline, and what cannot be run and why.
        draw: draws the lines; returns False where matplotlib is not installed.
    """

    place: str
    what: str
    budgets: tuple[int, ...]
    plan: Planner
    draw: Callable[[Path, Sequence[Line]], bool]


def named_methods(labels: dict[str, str], geometry: Geometry, budgets: Sequence[int]) -> Planned:
    """Methods under the labels that a table gives them."""
    plans, refused = [], []
    for budget, (label, method) in product(budgets, labels.items()):
        try:
            plans.append(Plan(label, budget, solve(method, budget, geometry.patches, geometry.layers)))
        except BudgetError as error:
            refused.append(str(error))
    return plans, refused


def pyramiddrop_rows(geometry: Geometry, budgets: Sequence[int]) -> Planned:
    """Table 11: which text ranks in PyramidDrop, at its published ratios, so that budgets have no say."""
    schedule = METHODS["pyramiddrop"].schedule
    labels = {"PDrop": "last", "PDrop (S)": "salient", "PDrop (all)": "all"}
    configs = {
        label: DuetConfig(stage1="none", schedule=schedule, depth=DEPTH, queries=queries)
        for label, queries in labels.items()
    }
    average = {label: config.average_tokens(geometry.patches, geometry.layers) for label, config in configs.items()}
    return [Plan(label, round(average[label]), config) for label, config in configs.items()], []


def duet_at(geometry: Geometry, budget: int) -> DuetConfig:
    """DUET-VLM (C) at a budget."""
    return solve("duet", budget, geometry.patches, geometry.layers)


def widths(geometry: Geometry, budgets: Sequence[int]) -> Planned:
    """Figure 3: how many tokens a contextual token averages."""
    plans = [
        Plan("(C)", budget, replace(duet_at(geometry, budget), cluster_width=width), None, {"cluster width": width})
        for budget, width in product(budgets, WIDTHS)
    ]
    return plans, []


def splits(geometry: Geometry, budgets: Sequence[int]) -> Planned:
    """Figures 7 and 8: dominant against contextual tokens at a fixed sum, for several cluster widths."""
    plans, refused = [], []
    for budget in budgets:
        base = duet_at(geometry, budget)
        shares = {round(base.entering * share) for share in CONTEXTUAL_SHARES} | {base.contextual}
        for contextual, width in product(sorted(shares - {0}), SPLIT_WIDTHS):
            dominant = base.entering - contextual
            point = {"k1": dominant, "k2": contextual, "cluster width": width}
            if width * contextual > geometry.patches - dominant:
                rest = geometry.patches - dominant
                refused.append(f"k1 = {dominant}, k2 = {contextual} at width {width}: only {rest} patches are left")
                continue
            config = replace(base, dominant=dominant, contextual=contextual, cluster_width=width)
            plans.append(Plan("(C)", budget, config, None, point))
    return plans, refused


def stage_ratios(geometry: Geometry, budgets: Sequence[int]) -> Planned:
    """Figure 5: the share that each of three stages drops, and dropping everything at one of them; no stage 1."""
    plans: dict[tuple, Plan] = {}
    for dropped, emptied in product(DROPPED, (None, *STAGES)):
        kept = [(1 - dropped) ** stage if emptied is None or layer < emptied else 0.0
                for stage, layer in enumerate(STAGES, start=1)]  # fmt: skip
        schedule: dict[int, float] = dict(zip(STAGES, kept, strict=True))
        if all(ratio == 1.0 for ratio in kept):
            continue
        config = DuetConfig(stage1="none", schedule=schedule, depth=DEPTH, queries="all")
        shown = ", ".join(f"{ratio:.3g}" for ratio in kept)
        point = {"kept after layers 8, 16, 24": shown, "no token left after": emptied or "never"}
        plans.setdefault(tuple(kept), Plan(f"λ = {dropped:g}", 0, config, None, point))
    return list(plans.values()), []


def variations(geometry: Geometry, budgets: Sequence[int]) -> Planned:
    """Every combination of the choices that DUET's stage 1 declares, with DUET's stage 2."""
    plans, refused = [], []
    for budget in budgets:
        base = duet_at(geometry, budget)
        choices = {
            name: default if isinstance(default, tuple) else (False, True)
            for name, default in VISION_REDUCERS.options(base.stage1).items()
            if isinstance(default, tuple | bool)
        }
        for values in product(*choices.values()):
            point = dict(zip(choices, values, strict=True))
            try:
                plans.append(Plan("(C)", budget, replace(base, options={**base.options, **point}), None, point))
            except ValueError as error:
                refused.append(f"{point}: {error}")
    return plans, refused


def _tokens(line: Line) -> float:
    return line.mean("tokens") or 0.0


def _budget(line: Line) -> str:
    return f"{line.plan.budget:g} tokens"


def _width(line: Line) -> str:
    return f"cluster width {line.plan.point['cluster width']}"


_draw_widths = partial(
    against_point, axis_name="cluster width", place=lambda line: line.plan.point["cluster width"],
    panel=lambda line: "", curve=_budget,
)  # fmt: skip
_draw_splits = partial(
    against_point, axis_name="dominant tokens k1", place=lambda line: line.plan.point["k1"], panel=_budget, curve=_width
)
_draw_ratios = partial(
    against_point, axis_name="visual tokens per layer", place=_tokens, panel=lambda line: "",
    curve=lambda line: line.plan.label, crossed=lambda line: line.plan.point["no token left after"] != "never",
    note=lambda line: line.plan.point["kept after layers 8, 16, 24"],
)  # fmt: skip
_draw_variations = partial(
    against_point, axis_name="visual tokens per layer", place=_tokens, panel=lambda line: "",
    curve=lambda line: ", ".join(f"{name} {value}" for name, value in line.plan.point.items()) or line.plan.label,
)  # fmt: skip

_TABLE_7 = {"VZ": "visionzip", "VZ (C)": "local_cluster", "DV (V)": "duet-vanilla", "(C)": "duet"}
_TABLE_8 = {"(C)": "duet", "(C+all)": "duet-all", "(C+S)": "duet-salient"}
_THREE = (192, 128, 64)

ABLATIONS: dict[str, Ablation] = {
    "table7": Ablation("Table 7, six picture benchmarks", "local clustering on and off", _THREE,
                       partial(named_methods, _TABLE_7), bars),
    "table8": Ablation("Table 8, six picture benchmarks", "which text ranks", _THREE,
                       partial(named_methods, _TABLE_8), bars),
    "table11": Ablation("Table 11, TextVQA, POPE, ScienceQA, MME", "which text ranks in PyramidDrop", (),
                        pyramiddrop_rows, bars),
    "fig3": Ablation("Figure 3, TextVQA", "cluster width", _THREE, widths, _draw_widths),
    "fig5": Ablation("Figure 5, TextVQA", "share λ that each stage in the decoder drops, ranked by all text", (),
                     stage_ratios, _draw_ratios),
    "fig78": Ablation("Figures 7 and 8, TextVQA", "k1 against k2", (192, 128), splits, _draw_splits),
    "variations": Ablation("ours", "every choice that DUET's stage 1 declares", (64,), variations, _draw_variations),
}  # fmt: skip
