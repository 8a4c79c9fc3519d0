"""What a plan decides by itself: how a global batch is divided, which precision a run has, how deep its base is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.train import runtime
from llava.train.recipes import StageRecipe

PLAN_FILE = "plan.json"
"""In an output folder: the settings that its run was begun with."""
PRECISIONS = {
    "bf16": {"bf16": True},
    "fp16": {"bf16": False, "fp16": True},
    "fp32": {"bf16": False},
}
DEPTH_13B = 40


def split_batch(global_batch: int, per_device: int, world: int) -> tuple[int, int]:
    """Divide a global batch over ranks.

    Returns:
        Records per device and pass (at most `per_device`), and accumulation steps; their product with `world` is the
        global batch.

    Raises:
        ValueError: the ranks cannot share it equally.
    """
    if global_batch % world:
        raise ValueError(f"a global batch of {global_batch} cannot be shared equally by {world} ranks")
    share = global_batch // world
    fitting = next(size for size in range(min(per_device, share), 0, -1) if share % size == 0)
    return fitting, share // fitting


def near_batches(global_batch: int, world: int) -> list[int]:
    """The batches next to a global batch that ranks can share equally, the nearest first (the smaller of two)."""
    below = global_batch // world * world
    return sorted((size for size in (below, below + world) if size), key=lambda size: abs(size - global_batch))


def near_worlds(global_batch: int, world: int) -> list[int]:
    """The numbers of ranks next to `world` that share a global batch equally, fewer first."""
    fewer = next((count for count in range(world, 0, -1) if global_batch % count == 0), None)
    more = next((count for count in range(world, global_batch + 1) if global_batch % count == 0), None)
    return [count for count in (fewer, more) if count]


def divide_batch(
    recipe: StageRecipe, world: int, env: Mapping[str, str], overrides: Mapping[str, Any]
) -> tuple[int, int]:
    """Records per device and pass, and passes, of one stage; the recipe's global batch is kept.

    Only what names another batch changes it: the stage's variable (`FINETUNE_BATCH=120`, or `nearest`), or both
    training flags together, which say everything.

    Args:
        recipe: of the stage.
        world: number of ranks.
        env: environment variables.
        overrides: training flags of the user.

    Raises:
        ValueError: the batch cannot be kept; the nearest settings that can are named.
    """
    exact = positive(overrides, "per_device_train_batch_size")
    passes = positive(overrides, "gradient_accumulation_steps")
    if exact and passes:
        return exact, passes
    variable = f"{recipe.kind.upper()}_BATCH"
    wanted, total = (env.get(variable) or "").strip(), recipe.global_batch
    if wanted == "nearest":
        total = near_batches(total, world)[0]
    elif wanted:
        total = positive({variable: wanted}, variable) or total
    most = exact or positive(env, "PER_DEVICE_BATCH") or recipe.per_device
    if total % world:
        batches = " or ".join(map(str, near_batches(total, world)))
        worlds = " or ".join(map(str, near_worlds(total, world)))
        raise ValueError(
            f"{recipe.kind}: a global batch of {total} cannot be shared equally by {world} ranks. Use {worlds} ranks "
            f"(NUM_DEVICES, nodes), or accept another batch: {variable}={batches}, or {variable}=nearest"
        )
    share = total // world
    fixed = exact or passes
    if fixed is None:
        return split_batch(total, most, world)
    if share % fixed or (passes and share // passes > most):
        name = "per_device_train_batch_size" if exact else "gradient_accumulation_steps"
        fits = [size for size in range(1, share + 1) if share % size == 0 and (exact or share // size <= most)]
        raise ValueError(
            f"--{name} {fixed}: it does not keep {recipe.kind}'s global batch of {total}, {share} records for each of "
            f"{world} ranks. Use one of {', '.join(map(str, fits))}; or accept another batch: {variable}=NUMBER, or "
            "give --per_device_train_batch_size and --gradient_accumulation_steps together"
        )
    return (exact, share // exact) if exact else (share // fixed, fixed)


def positive(values: Mapping[str, Any], name: str) -> int | None:
    """A whole number, at least 1; None where it is not given.

    Raises:
        ValueError: it is something else.
    """
    text = str(values.get(name) or "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name}={text}: expected a whole number, at least 1")
    return int(text)


def precision(
    env: Mapping[str, str], overrides: Mapping[str, Any], accelerator: bool, folders: Sequence[Path]
) -> dict[str, Any]:
    """The precision flags of a run: one precision for all its stages, and the same at every start.

    Training flags win, then PRECISION, then bf16 on an accelerator. On a CPU a run keeps what its folders were begun
    with; a new one gets bf16 where the CPU has instructions for it.

    Args:
        env: environment variables.
        overrides: training flags of the user.
        accelerator: whether ranks run on accelerators.
        folders: output folders of the stages, in order.

    Raises:
        ValueError: PRECISION has a value that cannot be used.
    """
    if "fp16" in overrides or "bf16" in overrides:
        return {}
    named = env.get("PRECISION")
    if named and named not in PRECISIONS:
        raise ValueError(f"PRECISION={named}: expected one of {', '.join(PRECISIONS)}")
    if named:
        return dict(PRECISIONS[named])
    if accelerator:
        return {"bf16": True}
    begun = next(filter(None, map(begun_precision, folders)), None)
    return begun or {"bf16": runtime.cpu_has_bf16()}


def begun_precision(folder: Path) -> dict[str, Any] | None:
    """The precision flags that an output folder was begun with; None for a new folder."""
    path = folder / PLAN_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the launcher says what is wrong with the folder
    if not isinstance(settings, dict) or "bf16" not in settings:
        return None
    return {name: settings[name] == "True" for name in ("bf16", "fp16") if name in settings}


def cached_file(name: str, file: str) -> Path | None:
    """A file of a hub model that is already on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def is_cached(name: str) -> bool:
    """True when a hub model is already on this machine."""
    return cached_file(name, "config.json") is not None


def base_layers(name: str) -> int | None:
    """How many layers a base model has, by its configuration where that is here, else by `13b` in its name.

    Args:
        name: folder or hub name.

    Returns:
        The depth, or None when it is not known yet.
    """
    folder = Path(name)
    path = folder / "config.json" if folder.is_dir() else cached_file(name, "config.json")
    if path is not None and path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None  # loading the model reports it
        inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
        depth = (inner or {}).get("num_hidden_layers") or config.get("num_hidden_layers")
        return depth if isinstance(depth, int) else None
    return DEPTH_13B if re.search(r"(?<![0-9.])13b(?![a-z0-9])", folder.name, re.IGNORECASE) else None
