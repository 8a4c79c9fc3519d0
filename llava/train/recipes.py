"""The numbers of the training recipes: the paper's 7B one, LLaVA's 13B one, and the tiny one that runs on a laptop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class StageRecipe:
    """One training stage.

    Attributes:
        kind: `pretrain` or `finetune`.
        data: annotation file.
        images: folder that its image paths start from.
        records: how many records the file has, until it can be counted.
        global_batch: records per optimizer step over all devices.
        per_device: records per device and pass, at most.
        zero: DeepSpeed stage.
        flags: training flags that are not computed.
    """

    kind: str
    data: str
    images: str
    records: int
    global_batch: int
    per_device: int
    zero: int
    flags: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A pair of stages on one pair of backbones.

    Attributes:
        name: `tiny`, `7b` or `13b`.
        model: base language model.
        tower: vision tower.
        output: prefix of the output folders.
        layers: depth of the decoder; patches: of an image.
    """

    name: str
    model: str
    tower: str
    output: str
    layers: int
    patches: int
    pretrain: StageRecipe
    finetune: StageRecipe
    lora_rate: float
    lora: dict[str, Any]


SCHEDULE = {
    "weight_decay": 0.0,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "model_max_length": 2048,
}
COMMON = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    **SCHEDULE,
}

# Source: the LLaVA-1.5 paper and its published scripts; DUET keeps the numbers (DUET-VLM Sec. 4).
SEVEN_B = Recipe(
    name="7b",
    model="lmsys/vicuna-7b-v1.5",
    tower="openai/clip-vit-large-patch14-336",
    output="checkpoints/llava-v1.5-7b",
    layers=32,
    patches=576,
    pretrain=StageRecipe(
        kind="pretrain",
        data="playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        images="playground/data/LLaVA-Pretrain/images",
        records=558_128,
        global_batch=256,
        per_device=32,
        zero=2,
        flags={
            "version": "plain",
            "tune_mm_mlp_adapter": True,
            "learning_rate": 1e-3,
            "max_grad_norm": 0.0,
            "save_steps": 500,
            "save_total_limit": 1,
            "gradient_checkpointing": True,
            "dataloader_num_workers": 4,
            "logging_steps": 1,
            "image_log_steps": 500,
        },
    ),
    finetune=StageRecipe(
        kind="finetune",
        data="playground/data/llava_v1_5_mix665k.json",
        images="playground/data",
        records=665_298,
        global_batch=128,
        per_device=16,
        zero=3,
        flags={
            "version": "v1",
            "learning_rate": 2e-5,
            "max_grad_norm": 0.0,
            "image_aspect_ratio": "pad",
            "group_by_modality_length": True,
            "save_steps": 500,
            "save_total_limit": 1,
            "gradient_checkpointing": True,
            "dataloader_num_workers": 4,
            "logging_steps": 1,
            "image_log_steps": 500,
        },
    ),
    lora_rate=2e-4,
    lora={"lora_enable": True, "lora_r": 128, "lora_alpha": 256, "mm_projector_lr": 2e-5},
)

# Source: LLaVA-1.5's published scripts, whose numbers are the same for both sizes.
THIRTEEN_B = replace(SEVEN_B, name="13b", model="lmsys/vicuna-13b-v1.5", output="checkpoints/llava-v1.5-13b", layers=40)

TINY = Recipe(
    name="tiny",
    model="playground/tiny/weights/llm",
    tower="playground/tiny/weights/clip",
    output="playground/tiny/runs/llava-tiny",
    layers=12,
    patches=576,
    pretrain=StageRecipe(
        kind="pretrain",
        data="playground/tiny/data/pretrain.json",
        images="playground/tiny/data",
        records=2400,
        global_batch=16,
        per_device=8,
        zero=2,
        flags={
            "version": "plain",
            "tune_mm_mlp_adapter": True,
            "learning_rate": 2e-3,
            "max_grad_norm": 1.0,
            "save_steps": 50,
            "save_total_limit": 1,
            "logging_steps": 5,
            "image_log_steps": 50,
        },
    ),
    finetune=StageRecipe(
        kind="finetune",
        data="playground/tiny/data/finetune.json",
        images="playground/tiny/data",
        records=3570,
        global_batch=16,
        per_device=8,
        zero=3,
        flags={
            "version": "v1",
            "learning_rate": 5e-4,
            "max_grad_norm": 1.0,
            "image_aspect_ratio": "pad",
            "group_by_modality_length": True,
            "save_steps": 50,
            "save_total_limit": 2,
            "logging_steps": 5,
            "image_log_steps": 50,
        },
    ),
    lora_rate=1e-3,
    lora={"lora_enable": True, "lora_r": 16, "lora_alpha": 32, "mm_projector_lr": 3e-4},
)

RECIPES = {recipe.name: recipe for recipe in (TINY, SEVEN_B, THIRTEEN_B)}


@dataclass(frozen=True)
class Job:
    """What one script does: the stages that it needs, how the second one is trained, and the module that trains."""

    name: str
    last: str
    reduced: bool
    lora: bool = False
    bits: int = 16
    module: str = "llava.train.train"

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages in order; a finetuning job pretrains first when there is no projector yet."""
        return ("pretrain",) if self.last == "pretrain" else ("pretrain", "finetune")


JOBS = {
    job.name: job
    for job in (
        Job("pretrain", last="pretrain", reduced=False),
        Job("finetune", last="finetune", reduced=False),
        Job("pretrain_duet", last="pretrain", reduced=True),
        Job("finetune_duet", last="finetune", reduced=True),
        Job("finetune_duet_lora", last="finetune", reduced=True, lora=True),
        Job("finetune_duet_qlora", last="finetune", reduced=True, lora=True, bits=4),
    )
}
