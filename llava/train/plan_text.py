"""A plan in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llava.train import hf_recipes
from llava.train.recipes import JOBS, Recipe

if TYPE_CHECKING:
    from duet import DuetConfig
    from llava.train.plan import Missing, Plan, Stage


def budget_line(reduction: DuetConfig | None, recipe: Recipe) -> str:
    """Token budget: what enters, what a layer sees on average, what is saved."""
    if reduction is None:
        return f"{recipe.patches} visual tokens in all {recipe.layers} layers (no reduction)"
    fitted = reduction.for_depth(recipe.layers)
    drops = ", ".join(f"{ratio:g} after layer {layer}" for layer, ratio in fitted.schedule.items()) or "no drop"
    if fitted.adaptive:
        return f"{recipe.patches} patches -> as many enter as a picture needs ({fitted.stage1}); kept: {drops}"
    entering = fitted.entering_tokens(recipe.patches)
    average = fitted.average_tokens(recipe.patches, recipe.layers)
    saved = 100 * (1 - average / recipe.patches)
    return (
        f"{recipe.patches} patches -> {entering} enter (dominant {fitted.dominant}, contextual {fitted.contextual}) -> "
        f"{average:.2f} on average over {recipe.layers} layers, {saved:.1f} % saved; kept: {drops}"
    )


def batch_line(stage: Stage) -> str:
    """The global batch and what it consists of; the recipe's, where it is another one."""
    other = "" if stage.global_batch == stage.recipe.global_batch else f" (the recipe's is {stage.recipe.global_batch})"
    return (
        f"global batch {stage.global_batch}{other} = {stage.world} ranks x {stage.per_device} records x "
        f"{stage.accumulation} passes; {stage.steps:,} optimizer steps -> {stage.output}"
    )


def stage_lines(number: int, stage: Stage) -> list[str]:
    """One stage in three lines."""
    flags = stage.flags
    zero = flags.get("deepspeed", "no DeepSpeed")
    learns = "projector" if flags.get("tune_mm_mlp_adapter") else "language model and projector"
    if flags.get("lora_enable"):
        bits = int(flags.get("bits", 16))
        learns = f"LoRA adapters (rank {flags.get('lora_r')}) and projector" + (
            f", {bits}-bit base" if bits < 16 else ""
        )
    rates = f"lr {flags['learning_rate']}" + (
        f", projector {flags['mm_projector_lr']}" if "mm_projector_lr" in flags else ""
    )
    precision = "bf16" if str(flags.get("bf16")) == "True" else "fp16" if str(flags.get("fp16")) == "True" else "fp32"
    return [
        f"  stage {number}    {stage.recipe.kind}: {learns}; template {flags['version']}; {zero}; {precision}; {rates}",
        f"             data {flags['data_path']} ({stage.records:,} records), images {flags['image_folder']}",
        f"             {batch_line(stage)}",
    ]


def describe(plan: Plan) -> str:
    """The whole plan."""
    devices = plan.devices
    first = plan.stages[-1].flags
    lines = [
        f"plan: {plan.job.name}",
        f"  recipe     {plan.recipe.name}",
        f"  model      {first['model_name_or_path']}",
        f"  tower      {first['vision_tower']}",
        f"  device     {devices.name}; {devices.nodes} node(s) x {devices.per_node} ranks through {devices.launcher}",
        f"  tokens     {budget_line(plan.reduction, plan.recipe)}",
    ]
    for number, stage in enumerate(plan.stages, start=3 - len(plan.stages) if plan.job.last == "finetune" else 1):
        lines += stage_lines(number, stage)
    if plan.recipe.name == "tiny" and plan.job.last == "finetune":
        lines.append("  then       evaluation of the held-out split with and without reduction, table and pictures")
    return "\n".join([*lines, *missing_lines(plan.missing)])


def missing_lines(missing: Sequence[Missing]) -> list[str]:
    """What is not here, a line each."""
    if not missing:
        return ["  missing    nothing"]
    return [f"  {'missing' if item.fatal else 'note   '}    {item.what}: {item.remedy}" for item in missing]


def usage(environment: Mapping[str, str]) -> str:
    """Help of the scripts."""
    width = max(len(name) for name in environment)
    return "\n".join(
        [
            "usage: bash scripts/JOB.sh [--plan] [-- FLAGS]",
            f"jobs:  {', '.join([*JOBS, *hf_recipes.JOBS])}",
            "  --plan   print what would run, and stop",
            "  -- FLAGS any flag of llava.train.train; DUET flags (--duet_tokens 128, --layer_list '[16,24]', ...)",
            "           hold for both stages, the others for the stage that the script is named after",
            "environment variables:",
            *(f"  {name:<{width}}  {text}" for name, text in environment.items()),
        ]
    )
