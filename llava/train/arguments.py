"""The flags of training, with LLaVA's names and defaults."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import transformers

from llava.pictures import ORIENTATIONS
from llava.reduction import ReductionArguments
from llava.train import runtime
from llava.train.old_flags import OldFlags

logger = logging.getLogger(__name__)


def check_choice(flag: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError, naming the flag, unless its value is allowed."""
    if value not in allowed:
        *others, last = map(str, allowed)
        raise ValueError(f"--{flag} {value}: expected {', '.join(others)} or {last}")


@dataclass
class ModelArguments:
    """Which model is built and which parts of it learn."""

    model_name_or_path: str | None = field(
        default="facebook/opt-125m", metadata={"help": "base LLM or LLaVA checkpoint"}
    )
    version: str | None = field(default="v0", metadata={"help": "conversation template; unknown names mean vicuna_v1"})
    freeze_backbone: bool = field(default=False, metadata={"help": "freeze the decoder"})
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "stage 1: train the projector only"})
    vision_tower: str | None = field(default=None, metadata={"help": "vision tower; none means a text-only run"})
    mm_vision_select_layer: int | None = field(default=-1, metadata={"help": "tower layer (the recipes pass -2)"})
    pretrain_mm_mlp_adapter: str | None = field(default=None, metadata={"help": "projector file or stage-1 folder"})
    mm_projector_type: str | None = field(default="linear", metadata={"help": "linear, mlp2x_gelu, ..."})
    mm_use_im_start_end: bool = field(default=False, metadata={"help": "wrap the image in start and end tokens"})
    mm_use_im_patch_token: bool = field(default=True, metadata={"help": "add <im_patch> (the recipes pass False)"})
    mm_patch_merge_type: str | None = field(
        default="flat", metadata={"help": "flat; spatial and spatial_unpad for anyres"}
    )
    mm_vision_select_feature: str | None = field(default="patch", metadata={"help": "patch or cls_patch"})
    unfreeze_mm_vision_tower: bool = field(default=False, metadata={"help": "train the vision tower too"})
    mm_tunable_parts: str | None = field(
        default=None,
        metadata={
            "help": "comma list of mm_mlp_adapter, mm_vision_tower, mm_language_model; replaces the freeze flags"
        },
    )
    image_tower: str | None = field(default=None, metadata={"help": "Video-LLaVA only"})
    video_tower: str | None = field(default=None, metadata={"help": "Video-LLaVA only"})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa (default), flash_attention_2 or eager"}
    )
    s2: bool = field(default=False, metadata={"help": "multi-scale tower"})
    s2_scales: str | None = field(default=None, metadata={"help": "multi-scale tower: side lengths"})

    def __post_init__(self) -> None:
        for name in ("image_tower", "video_tower"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name}: separate image and video towers are not supported yet; use --vision_tower")
        if self.tune_mm_mlp_adapter and self.vision_tower is None:
            raise ValueError("--tune_mm_mlp_adapter trains the projector, so it needs --vision_tower")


@dataclass
class DataArguments:
    """Which records are read, and how."""

    data_path: str | None = field(default=None, metadata={"help": "annotation file (a JSON array)"})
    eval_data_path: str | None = field(default=None, metadata={"help": "annotation file for the validation loss"})
    lazy_preprocess: bool = field(default=False, metadata={"help": "accepted; preprocessing is always lazy"})
    is_multimodal: bool = field(default=False, metadata={"help": "set by --vision_tower"})
    image_folder: str | None = field(default=None, metadata={"help": "folder that the records' image paths start from"})
    image_aspect_ratio: str = field(default="square", metadata={"help": "square, pad or anyres"})
    image_grid_pinpoints: str | None = field(default=None, metadata={"help": "anyres candidates"})
    video_folder: str | None = field(default=None, metadata={"help": "Video-LLaVA only"})
    num_frames: int = field(default=8, metadata={"help": "Video-LLaVA only"})
    on_bad_sample: str = field(
        default="error", metadata={"help": "error: stop before the first step; skip: leave out and count"}
    )
    scan_images: str = field(default="open", metadata={"help": "pre-flight scan: none, open (read headers) or decode"})
    max_zero_label_share: float = field(
        default=0.01, metadata={"help": "stop when more than this share of the records has nothing to learn from"}
    )
    image_orientation: str = field(
        default="exif",
        metadata={"help": "exif: pictures are turned as the camera noted; stored: they are not, as in LLaVA"},
    )

    def __post_init__(self) -> None:
        check_choice("on_bad_sample", self.on_bad_sample, ("error", "skip"))
        check_choice("scan_images", self.scan_images, ("none", "open", "decode"))
        check_choice("image_orientation", self.image_orientation, ORIENTATIONS)
        if self.video_folder is not None:
            raise ValueError("--video_folder: video training is not supported yet")
        # No flags: filled in when the model is built.
        self.image_processor: Any = None
        self.mm_use_im_start_end = False
        self.visual_tokens_per_image: int | None = None
        self.count_visual_tokens: Any = None
        self.bad_sample_file: str | None = None


@dataclass
class TrainingArguments(OldFlags, transformers.TrainingArguments):
    """How it is trained: everything of Hugging Face, plus LLaVA's own flags."""

    output_dir: str = field(default="checkpoints/run", metadata={"help": "folder of the run"})
    cache_dir: str | None = field(default=None, metadata={"help": "hub cache"})
    optim: str = field(default="adamw_torch", metadata={"help": "optimizer"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay False, or images are dropped"})
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "freeze the projector"})
    mpt_attn_impl: str | None = field(default="triton", metadata={"help": "MPT only"})
    model_max_length: int = field(default=512, metadata={"help": "text tokens of a record (the recipes pass 2048)"})
    tokenizer_model_max_length: int | None = field(
        default=None, metadata={"help": "limit after the images are spliced in; default: model_max_length"}
    )
    double_quant: bool = field(default=True, metadata={"help": "4-bit: quantise the quantisation constants"})
    quant_type: str = field(default="nf4", metadata={"help": "4-bit: nf4 or fp4"})
    bits: int = field(default=16, metadata={"help": "16, 8 or 4"})
    lora_enable: bool = field(default=False, metadata={"help": "train LoRA adapters instead of the decoder"})
    lora_r: int = field(default=64, metadata={"help": "LoRA rank"})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scale"})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA dropout"})
    lora_weight_path: str = field(default="", metadata={"help": "adapter folder to start from"})
    lora_bias: str = field(default="none", metadata={"help": "none, all or lora_only"})
    mm_projector_lr: float | None = field(default=None, metadata={"help": "learning rate of the projector"})
    mm_vision_tower_lr: float | None = field(default=None, metadata={"help": "learning rate of an unfrozen tower"})
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "batches of one modality and similar length"}
    )
    length_pool: int = field(
        default=1,
        metadata={"help": "with the former: optimizer steps whose records are sorted together; more pads less"},
    )
    loss_normalization: str = field(
        default="per_device",
        metadata={"help": "per_device: mean over each device's tokens (LLaVA); global: over all tokens"},
    )
    max_grad_norm: float | None = field(
        default=None,
        metadata={
            "help": "clip the gradient to this norm, 0: never; default: what the DeepSpeed JSON says, never where it "
            "says nothing (as LLaVA-1.5 was trained), 1.0 without DeepSpeed"
        },
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "a non-finite loss is an error here"})
    logging_steps: float = field(default=10, metadata={"help": "log every N steps"})
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "keep what the frozen tower makes of each picture in this folder, for later epochs and runs"},
    )
    image_log_steps: int = field(
        default=0, metadata={"help": "every N steps draw kept tokens on a few images; 0: never"}
    )
    image_log_count: int = field(default=2, metadata={"help": "how many images are drawn"})
    dry_run: bool = field(default=False, metadata={"help": "check data, model, one step and one save, then stop"})
    dry_run_records: int = field(default=4, metadata={"help": "records that the dry run prints"})
    monitor_grads: bool = field(default=False, metadata={"help": "accepted; the gradient norm is always logged"})
    monitor_grads_every: int = field(default=50, metadata={"help": "accepted, see --logging_steps"})
    raise_on_nan_grad: bool = field(default=False, metadata={"help": "stop when the gradient norm is not finite"})
    z3_leaf_modules: bool = field(default=True, metadata={"help": "ZeRO-3 gathers the vision tower as one unit"})

    def __post_init__(self) -> None:
        self.carry_over()
        self._check()
        # No flags: what the run was begun with, and copies of the model's flags for the trainer.
        self.begun_with: dict[str, Any] = {}
        self.tune_mm_mlp_adapter = False
        self.use_im_start_end = False
        self.log_to_wandb = self._take_wandb()
        self._downgrade_tf32()
        self._use_current_checkpointing_names()
        self.max_grad_norm = self._clipping()
        if self.deepspeed:
            runtime.require_deepspeed()
        if self.use_cpu or not runtime.has_accelerator():
            self._downgrade_fp16()
        if not runtime.has_accelerator():
            self.use_cpu = True
            if self.deepspeed:
                self.accelerator_config = runtime.prepare_cpu_deepspeed()
            elif runtime.launched_world_size() > 1:
                self.ddp_backend = "gloo"
        super().__post_init__()
        if self.deepspeed:
            # DeepSpeed 0.19.3 and later clip at 1.0 where nothing is said; the release that LLaVA pinned did not clip.
            self.hf_deepspeed_config.config.setdefault("gradient_clipping", self.max_grad_norm)
        runtime.check_world_size(self.world_size)

    def _check(self) -> None:
        check_choice("bits", self.bits, (4, 8, 16))
        check_choice("loss_normalization", self.loss_normalization, ("per_device", "global"))
        if self.length_pool < 1:
            raise ValueError(f"--length_pool {self.length_pool}: expected 1 (LLaVA's order) or more")
        if self.length_pool > 1 and not self.group_by_modality_length:
            raise ValueError("--length_pool sorts what --group_by_modality_length True groups; add that, too")
        check_choice("lora_bias", self.lora_bias, ("none", "all", "lora_only"))
        if self.bits != 16 and not self.lora_enable:
            raise ValueError(
                f"--bits {self.bits} freezes the decoder's weights, so nothing in it learns: add --lora_enable True"
            )
        if self.remove_unused_columns:
            raise ValueError("--remove_unused_columns True would drop the images")

    def _clipping(self) -> float:
        """The norm that gradients are clipped to; 0 for none.

        Source: LLaVA-1.5's zero2.json and zero3.json do not name `gradient_clipping`, whose default is 0 in the
        DeepSpeed that LLaVA pinned (0.12.6, runtime/constants.py); accelerate 0.21 has 1.0 for "auto" only.
        """
        if self.max_grad_norm is not None:
            return self.max_grad_norm
        if not self.deepspeed:
            return 1.0
        said = runtime.read_deepspeed_config(self.deepspeed).get("gradient_clipping", 0.0)
        return 1.0 if said == "auto" else float(said)

    def _take_wandb(self) -> bool:
        """Keep wandb away from the Trainer, whose integration asks for a login; `run_log` serves it instead."""
        wanted = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        self.report_to = [name for name in wanted if name not in ("wandb", "none")] or "none"
        return "wandb" in wanted

    def _downgrade_tf32(self) -> None:
        if not self.tf32:
            return
        from transformers.utils.import_utils import is_torch_tf32_available

        if not (runtime.may_have_tf32() and is_torch_tf32_available()):
            logger.warning("--tf32 True: this machine has no tf32; continuing without it")
            self.tf32 = None

    def _downgrade_fp16(self) -> None:
        """Say that a CPU trains in fp32: accelerate would leave fp16 out without a word, but the tower would not."""
        if self.fp16:
            if runtime.is_rank0():
                logger.warning(
                    "--fp16 True: there is no fp16 training on a CPU; this run computes in fp32 (--bf16 True works)"
                )
            self.fp16 = False

    def _use_current_checkpointing_names(self) -> None:
        """Newer `transformers` call gradient checkpointing activation checkpointing, and warn about the old name."""
        options = self.gradient_checkpointing_kwargs or {"use_reentrant": False}
        if not self.gradient_checkpointing:
            return
        if hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = True
            self.activation_checkpointing_kwargs = self.activation_checkpointing_kwargs or options
        else:
            self.gradient_checkpointing_kwargs = options

    @property
    def compute_dtype(self) -> torch.dtype:
        """Width of activations: bf16, fp16 or fp32."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


@dataclass
class RunArguments:
    """The four groups of flags of one run."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    reduction: ReductionArguments

    def to_dict(self) -> dict[str, Any]:
        """Everything that was resolved, for the log."""
        return {
            "model": vars(self.model),
            "data": {
                key: value
                for key, value in vars(self.data).items()
                if key not in ("image_processor", "count_visual_tokens")
            },
            "training": self.training.to_sanitized_dict(),
            "reduction": vars(self.reduction),
        }


def parse_arguments(argv: list[str] | None = None, groups: Any = None) -> RunArguments:
    """Read a command line in LLaVA's or DUET's spelling.

    Args:
        argv: without the program's name; default `sys.argv[1:]`.
        groups: classes of the model's, the data's, the training's and the reduction's flags; default: those above.

    Returns:
        The flags, by group.

    Raises:
        ValueError: an unknown flag, or a value that is not allowed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    groups = groups or (ModelArguments, DataArguments, TrainingArguments, ReductionArguments)
    parser = transformers.HfArgumentParser(groups, allow_abbrev=False)
    _, rest = parser.parse_known_args(argv)
    if rest:
        flags = [f"--{item.name}" for group in groups for item in fields(group)]
        near = difflib.get_close_matches(rest[0], flags, n=3)
        raise ValueError(f"{rest[0]} is not a training flag" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    model, data, training, reduction = parser.parse_args_into_dataclasses(args=argv)
    return RunArguments(model, data, training, reduction)
