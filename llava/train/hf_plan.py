"""What the Hugging Face scripts are going to do, and what is missing; carried out by `llava.train.launch`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet import DuetConfig
from llava.train.choices import is_cached, precision
from llava.train.hf_recipes import JOBS, THIRTEEN_B, HfRecipe
from llava.train.plan import (
    REDUCTION_FLAGS,
    Devices,
    Missing,
    Plan,
    Stage,
    find_devices,
    finish_stage,
    missing_packages,
    missing_programs,
    parse_overrides,
    read_reduction,
    without_resuming,
)
from llava.train.plan_text import batch_line, missing_lines
from llava.train.recipes import Job
from llava.train.records import load_records, videos_of

MODULE = "llava.train.train_hf"


@dataclass
class HfPlan(Plan):
    """Everything that one Hugging Face script does."""

    hf: HfRecipe | None = None
    model_type: str | None = None

    @property
    def stage(self) -> Stage:
        """The only stage."""
        return self.stages[0]

    @property
    def uses_tiny_world(self) -> bool:
        """Whether data of the tiny world is generated where it is absent."""
        return self.hf is not None and bool(self.hf.before)

    def before(self) -> list[tuple[str, list[str]]]:
        """What is made first: a title and a command each."""
        assert self.hf is not None
        wanted = {
            str(self.stage.flags["data_path"]),
            str(Path(str(self.stage.flags["model_name_or_path"])) / "config.json"),
        }
        steps = [(path, module) for path, module in self.hf.before if path in wanted and not Path(path).is_file()]
        return [(f"prepare: {path}", [sys.executable, "-m", *module]) for path, module in steps]

    def after(self) -> list[tuple[str, list[str]]]:
        """What follows training."""
        assert self.hf is not None
        if self.hf.after is None:
            return []
        module, arguments = self.hf.after
        base = [sys.executable, "-m", module, *arguments, "--model-path", str(self.stage.output)]
        base += ["--out", str(self.stage.output / "results.json"), "--seed", str(self.stage.flags["seed"])]
        if str(self.stage.flags.get("lora_enable")) == "True":
            base += ["--model-base", str(self.stage.flags["model_name_or_path"])]
        return [("evaluate", base)]

    def budget(self) -> str:
        """The token budget in words."""
        if self.reduction is None and self.tokens not in (None, "0"):
            return f"{self.tokens} on average, by the model's own row of the paper (its type is not known yet)"
        return budget_line(self.reduction)

    def describe(self) -> str:
        """The plan in words."""
        assert self.hf is not None
        stage, flags = self.stage, self.stage.flags
        learns = f"LoRA adapters (rank {flags.get('lora_r', 64)})" if lora(flags) else "language model"
        precision = (
            "bf16" if str(flags.get("bf16")) == "True" else "fp16" if str(flags.get("fp16")) == "True" else "fp32"
        )
        lines = [
            f"plan: {self.job.name}",
            f"  recipe     {self.hf.name}",
            f"  model      {flags['model_name_or_path']} ({self.model_type or 'type not known before it is fetched'})",
            f"  device     {self.devices.name}; {self.devices.nodes} node(s) x {self.devices.per_node} ranks through "
            f"{self.devices.launcher}",
            f"  tokens     {self.budget()}",
            f"  learns     {flags.get('mm_tunable_parts') or f'{learns} and projector'}; "
            f"{flags.get('deepspeed', 'no DeepSpeed')}; {precision}; lr {flags['learning_rate']}",
            f"  data       {flags['data_path']} ({stage.records:,} records), images {flags['image_folder']}",
            f"  steps      {batch_line(stage)}",
        ]
        lines += [f"  first      {title}" for title, _ in self.before()]
        lines += [f"  then       {title}" for title, _ in self.after()]
        return "\n".join([*lines, *missing_lines(self.missing)])


def lora(flags: Mapping[str, Any]) -> bool:
    """Whether adapters are trained."""
    return str(flags.get("lora_enable")) == "True"


def budget_line(reduction: DuetConfig | None) -> str:
    """Token budget in words; how many tokens enter depends on the pictures."""
    if reduction is None:
        return "all visual tokens in all layers (no reduction)"
    drops = ", ".join(f"{ratio:g} after layer {layer}" for layer, ratio in reduction.schedule.items()) or "no drop"
    of = f" of {reduction.depth}" if reduction.depth else ""
    each = "image or video" if reduction.per == "picture" else "tower pass (image, tile or frame)"
    return (
        f"{reduction.dominant} dominant + {reduction.contextual} contextual per {each} "
        f"({reduction.stage1}, {reduction.variant}); kept: {drops}{of}"
    )


def resolve_hf(
    job_name: str, env: Mapping[str, str], overrides: Sequence[str] = (), accelerators: int | None = None
) -> HfPlan:
    """Work out what a Hugging Face script does; see `plan.resolve`.

    Raises:
        ValueError: a value that cannot be used, or a model that is not supported.
    """
    devices = find_devices(env, accelerators)
    name = env.get("RECIPE") or ("" if devices.accelerator else "tiny")
    recipe = choose_recipe(job_name, name)
    flags = parse_overrides(overrides)
    model = flags.get("model_name_or_path") or env.get("BASE_MODEL") or recipe.model
    model_type, missing = find_model(model, recipe)
    shared = {key: value for key, value in flags.items() if key in REDUCTION_FLAGS}
    shared = shared or default_reduction(recipe, model_type, env)
    plan = HfPlan(
        job=Job(job_name, last="finetune", reduced=True, lora=lora(flags), module=MODULE),
        recipe=None,  # type: ignore[arg-type]
        devices=devices,
        stages=[],
        reduction=None,
        tokens=shared.get("duet_tokens"),
        hf=recipe,
        model_type=model_type,
    )
    plan.reduction = read(shared, model_type)
    plan.stages = [resolve_stage(recipe, devices, model, env, shared, flags)]
    plan.missing = missing + find_missing(plan, shared)
    return plan


def choose_recipe(job_name: str, name: str) -> HfRecipe:
    """The recipe of a job that RECIPE names; an empty name means the one where there is an accelerator.

    Raises:
        ValueError: the job has no such recipe.
    """
    large, small = JOBS[job_name]
    known = {"tiny": small, small.name: small, "": large, "7b": large, large.name: large}
    if job_name in THIRTEEN_B:
        known |= {"13b": THIRTEEN_B[job_name]}
    if name not in known:
        larger = " or 13b" if job_name in THIRTEEN_B else ""
        raise ValueError(f"RECIPE={name}: expected {large.name}{larger} or {small.name}")
    return known[name]


def find_model(model: str, recipe: HfRecipe) -> tuple[str | None, list[Missing]]:
    """Return a model's type where it is known, and what is missing.

    Raises:
        ValueError: the type is not supported.
    """
    if any(str(Path(model) / "config.json") == path for path, _ in recipe.before):
        return recipe.model_type, []
    path = Path(model)
    if not path.is_dir() and (model.count("/") > 1 or model.startswith((".", "/"))):
        return None, [Missing(f"model {model}", "put the model folder there, or set BASE_MODEL")]
    if path.is_dir() or is_cached(model):
        from llava.train.hf_model import model_type_of

        if path.is_dir() and not (path / "config.json").is_file():
            return None, [
                Missing(f"model {model}", "the folder has no config.json; set BASE_MODEL to a model's folder")
            ]
        return model_type_of(model), []
    remedy = "it is fetched from the Hugging Face hub; without access, copy it to a folder and set BASE_MODEL"
    return recipe.model_type if model == recipe.model else None, [Missing(f"model {model}", remedy, fatal=False)]


def default_reduction(recipe: HfRecipe, model_type: str | None, env: Mapping[str, str]) -> dict[str, Any]:
    """The reduction flags where the user gives none: a budget of the paper that suits the model."""
    from duet.presets import PRESETS as ROWS
    from llava.train.hf_model import PRESETS

    tokens = env.get("DUET_TOKENS") or recipe.tokens
    if tokens and int(tokens) in recipe.reduction:
        schedule = {"layer_list": "[6,9]", "image_token_ratio_list": "[0.5,0.0]"}
        return {name: str(value) for name, value in recipe.reduction[int(tokens)].items()} | schedule
    if tokens is None and model_type in PRESETS:
        tokens = max(ROWS[PRESETS[model_type]])
    return {} if tokens is None else {"duet_tokens": str(tokens)}


def read(flags: Mapping[str, Any], model_type: str | None) -> DuetConfig | None:
    """The reduction that flags describe for a type of model; None for none, or if only the model can tell."""
    from llava.train.hf_model import PRESETS, preset_of

    tokens = int(str(flags.get("duet_tokens") or 0))
    if not flags or (tokens and model_type is None):
        return None
    preset = PRESETS["llava"] if model_type is None else preset_of(model_type, tokens) or PRESETS["llava"]
    return read_reduction({name: str(value) for name, value in flags.items()}, preset)


def resolve_stage(
    recipe: HfRecipe,
    devices: Devices,
    model: str,
    env: Mapping[str, str],
    shared: Mapping[str, Any],
    overrides: Mapping[str, str],
) -> Stage:
    """Put the flags together: recipe, environment, then what the user gave."""
    stage = recipe.stage
    flags: dict[str, Any] = {
        "model_name_or_path": model,
        "data_path": env.get("FINETUNE_DATA") or stage.data,
        "image_folder": env.get("FINETUNE_IMAGES") or stage.images,
        "output_dir": output_folder(recipe, model, shared, overrides, env),
        **stage.flags,
        **(recipe.lora if lora(overrides) else {}),
        "seed": env.get("SEED") or 42,
        "report_to": env.get("REPORT_TO") or "none",
    }
    flags |= precision(env, overrides, devices.accelerator, [Path(str(flags["output_dir"]))])
    chosen = env.get("DEEPSPEED_CONFIG")
    if chosen != "none" and (chosen or devices.launcher != "python"):
        flags["deepspeed"] = chosen or f"scripts/zero{stage.zero}.json"
    return finish_stage(stage, flags | dict(shared), devices.world, env, overrides)


def output_folder(
    recipe: HfRecipe, model: str, shared: Mapping[str, Any], flags: Mapping[str, str], env: Mapping[str, str]
) -> Path:
    """Folder of a run: prefix, the model if not the recipe's, whether tokens are reduced and how far, what learns."""
    name = Path(model).name
    own = recipe.output if name == Path(recipe.model).name else f"{recipe.output}-{name}"
    parts = [env.get("OUTPUT_ROOT") or own]
    tokens = flags.get("duet_tokens") or env.get("DUET_TOKENS") or ""
    if str(shared.get("duet_tokens")) != "0":
        parts.append("duet" if tokens == str(recipe.tokens) else f"duet{tokens}")
    return Path("-".join([*parts, "finetune", *(["lora"] if lora(flags) else [])]))


def find_missing(plan: HfPlan, reduction: Mapping[str, Any]) -> list[Missing]:
    """Everything but the model that is not here yet, with where to put it."""
    missing: list[Missing] = []
    flags = plan.stage.flags
    made = {command[0] for command in (plan.hf.before if plan.hf else ())}
    for name, variable in (("data_path", "FINETUNE_DATA"), ("image_folder", "FINETUNE_IMAGES")):
        text = str(flags[name])
        paths = [text] if Path(text).exists() or name == "image_folder" else text.replace(",", " ").split()
        for path in paths:
            generated = path in made or any(done.startswith(f"{path}/") for done in made)
            if not Path(path).exists() and not generated:
                missing.append(Missing(f"{name} {path}", f"put it there (docs/training_hf.md), or set {variable}"))
    if not reduction:
        why = "the model's type is not known yet" if plan.model_type is None else "the paper has none for this model"
        remedy = "say what is kept with DUET_TOKENS (0: all), or with --dominant, --contextual and --layer_list"
        missing.append(Missing("budget", f"{why}: {remedy}"))
    if any(str(name).endswith((".mp4", ".avi", ".webm", ".mkv", ".mov")) for name in sample_videos(flags)):
        missing += [] if has("av") else [Missing("package av", "videos other than GIFs: pip install -e '.[video]'")]
    return missing + missing_packages(plan) + missing_programs(plan) + without_resuming(plan)


def has(package: str) -> bool:
    """Whether a package is installed."""
    import importlib.util

    return importlib.util.find_spec(package) is not None


def sample_videos(flags: Mapping[str, Any]) -> list[str]:
    """Names of some videos of the data, where its first file is small enough to look into."""
    path = Path(str(flags["data_path"]).replace(",", " ").split()[0])
    if not path.is_file() or path.suffix in (".yaml", ".yml") or path.stat().st_size > 200_000_000:
        return []
    try:
        records, _ = load_records([str(path)])
    except ValueError:
        return []  # training itself reports a broken file, with the place
    return [str(name) for record in records[:1000] if isinstance(record, dict) for name in videos_of(record)]
