"""What a comparison runs: configurations with a label and a budget, all of them known before any weights are loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from duet import DuetConfig
from duet.methods import METHODS, BudgetError, Method, find, solve
from duet.stage1 import VISION_REDUCERS
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import inspect_checkpoint, model_class
from llava.model.hf_layout import config_from_hf, is_hf_llava
from llava.model.loading import make_config
from llava.model.multimodal_encoder.clip_encoder import tower_geometry
from llava.reduction import preset_for

BASELINE = "full"
DEPTH = 32  # of the decoder that published layers are counted in
_NAMED_STAGES = 4
_DRAWING = "random"  # the reducers of both kinds whose choice depends on the seed


@dataclass(frozen=True)
class Geometry:
    """What a plan has to fit, read from a checkpoint's configuration.

    Attributes:
        patches: of one picture.
        layers: of the decoder.
        reduction: what the checkpoint itself names, or None.
        preset: whose rows of the paper `--duet_tokens` names.
    """

    patches: int
    layers: int
    reduction: DuetConfig | None = None
    preset: str = "llava-1.5-7b"


def read_geometry(path: str, base: str | None) -> Geometry:
    """Read a model's geometry without its weights.

    Args:
        path: checkpoint folder or hub name.
        base: base model of a LoRA or projector folder.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it has no vision tower, or is of an unknown kind.
    """
    found = inspect_checkpoint(path)
    below = base or (found.adapter or {}).get("base_model_name_or_path")
    if not found.multimodal and below:
        found = inspect_checkpoint(below)
    if found.config is None or not found.multimodal:
        raise ValueError(f"{path} is a plain language model; it cannot look at pictures")
    raw, kind = found.config, model_class(found.config, get_model_name_from_path(path)).config_class
    config: Any = make_config(kind, config_from_hf(raw, path, kind.model_type) if is_hf_llava(raw) else raw, {})
    config._name_or_path = found.path
    tower: Any = tower_geometry(config.mm_vision_tower, config)
    side = tower.image_size // tower.patch_size
    return Geometry(side * side, config.num_hidden_layers, DuetConfig.from_model_config(config), preset_for(config))


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        label: name of its line in the table.
        budget: wanted visual tokens, which names its block of the table; 0 for the run without reduction.
        config: the reduction, None for none.
        seed: where the method draws at random.
        point: values of what an ablation varies, by name.
        exact: whether its true average is the budget; a setting as its authors released it has the one that it has.
    """

    label: str
    budget: float
    config: DuetConfig | None
    seed: int | None = None
    point: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True

    @property
    def line(self) -> tuple:
        """What tells its line from others; runs that differ in seed or model alone share one."""
        return self.label, self.budget, *sorted(self.point.items())

    @property
    def name(self) -> str:
        """Name of the run's folder: from the configuration alone, so that all comparisons share their runs."""
        return BASELINE if self.config is None else run_name(self.config)


def run_name(config: DuetConfig) -> str:
    """A readable name of a configuration, and a digest of all of it."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    parts = [] if config.stage1 == "none" else [config.stage1]
    if parts and not config.adaptive:
        parts.append(f"{config.dominant}+{config.contextual}")
    if config.schedule:
        parts.append(config.stage2)
        stages = [f"{layer}x{ratio:.3g}" for layer, ratio in config.schedule.items()]
        # FitPrune has a stage after every layer, and a folder's name ends at 255 characters.
        parts += stages if len(stages) <= _NAMED_STAGES else [*stages[:_NAMED_STAGES], f"{len(stages)}stages"]
    return "-".join([*parts, digest])


def baseline() -> Plan:
    """The run without reduction, which every table has."""
    return Plan(BASELINE, 0, None)


def choose_methods(names: str) -> tuple[list[str], bool]:
    """Read a comma list of methods and pairs.

    Returns:
        The methods in the order of `duet.methods.METHODS`, pairs at the end; and whether `all` was among them, so that
        a method that cannot run is to be named rather than to stop everything.

    Raises:
        ValueError: one is unknown, or cannot be.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in METHODS and name != "all" and "+" not in name]
    if unknown or not wanted:
        raise ValueError(
            f"--methods: unknown {', '.join(unknown) or 'empty list'}; known: all, {', '.join(METHODS)}, and any "
            "pair VISION+LANGUAGE"
        )
    for name in wanted:
        if name != "all":
            find(name)
    named = [name for name in METHODS if "all" in wanted or name in wanted]
    return named + [name for name in wanted if name not in METHODS and name != "all"], "all" in wanted


def numbers(flag: str, text: str, least: int = 0) -> list[int]:
    """Read a comma list of whole numbers.

    Raises:
        ValueError: naming the flag.
    """
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"--{flag} {text}: expected whole numbers, separated by commas") from error
    if not found or min(found) < least:
        raise ValueError(f"--{flag} {text}: expected numbers of at least {least}")
    return list(dict.fromkeys(found))


def draws(config: DuetConfig) -> bool:
    """Whether a configuration chooses at random."""
    return config.stage1 == _DRAWING or (config.stage2 == _DRAWING and bool(config.schedule))


def with_seeds(plan: Plan, seeds: Sequence[int]) -> list[Plan]:
    """The plan, or one per seed where its configuration chooses at random."""
    if plan.config is None or not draws(plan.config):
        return [plan]
    return [replace(plan, config=replace(plan.config, seed=seed), seed=seed) for seed in seeds]


def calibration_option(method: Method, calibration: str | None) -> dict[str, Any]:
    """Overrides that hand a calibration file to a method that needs one."""
    if calibration is None or method.solve != "calibrated":
        return {}
    return {"options": {"calibration": calibration}}


def is_adaptive(method: Method) -> bool:
    """Whether a method finds the number of tokens picture by picture, so that no budget can be set."""
    return method.stage1 != "none" and getattr(VISION_REDUCERS.get(method.stage1), "adaptive", False)


def adaptive_config(name: str) -> DuetConfig:
    """The configuration of a method that takes no budget."""
    method = find(name)
    return DuetConfig(stage1=method.stage1, **{"schedule": method.schedule, "depth": DEPTH, **method.options})


def solved_plans(
    methods: Sequence[str],
    budgets: Sequence[int],
    seeds: Sequence[int],
    geometry: Geometry,
    tolerant: bool = False,
    calibration: str | None = None,
) -> tuple[list[Plan], list[str]]:
    """Solve every method's budget.

    Args:
        methods: names and pairs.
        budgets: wanted averages.
        seeds: for methods that choose at random.
        geometry: of the model.
        tolerant: name what cannot be configured instead of raising.
        calibration: a file, for methods that need one.

    Returns:
        The runs, the baseline first, and what cannot be run and why.

    Raises:
        ValueError: a budget is above the patches; or a method cannot be configured (budgets that a method cannot reach
            are named in any case).
    """
    if max(budgets, default=0) > geometry.patches:
        raise ValueError(
            f"--budgets {max(budgets)}: a picture has {geometry.patches} visual tokens, so no method can keep more; "
            f"ask for at most {geometry.patches}"
        )
    own = [name for name in methods if is_adaptive(find(name))]
    plans, refused = [baseline(), *(Plan(name, 0, adaptive_config(name), exact=False) for name in own)], []
    for budget, name in product(budgets, methods):
        method = find(name)
        if name in own:
            continue
        given = calibration_option(method, calibration)
        try:
            config = solve(name, budget, geometry.patches, geometry.layers, **given)
            config.validate(geometry.patches, geometry.layers)
        except (ValueError, OSError, ImportError) as error:
            if not tolerant and (not isinstance(error, BudgetError) or (method.solve == "calibrated" and not given)):
                raise
            reason = str(error) if str(error).startswith(name) else f"{name} at {budget}: {error}"
            refused += [] if reason in refused else [reason]
        else:
            plans += with_seeds(Plan(name, budget, config, exact=method.meets_budgets), seeds)
    return plans, refused
