"""From flags to a Hugging Face model with DUET attached, ready to train."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, set_seed

import duet
from duet import DuetConfig
from duet.attach import base_model
from duet.families import FAMILIES
from duet.families.reduced import HostFamily
from llava.model.language_model.causal_lm import clean_generation_config
from llava.train.build import unify_dtype, widen_trainable
from llava.train.hf_chat import Chat
from llava.train.hf_processor import FRAMES_LIKE_PICTURES, load_processor
from llava.train.lora import adapt
from llava.train.optim import part_of

logger = logging.getLogger(__name__)

PRESETS = {
    "llava": "llava-1.5-7b",
    "llava_next": "llava-next-7b",
    "video_llava": "video-llava-7b",
    "qwen2_vl": "qwen2.5-vl-7b",
    "qwen2_5_vl": "qwen2.5-vl-7b",
    "qwen3_vl": "qwen2.5-vl-7b",
}
"""Whose budgets of the paper `--duet_tokens` names, by model type; Qwen2-VL and Qwen3-VL borrow Qwen2.5-VL's."""
TILED = ("llava_next", "llava_next_video", "llava_onevision", "internvl")
"""Model types whose pictures differ in how many tower passes they take."""
_PART_FLAGS = {"mm_projector": "mm_mlp_adapter", "vision_tower": "mm_vision_tower", "language": "mm_language_model"}


def supported_types() -> list[str]:
    """Model types of transformers' own classes that DUET can be attached to."""
    return [name for name in FAMILIES.names() if isinstance(FAMILIES.get(name), HostFamily)]


def check_model_type(path: str, model_type: str | None) -> str:
    """Return the model type.

    Raises:
        ValueError: it is not supported; says which are.
    """
    if model_type in supported_types():
        return str(model_type)
    raise ValueError(
        f"{path} has model_type {model_type!r}, which train_hf does not know; supported: "
        f"{', '.join(supported_types())}. A further family is one file: see docs/add-a-family.md. LLaVA's own "
        "checkpoints (llava_llama, llava_mistral) are trained by scripts/finetune_duet.sh"
    )


def model_type_of(path: str, cache_dir: str | None = None) -> str:
    """Read the model type from a checkpoint's config.json.

    Raises:
        OSError: there is no such checkpoint.  ValueError: the type is not supported.
    """
    values, _ = PreTrainedConfig.get_config_dict(path, cache_dir=cache_dir)
    return check_model_type(path, values.get("model_type"))


def preset_of(model_type: str, tokens: int | None) -> str | None:
    """Return whose budgets `--duet_tokens` names.

    Raises:
        ValueError: a budget was asked for and the paper has none for this type.
    """
    if tokens and model_type not in PRESETS:
        raise ValueError(
            f"--duet_tokens {tokens}: the paper has no budgets for {model_type}; say what is kept with --dominant, "
            "--contextual, --layer_list and --image_token_ratio_list"
        )
    return PRESETS.get(model_type)


def reduction_of(args: Any, model_type: str, stored: DuetConfig | None) -> DuetConfig | None:
    """Combine the flags with what the checkpoint says; None for no reduction."""
    preset = preset_of(model_type, args.reduction.duet_tokens)
    return args.reduction.to_config(stored, **({} if preset is None else {"preset": preset}))


def load_model(args: Any, model_type: str, attention: str) -> Any:
    """Load the weights into the class of the model's family."""
    training = args.training
    host: Any = FAMILIES.get(model_type).host  # type: ignore[attr-defined]
    model = host.from_pretrained(
        args.model.model_name_or_path,
        attn_implementation=attention,
        cache_dir=training.cache_dir,
        dtype=torch.bfloat16 if training.bf16 else torch.float32,
    )
    clean_generation_config(getattr(model, "generation_config", None))
    return model


def projectors(model: nn.Module) -> list[str]:
    """Paths of the modules between the tower and the language model, lists taken apart."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if part_of(path) == "mm_projector" and not inside and not isinstance(module, nn.ModuleList):
            found.append(path)
    return found


def apply_lora(model: Any, args: Any, decoder: nn.Module) -> Any:
    """Put adapters on the linear layers of the decoder; projectors that learn are saved with them.

    Raises:
        ValueError: a part that LoRA cannot leave whole, or a decoder without linear layers.
    """
    training, parts = args.training, args.model.parts
    if "mm_vision_tower" in parts:
        raise ValueError("--mm_tunable_parts: with --lora_enable the vision tower stays frozen; leave it out")
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith(f"{prefix}.")
    ]
    if not paths:
        raise ValueError("--lora_enable True: the language model has no linear layer")
    learns = "mm_mlp_adapter" in parts and not training.freeze_mm_mlp_adapter
    return adapt(model, training, paths, modules_to_save=projectors(model) if learns else None)


def set_trainable(model: nn.Module, args: Any) -> None:
    """Freeze and free the parts of a model that is trained in full."""
    parts = args.model.parts - ({"mm_mlp_adapter"} if args.training.freeze_mm_mlp_adapter else set())
    for name, parameter in model.named_parameters():
        part = "mm_projector" if name.endswith("image_newline") else part_of(name)
        parameter.requires_grad_(_PART_FLAGS[part] in parts)


def visual_ids(config: Any) -> set[int]:
    """The tokens that stand for pictures in a model's prompts."""
    found = {getattr(config, name, None) for name in ("image_token_id", "video_token_id")}
    return {token for token in found if token is not None}


def prepare_for_zero3(model: Any, training: Any, model_type: str) -> None:
    """Let ZeRO-3 gather tower and projector as a whole, once in a pass.

    A tower is not called as one module while DUET is attached, and how often its parts are depends on the pictures:
    gathering at every part's call would make ranks with other pictures wait for each other for ever.
    """
    from deepspeed.runtime.zero import register_external_parameter

    body = base_model(model)
    decoder = FAMILIES.get(model_type).decoder(body)  # type: ignore[attr-defined]
    own = {id(parameter) for part in (decoder, body.get_output_embeddings()) for parameter in part.parameters()}
    _mark_frozen_leaves(body, own)
    outside = [parameter for parameter in body.parameters() if id(parameter) not in own]
    for parameter in outside:
        register_external_parameter(body, parameter)
    tower_learns = any(
        value.requires_grad and part_of(name) == "vision_tower" for name, value in body.named_parameters()
    )
    if tower_learns or model_type in TILED:
        # Parts that have hooks are called differently often; the order of what is fetched ahead must not depend on it.
        training.hf_deepspeed_config.config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0


def _mark_frozen_leaves(module: nn.Module, decoder: set[int]) -> None:
    """Take the hooks of ZeRO-3 off the largest modules that hold nothing that learns and nothing of the decoder."""
    from deepspeed.utils import set_z3_leaf_module

    parameters = list(module.parameters())
    if any(id(parameter) in decoder for parameter in parameters) or any(p.requires_grad for p in parameters):
        for child in module.children():
            if not any(id(parameter) in decoder for parameter in child.parameters(recurse=False)):
                _mark_frozen_leaves(child, decoder)
    elif parameters:
        set_z3_leaf_module(module, True)


def build(args: Any, attention: str) -> tuple[Any, Chat]:
    """Build the model and what makes its samples.

    Raises:
        ValueError: an unsupported model, or flags that do not fit it.
    """
    path, training = args.model.model_name_or_path, args.training
    model_type = model_type_of(path, training.cache_dir)
    config = AutoConfig.from_pretrained(path, cache_dir=training.cache_dir)
    processor = load_processor(path, config, training.cache_dir, args.model.chat_template)
    processor.tokenizer.padding_side = "right"
    chat = Chat(processor, visual_ids(config), training.model_max_length)
    reduction = reduction_of(args, model_type, DuetConfig.from_model_config(config))
    model = load_model(args, model_type, attention)
    if training.loss_normalization == "global":
        logger.info("losses are averaged over the answers' tokens of all devices")
    if training.lora_enable:
        # Adapters start the same whatever loading drew before them: ZeRO-3 draws other numbers than one rank does.
        set_seed(training.seed)
        model = apply_lora(model, args, FAMILIES.get(model_type).decoder(model))  # type: ignore[attr-defined]
    else:
        set_trainable(model, args)
    if training.gradient_checkpointing:
        model.enable_input_require_grads()
    if reduction is not None:
        duet.attach(model, reduction)
    if training.deepspeed:
        unify_dtype(model, training)
    else:
        widen_trainable(model)
    return model, chat


def takes_videos(config: Any) -> bool:
    """Whether a model can be trained on videos here."""
    return config.model_type in FRAMES_LIKE_PICTURES
