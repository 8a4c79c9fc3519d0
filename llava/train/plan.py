"""What a script is going to do: recipe, model, data, device, ZeRO stage, token budget, steps, and what is missing.

`python -m llava.train.plan JOB [--plan] [-- FLAGS]`; the shell scripts are one line each on top of it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from duet import DuetConfig
from duet.errors import main_guard
from duet.presets import PRESETS
from llava.reduction import ReductionArguments, preset_for
from llava.train import runtime
from llava.train.argv import split_flags
from llava.train.choices import base_layers, divide_batch, is_cached, precision
from llava.train.devices import Devices, find_devices
from llava.train.recipes import COMMON, JOBS, RECIPES, Job, Recipe, StageRecipe
from llava.train.records import load_records

ENVIRONMENT = {
    "RECIPE": "tiny, 7b or 13b (default: tiny without an accelerator; with one 7b, or 13b where BASE_MODEL is one)",
    "BASE_MODEL": "base language model, folder or hub name",
    "VISION_TOWER": "vision tower, folder or hub name",
    "PRETRAIN_DATA": "stage 1: annotation file",
    "PRETRAIN_IMAGES": "stage 1: image folder",
    "FINETUNE_DATA": "stage 2: annotation file",
    "FINETUNE_IMAGES": "stage 2: image folder",
    "OUTPUT_ROOT": "prefix of the output folders",
    "PROJECTOR": "stage 2: projector to start from (default: stage 1 of the same script)",
    "DUET_TOKENS": "average visual tokens of the duet scripts: 192, 128 or 64 (default 192)",
    "NUM_DEVICES": "ranks per node (default: all accelerators; 2 on a CPU)",
    "HOSTFILE": "several nodes through ssh: a line such as `node1 slots=8` for each",
    "LAUNCHER": "deepspeed, torchrun or python (default: deepspeed; torchrun in a SLURM job of several nodes)",
    "DEEPSPEED_CONFIG": "DeepSpeed JSON for both stages, or none",
    "MASTER_ADDR": "several nodes: where the ranks meet (default: the first node)",
    "MASTER_PORT": "TCP port of the ranks' meeting point (default: a free one)",
    "PER_DEVICE_BATCH": "records per device and pass, at most",
    "PRETRAIN_BATCH": "stage 1: records per optimizer step; `nearest`: what the ranks can do nearest to the recipe's",
    "FINETUNE_BATCH": "stage 2: the same",
    "PRECISION": "bf16, fp16 or fp32, for both stages (default: bf16; on a CPU only where it multiplies bf16 itself)",
    "SEED": "seed of everything random (default 42)",
    "REPORT_TO": "wandb or none (default none; the JSONL log is always written)",
    "DUET_PYTHON": "Python interpreter to use instead of making .venv",
}
REDUCTION_FLAGS = frozenset(ReductionArguments.__dataclass_fields__) | {"dominant_num", "context_num", "contextual_num"}
BOTH_STAGES = REDUCTION_FLAGS | {"bf16", "fp16", "model_name_or_path", "vision_tower"}
"""Flags that hold for both stages."""
COUNTABLE_BYTES = 200_000_000


@dataclass
class Missing:
    """Something that the run needs and that is not here."""

    what: str
    remedy: str
    fatal: bool = True


@dataclass
class Stage:
    """One resolved training stage: its flags and where they lead."""

    recipe: StageRecipe
    flags: dict[str, Any]
    output: Path
    world: int
    per_device: int
    accumulation: int
    records: int

    @property
    def global_batch(self) -> int:
        """Records per optimizer step."""
        return self.per_device * self.accumulation * self.world

    @property
    def steps(self) -> int:
        """Expected optimizer steps."""
        limit = int(self.flags.get("max_steps", -1))
        if limit > 0:
            return limit
        epochs = float(self.flags.get("num_train_epochs", 1))
        return int(-(-self.records * epochs // self.global_batch))

    def arguments(self) -> list[str]:
        """The command line of `llava.train.train`."""
        return [item for name, value in self.flags.items() for item in (f"--{name}", str(value))]


@dataclass
class Plan:
    """Everything that one script does."""

    job: Job
    recipe: Recipe
    devices: Devices
    stages: list[Stage]
    reduction: DuetConfig | None
    tokens: str | None = None
    missing: list[Missing] = field(default_factory=list)

    @property
    def can_run(self) -> bool:
        """False when something that is needed is missing."""
        return not any(item.fatal for item in self.missing)

    @property
    def uses_tiny_world(self) -> bool:
        """Whether data of the tiny world is generated where it is absent."""
        return self.recipe.name == "tiny"

    def describe(self) -> str:
        """The plan in words."""
        from llava.train.plan_text import describe

        return describe(self)


def count_records(path: Path, expected: int) -> int:
    """Records of an annotation file; the recipe's number for files that are missing or too large to read for a plan."""
    if not path.is_file() or path.stat().st_size > COUNTABLE_BYTES or path.suffix in (".yaml", ".yml"):
        return expected
    try:
        return len(load_records([str(path)])[0])
    except (ValueError, OSError):
        return expected  # training itself reports a broken file, with the place


def parse_overrides(argv: Sequence[str]) -> dict[str, str]:
    """Read `--flag value` pairs; a flag without a value means True.

    Raises:
        ValueError: a word that belongs to no flag.
    """
    flags: dict[str, str] = {}
    for name, *values in split_flags(list(argv)):
        if not name.startswith("--"):
            raise ValueError(f"{name!r} is not a flag: training flags follow `--` and look like --learning_rate 1e-5")
        flags[name.removeprefix("--")] = " ".join(values) if values else "True"
    return flags


def resolve(
    job_name: str, env: Mapping[str, str] | None = None, overrides: Sequence[str] = (), accelerators: int | None = None
) -> Plan:
    """Work out what a script does.

    Args:
        job_name: one of `recipes.JOBS` or `hf_recipes.JOBS`.
        env: environment variables; default: the process's.
        overrides: training flags; reduction flags hold for both stages, the others for the last one.
        accelerators: how many devices to assume; default: what torch sees.

    Raises:
        ValueError: an unknown job or recipe, or a value that cannot be used.
    """
    from llava.train import hf_recipes

    env = os.environ if env is None else env
    if job_name in hf_recipes.JOBS:
        from llava.train.hf_plan import resolve_hf

        return resolve_hf(job_name, env, overrides, accelerators)
    if job_name not in JOBS:
        raise ValueError(f"unknown job {job_name!r}: expected one of {', '.join([*JOBS, *hf_recipes.JOBS])}")
    job, devices = JOBS[job_name], find_devices(env, accelerators)
    flags = parse_overrides(overrides)
    recipe = choose_recipe(env, devices.accelerator, flags.get("model_name_or_path") or env.get("BASE_MODEL"))
    reducing = {key: value for key, value in flags.items() if key in REDUCTION_FLAGS}
    preset = preset_for(SimpleNamespace(image_aspect_ratio=flags.get("image_aspect_ratio")))
    if job.reduced and not reducing:
        reducing = {"duet_tokens": env.get("DUET_TOKENS") or str(max(PRESETS[preset]))}
    shared = {key: value for key, value in flags.items() if key in BOTH_STAGES} | reducing
    plan = Plan(job, recipe, devices, [], read_reduction(reducing, preset), tokens=reducing.get("duet_tokens"))
    folders = [output_folder(plan, kind, env) for kind in job.stages]
    if job.bits == 16 or devices.accelerator or env.get("PRECISION"):
        shared = precision(env, shared, devices.accelerator, folders) | shared
    for kind in job.stages:
        stage = resolve_stage(plan, getattr(recipe, kind), env, shared | (flags if kind == job.last else {}))
        if kind == "finetune":
            start_from_projector(plan, stage, env)
        plan.stages.append(stage)
    if len(plan.stages) == 2 and env.get("PROJECTOR"):
        plan.stages.pop(0)
    plan.missing = find_missing(plan)
    return plan


def choose_recipe(env: Mapping[str, str], accelerator: bool, base: str | None) -> Recipe:
    """The recipe that RECIPE names, or the one that suits the devices and the size of the base model.

    A base of another depth than the recipe's own is planned as deep as it is, and gets folders of its own.

    Raises:
        ValueError: an unknown recipe, or one for a base of another size.
    """
    layers = base_layers(base) if base else None
    fitting = next((recipe.name for recipe in RECIPES.values() if recipe.layers == layers), None)
    usual = "13b" if fitting == "13b" else "7b"
    name = env.get("RECIPE") or (usual if accelerator else "tiny")
    if name not in RECIPES:
        raise ValueError(f"RECIPE={name}: expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if layers in (None, recipe.layers):
        return recipe
    if name != "tiny" and fitting not in (None, "tiny"):
        raise ValueError(f"RECIPE={name}, but {base} has {layers} layers and not {recipe.layers}: use RECIPE={fitting}")
    return replace(recipe, layers=layers, output=f"{recipe.output}-{Path(str(base)).name}")


def read_reduction(flags: Mapping[str, str], preset: str = "llava-1.5-7b") -> DuetConfig | None:
    """The reduction that the flags describe, a budget being one of `preset`'s; None for none."""
    import argparse

    parser = argparse.ArgumentParser()
    ReductionArguments.add_arguments(parser)
    parsed = parser.parse_args([item for name, value in flags.items() for item in (f"--{name}", value)])
    return ReductionArguments.from_namespace(parsed).to_config(None, preset)


def output_folder(plan: Plan, kind: str, env: Mapping[str, str]) -> Path:
    """Folder of one stage: prefix, `duet` where tokens are reduced, the stage, and how it is trained."""
    parts = [env.get("OUTPUT_ROOT") or plan.recipe.output]
    if plan.job.reduced:
        # Budgets other than the default get folders of their own, so that trying one does not meet another's output.
        parts.append("duet" if plan.tokens in (None, "192") else f"duet{plan.tokens}")
    parts.append(kind)
    if kind == "finetune" and plan.job.lora:
        parts.append("qlora" if plan.job.bits == 4 else "lora")
    return Path("-".join(parts))


def resolve_stage(plan: Plan, recipe: StageRecipe, env: Mapping[str, str], overrides: Mapping[str, str]) -> Stage:
    """Put the flags of one stage together: recipe, job, environment, then what the user gave."""
    devices, job, prefix = plan.devices, plan.job, recipe.kind.upper()
    flags: dict[str, Any] = {
        "model_name_or_path": env.get("BASE_MODEL") or plan.recipe.model,
        "vision_tower": env.get("VISION_TOWER") or plan.recipe.tower,
        "data_path": env.get(f"{prefix}_DATA") or recipe.data,
        "image_folder": env.get(f"{prefix}_IMAGES") or recipe.images,
        "output_dir": output_folder(plan, recipe.kind, env),
        **COMMON,
        **recipe.flags,
        "seed": env.get("SEED") or 42,
        "report_to": env.get("REPORT_TO") or "none",
    }
    if devices.accelerator:
        flags["tf32"] = runtime.may_have_tf32()
    if job.lora and recipe.kind == "finetune":
        flags |= {"learning_rate": plan.recipe.lora_rate, **plan.recipe.lora}
        if job.bits != 16:
            flags["bits"] = job.bits
    flags |= zero_flag(plan, recipe, env)
    return finish_stage(recipe, flags, devices.world, env, overrides)


def finish_stage(
    recipe: StageRecipe, flags: dict[str, Any], world: int, env: Mapping[str, str], overrides: Mapping[str, Any]
) -> Stage:
    """Divide the global batch among the ranks, and let what the user gave win."""
    per_device, accumulation = divide_batch(recipe, world, env, overrides)
    divided = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    flags = flags | divided | dict(overrides)
    records = count_records(Path(str(flags["data_path"])), recipe.records)
    return Stage(recipe, flags, Path(str(flags["output_dir"])), world, per_device, accumulation, records)


def zero_flag(plan: Plan, recipe: StageRecipe, env: Mapping[str, str]) -> dict[str, str]:
    """The `--deepspeed` flag. Quantised weights cannot be partitioned, so QLoRA uses ZeRO-2."""
    chosen = env.get("DEEPSPEED_CONFIG")
    if chosen == "none" or (plan.devices.launcher == "python" and not chosen):
        return {}
    quantised = plan.job.bits != 16 and recipe.kind == "finetune"
    return {"deepspeed": chosen or f"scripts/zero{2 if quantised else recipe.zero}.json"}


def start_from_projector(plan: Plan, stage: Stage, env: Mapping[str, str]) -> None:
    """Let stage 2 start from the projector of stage 1, unless the flags say otherwise."""
    if "pretrain_mm_mlp_adapter" not in stage.flags:
        first = plan.stages[0].output
        stage.flags["pretrain_mm_mlp_adapter"] = env.get("PROJECTOR") or first / "mm_projector.bin"


def find_missing(plan: Plan) -> list[Missing]:
    """Everything that is not here yet, with where to put it."""
    missing: list[Missing] = []
    tiny = plan.recipe.name == "tiny"
    for flag, variable in (("model_name_or_path", "BASE_MODEL"), ("vision_tower", "VISION_TOWER")):
        name = str(plan.stages[-1].flags[flag])
        if Path(name).is_dir():
            continue
        local = name.count("/") > 1 or name.startswith((".", "/"))
        if local:
            missing.append(Missing(f"weights {name}", f"put the model folder there, or set {variable}"))
        elif not is_cached(name):
            remedy = f"it is fetched from the Hugging Face hub; without access, copy it to a folder and set {variable}"
            missing.append(Missing(f"weights {name}", remedy, fatal=False))
    for stage in plan.stages:
        kind = stage.recipe.kind.upper()
        for flag, variable in (("data_path", f"{kind}_DATA"), ("image_folder", f"{kind}_IMAGES")):
            path = Path(str(stage.flags[flag]))
            generated = tiny and str(path) in (stage.recipe.data, stage.recipe.images)
            if not path.exists() and not generated:
                missing.append(Missing(f"{flag} {path}", f"put it there (docs/training.md), or set {variable}"))
        adapter = stage.flags.get("pretrain_mm_mlp_adapter")
        made_here = any(Path(str(adapter)).parent == other.output for other in plan.stages)
        if adapter and not made_here and not Path(str(adapter)).exists():
            missing.append(Missing(f"projector {adapter}", "run the pretrain script first, or set PROJECTOR"))
    return missing + missing_packages(plan) + missing_programs(plan) + without_resuming(plan)


def without_resuming(plan: Plan) -> list[Missing]:
    """A note where checkpoints will not do for going on after an interruption."""
    if not any(str(stage.flags.get("save_only_model")) == "True" for stage in plan.stages):
        return []
    return [Missing("save_only_model", "checkpoints hold weights only; an interrupted run cannot go on", fatal=False)]


def missing_packages(plan: Plan) -> list[Missing]:
    """Python packages that the plan needs and this interpreter lacks."""
    needed = {"torch", "transformers", "accelerate"}
    if any("deepspeed" in stage.flags for stage in plan.stages) or plan.devices.launcher == "deepspeed":
        needed |= {"deepspeed", "ninja"}
    if plan.job.lora:
        needed.add("peft")
    if plan.job.bits != 16:
        needed.add("bitsandbytes")
    if plan.uses_tiny_world:
        needed |= {"skimage", "sklearn"}
    absent = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    return [Missing(f"package {name}", "pip install -e '.[train,demo]'") for name in absent]


def missing_programs(plan: Plan) -> list[Missing]:
    """What starts the other nodes' ranks, where it is not on the path."""
    devices = plan.devices
    if not devices.elsewhere:
        return []
    needed = ("ssh",) if devices.hosts else ("srun", "scontrol")
    why = "HOSTFILE's nodes are reached by it" if devices.hosts else "SLURM's nodes are reached by it"
    return [Missing(f"program {name}", why) for name in needed if shutil.which(name) is None]


@main_guard(statuses={ValueError: 2})
def main(argv: list[str] | None = None) -> int:
    """Print the plan, and carry it out unless `--plan` was given.

    Returns:
        The exit code: 0 done, 2 something is missing or wrong, otherwise that of the step that failed.
    """
    from llava.train.launch import execute
    from llava.train.plan_text import usage

    arguments = list(sys.argv[1:] if argv is None else argv)
    before, _, after = (arguments, None, []) if "--" not in arguments else split_at(arguments)
    if not before or {"-h", "--help"} & set(before):
        sys.stdout.write(usage(ENVIRONMENT) + "\n")
        return 0 if before else 2
    unknown = [item for item in before[1:] if item != "--plan"]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not understood: training flags go after `--`; see --help")
    plan = resolve(before[0], overrides=after)
    sys.stdout.write(plan.describe() + "\n")
    sys.stdout.flush()
    if "--plan" in before:
        return 0
    return execute(plan) if plan.can_run else 2


def split_at(arguments: list[str]) -> tuple[list[str], str, list[str]]:
    """Divide a command line at the first `--`."""
    place = arguments.index("--")
    return arguments[:place], "--", arguments[place + 1 :]


if __name__ == "__main__":
    sys.exit(main())
