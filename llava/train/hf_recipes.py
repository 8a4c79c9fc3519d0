"""The numbers of the Hugging Face scripts: any model on LLaVA's mix, Video-LLaVA, and the tiny world's video model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from llava.train.recipes import SCHEDULE, StageRecipe


@dataclass(frozen=True)
class HfRecipe:
    """One finetuning of a Hugging Face model.

    Attributes:
        name: shown in the plan.
        model: folder or hub name.
        model_type: of that model.
        output: prefix of the output folder.
        stage: data and training flags.
        tokens: budget of the paper (`--duet_tokens`) where nothing else is asked for; None: the model's largest one.
        reduction: reduction flags of a budget that the paper's rows do not fit, by budget.
        lora: flags of a LoRA run.
        before, after: modules that make what is not there yet, and evaluate; with their arguments.
    """

    name: str
    model: str
    model_type: str
    output: str
    stage: StageRecipe
    tokens: int | None = None
    reduction: dict[int, dict[str, Any]] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    before: tuple[tuple[str, tuple[str, ...]], ...] = ()
    after: tuple[str, tuple[str, ...]] | None = None


_COMMON = {**SCHEDULE, "group_by_modality_length": True, "max_grad_norm": 1.0}
_LARGE = _COMMON | {
    "learning_rate": 2e-5,
    "save_steps": 500,
    "save_total_limit": 1,
    "gradient_checkpointing": True,
    "dataloader_num_workers": 4,
    "logging_steps": 1,
}
_LORA = {"learning_rate": 2e-4, "lora_r": 128, "lora_alpha": 256, "mm_projector_lr": 2e-5}

# LLaVA-1.5's second stage, for a model that has been through a first one.
HF = HfRecipe(
    name="hf",
    model="llava-hf/llava-1.5-7b-hf",
    model_type="llava",
    output="checkpoints/hf",
    stage=StageRecipe(
        kind="finetune",
        data="playground/data/llava_v1_5_mix665k.json",
        images="playground/data",
        records=665_298,
        global_batch=128,
        per_device=4,
        zero=3,
        flags=_LARGE,
    ),
    lora=_LORA,
)

# Source: Video-LLaVA's published finetuning script; DUET trains it with ZeRO-2 and the budgets of Table 14.
VIDEO = HfRecipe(
    name="video-7b",
    model="LanguageBind/Video-LLaVA-7B-hf",
    model_type="video_llava",
    output="checkpoints/video-llava-7b",
    stage=StageRecipe(
        kind="finetune",
        data=(
            "playground/data/video/videochatgpt_tune_.json,playground/data/video/llava_image_tune_.json,"
            "playground/data/video/nlp_tune.json"
        ),
        images="playground/data/video",
        records=765_000,
        global_batch=128,
        per_device=16,
        zero=2,
        flags=_LARGE | {"num_frames": 8},
    ),
    tokens=960,
    lora=_LORA,
)

TINY_VIDEO_DATA = "playground/tiny/data/video"
_TINY_VIDEO_BASE = "playground/tiny/runs/video-base"
# A frame has 64 patches instead of 256, so the rows of Table 14 (160 + 32 and 20 + 7 of a frame) shrink with them.
TINY_VIDEO = HfRecipe(
    name="tiny",
    model=_TINY_VIDEO_BASE,
    model_type="video_llava",
    output="playground/tiny/runs/video-tiny",
    stage=StageRecipe(
        kind="finetune",
        data=f"{TINY_VIDEO_DATA}/train.json",
        images=TINY_VIDEO_DATA,
        records=2400,
        global_batch=16,
        per_device=8,
        zero=2,
        flags=_COMMON
        | {
            "learning_rate": 1e-3,
            "mm_projector_lr": 3e-3,
            "num_frames": 8,
            "save_steps": 50,
            "save_total_limit": 1,
            "logging_steps": 5,
        },
    ),
    tokens=960,
    reduction={
        960: {"dominant": 40, "contextual": 8},
        136: {"dominant": 5, "contextual": 2},
    },
    lora={"learning_rate": 2e-3, "lora_r": 16, "lora_alpha": 32},
    before=(
        (f"{TINY_VIDEO_DATA}/train.json", ("playground.tiny.build_video", "--out", TINY_VIDEO_DATA)),
        (f"{_TINY_VIDEO_BASE}/config.json", ("playground.tiny.video_model", "--out", _TINY_VIDEO_BASE)),
    ),
    after=("playground.tiny.evaluate_video", ("--data", f"{TINY_VIDEO_DATA}/heldout.json")),
)  # fmt: skip

JOBS = {"finetune_duet_hf": (HF, HF), "finetune_duet_video": (VIDEO, TINY_VIDEO)}
"""By job: the recipe where there is an accelerator, and the one elsewhere."""

THIRTEEN_B = {
    "finetune_duet_hf": replace(HF, name="hf-13b", model="llava-hf/llava-1.5-13b-hf", output="checkpoints/hf-13b")
}
"""By job: the recipe that RECIPE=13b names."""
