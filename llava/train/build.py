"""From flags to a model that is ready to train."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, set_seed

from duet.attach import base_model
from llava import conversation as conversation_lib
from llava.mm_utils import read_pinpoints
from llava.model.anyres import MERGE_TYPES, Tiling, TokenCounter
from llava.model.hf_layout import hf_model_type, is_hf_llava
from llava.model.language_model.causal_lm import clean_generation_config
from llava.reduction import preset_for
from llava.tokenization import load_tokenizer
from llava.train.arguments import RunArguments
from llava.train.lora import apply_lora, quantization_config, settle_quantized_dtypes

logger = logging.getLogger(__name__)

TUNABLE = {"mm_mlp_adapter", "mm_vision_tower", "mm_language_model"}


def smart_tokenizer_and_embedding_resize(special_tokens_dict: dict[str, str], tokenizer: Any, model: Any) -> None:
    """Add special tokens; their new embedding rows start as the mean of the old ones (LLaVA's name)."""
    added = tokenizer.add_special_tokens(special_tokens_dict)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if added == 0:
        return
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            with torch.no_grad():
                layer.weight[-added:] = layer.weight[:-added].mean(dim=0, keepdim=True)


def model_class(path: str, cache_dir: str | None, multimodal: bool) -> Any:
    """Choose the model class by what the checkpoint's config says, never by its name.

    Raises:
        ValueError: an MPT base, which LLaVA-1.5 does not use.
    """
    if not multimodal:
        return AutoModelForCausalLM
    raw = PreTrainedConfig.get_config_dict(path, cache_dir=cache_dir)[0]
    kind = hf_model_type(raw) if is_hf_llava(raw) else raw.get("model_type", "")
    if "mpt" in kind:
        raise ValueError(f"{path} is an MPT model; MPT backbones are not supported, use a Llama or Mistral one")
    if "mistral" in kind:
        from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM

        return LlavaMistralForCausalLM
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    return LlavaLlamaForCausalLM


def load_base(args: RunArguments, attention: str) -> Any:
    """Load the base weights, quantised when asked."""
    training, model_args = args.training, args.model
    path = model_args.model_name_or_path
    assert path is not None
    options: dict[str, Any] = {"attn_implementation": attention, "cache_dir": training.cache_dir}
    options["dtype"] = torch.bfloat16 if training.bf16 else torch.float32
    quantization = quantization_config(training)
    if quantization is not None:
        options["quantization_config"] = quantization
        options["device_map"] = {"": training.device}
    model = model_class(path, training.cache_dir, model_args.vision_tower is not None).from_pretrained(path, **options)
    model.config.use_cache = False
    clean_generation_config(getattr(model, "generation_config", None))
    return model


def set_up_tokenizer(args: RunArguments, model: Any) -> Any:
    """Load the tokenizer and choose the conversation template.

    Returns:
        The tokenizer; the template becomes `llava.conversation.default_conversation`.
    """
    tokenizer = load_tokenizer(args.model.model_name_or_path or "", model_max_length=args.training.model_max_length)
    version = args.model.version or "v0"
    if version == "v0":
        if tokenizer.pad_token is None:
            smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
    else:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    templates = conversation_lib.conv_templates
    if version != "v0.5":
        known = version if version in templates else "vicuna_v1"
        if known != version:
            logger.warning("--version %s is not a known template: using vicuna_v1", version)
        conversation_lib.set_default_conversation(known)
        model.config.conv_version = known
    return tokenizer


def set_up_vision(args: RunArguments, model: Any, tokenizer: Any) -> None:
    """Build tower and projector, and write what belongs to them into the config and the data flags."""
    model_args, data, training = args.model, args.data, args.training
    inner = base_model(model)
    before = getattr(inner.config, "image_aspect_ratio", None)
    if before is not None and before != data.image_aspect_ratio and "anyres" in (before, data.image_aspect_ratio):
        logger.warning(
            "%s has image_aspect_ratio %r and is now trained with %r, as --image_aspect_ratio says",
            model_args.model_name_or_path, before, data.image_aspect_ratio,
        )  # fmt: skip
    inner.get_model().initialize_vision_modules(model_args=model_args, fsdp=training.fsdp)
    tower = inner.get_vision_tower()
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    tower.to(dtype=dtype, device=training.device)
    data.image_processor = tower.image_processor
    data.is_multimodal = True
    config = inner.config
    config.image_aspect_ratio = data.image_aspect_ratio
    set_up_tiles(args, config, tower)
    config.tokenizer_padding_side = tokenizer.padding_side
    config.tokenizer_model_max_length = training.tokenizer_model_max_length or training.model_max_length
    config.mm_projector_lr = training.mm_projector_lr
    config.mm_vision_tower_lr = training.mm_vision_tower_lr
    config.mm_use_im_start_end = data.mm_use_im_start_end = model_args.mm_use_im_start_end
    config.mm_use_im_patch_token = model_args.mm_use_im_patch_token
    training.use_im_start_end = model_args.mm_use_im_start_end
    inner.initialize_vision_tokenizer(model_args, tokenizer=tokenizer)
    reduction = args.reduction.to_config(inner.reduction, preset_for(config))
    inner.set_reduction(reduction)
    if training.loss_normalization == "global":
        config.loss_normalization = "global"
    # Whole turns that would not fit the context with their images are left out by the dataset.
    patches = tower.num_patches
    data.visual_tokens_per_image = patches if reduction is None else reduction.entering_tokens(patches)
    if data.image_aspect_ratio == "anyres":
        data.count_visual_tokens = TokenCounter(Tiling.of(config, tower.config), reduction)
        data.visual_tokens_per_image = data.count_visual_tokens.most()


def set_up_tiles(args: RunArguments, config: Any, tower: Any) -> None:
    """Write how pictures are cut into tiles into the config and the data flags.

    Raises:
        ValueError: pinpoints that are missing or cannot be used, or tiles to be laid out where there are none.
    """
    data = args.data
    if data.image_grid_pinpoints is not None:
        config.image_grid_pinpoints = data.image_grid_pinpoints
    if data.image_aspect_ratio == "anyres":
        # A checkpoint that was trained with tiles brings its own.
        data.image_grid_pinpoints = getattr(config, "image_grid_pinpoints", None)
        try:
            read_pinpoints(data.image_grid_pinpoints, tower.config.image_size)
        except ValueError as error:
            raise ValueError(f"--image_aspect_ratio anyres: {error}") from error
    elif data.image_aspect_ratio.startswith("anyres"):
        raise ValueError(f"--image_aspect_ratio {data.image_aspect_ratio}: expected square, pad or anyres")
    merge = config.mm_patch_merge_type or "flat"
    if merge not in MERGE_TYPES:
        raise ValueError(f"--mm_patch_merge_type {merge}: expected {', '.join(MERGE_TYPES)}")
    if merge != "flat" and data.image_aspect_ratio != "anyres":
        raise ValueError(
            f"--mm_patch_merge_type {merge} lays out the tiles of pictures, so it needs --image_aspect_ratio anyres"
        )


def tunable_parts(args: RunArguments) -> set[str]:
    """Which of `mm_mlp_adapter`, `mm_vision_tower`, `mm_language_model` learn.

    Raises:
        ValueError: `--mm_tunable_parts` names an unknown part.
    """
    model_args, training = args.model, args.training
    if model_args.mm_tunable_parts is not None:
        parts = {part.strip() for part in model_args.mm_tunable_parts.split(",") if part.strip()}
        if not parts or parts - TUNABLE:
            raise ValueError(
                f"--mm_tunable_parts {model_args.mm_tunable_parts}: expected a comma list of {sorted(TUNABLE)}"
            )
        return parts
    if model_args.tune_mm_mlp_adapter:
        parts = {"mm_mlp_adapter"}
    else:
        parts = set(TUNABLE - {"mm_vision_tower"})
        if training.freeze_mm_mlp_adapter:
            parts.discard("mm_mlp_adapter")
        if model_args.freeze_backbone:
            parts.discard("mm_language_model")
    if model_args.unfreeze_mm_vision_tower:
        parts.add("mm_vision_tower")
    return parts


def set_trainable(args: RunArguments, model: Any) -> None:
    """Freeze and free the parts of the model, and record the choice in its config."""
    parts = tunable_parts(args)
    training = args.training
    for name, parameter in model.named_parameters():
        keys = name.split(".")
        if "lora_" in name or not parameter.is_floating_point():
            continue
        if "vision_tower" in keys:
            parameter.requires_grad_("mm_vision_tower" in parts)
        elif "mm_projector" in keys or name.endswith("image_newline"):
            parameter.requires_grad_("mm_mlp_adapter" in parts)
        elif training.lora_enable:
            continue  # PEFT has frozen what is not an adapter, and freed the biases that --lora_bias asks for
        elif "mm_language_model" in parts:
            # The head of freeze_backbone runs stays free in LLaVA; embeddings that new tokens need are left alone.
            parameter.requires_grad_(True)
        elif not (args.model.freeze_backbone and keys[0] == "lm_head") and not _is_new_embedding(args, keys):
            parameter.requires_grad_(False)
    config = model.config
    config.tune_mm_mlp_adapter = training.tune_mm_mlp_adapter = parts == {"mm_mlp_adapter"}
    config.freeze_mm_mlp_adapter = "mm_mlp_adapter" not in parts
    config.unfreeze_mm_vision_tower = "mm_vision_tower" in parts


def _is_new_embedding(args: RunArguments, keys: list[str]) -> bool:
    return args.model.mm_use_im_start_end and args.model.tune_mm_mlp_adapter and "embed_tokens" in keys


def widen_trainable(model: torch.nn.Module) -> None:
    """Keep what learns in fp32, so that small updates are not rounded away; DeepSpeed does this itself."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def unify_dtype(model: torch.nn.Module, training: Any) -> None:
    """Give the parts that were built outside of ZeRO-3's partitioning its number type.

    DeepSpeed casts a whole model, but not one that is already partitioned; it needs one type and keeps fp32 masters.
    """
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def build(args: RunArguments, attention: str) -> tuple[Any, Any]:
    """Build the model and the tokenizer of a run.

    Args:
        args: all flags; `data.image_processor`, `data.is_multimodal` and `data.mm_use_im_start_end` are filled in.
        attention: attention kernel.

    Returns:
        The model (a PEFT model for LoRA) and the tokenizer.

    Raises:
        ValueError: flags or weights that do not fit together; the message names them.
    """
    training, model_args = args.training, args.model
    model: Any = load_base(args, attention)
    if model_args.freeze_backbone:
        model.get_decoder().requires_grad_(False)
    if training.bits != 16:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(training.gradient_checkpointing))
    tokenizer = set_up_tokenizer(args, model)
    if training.lora_enable:
        # Adapters start the same whatever loading drew before them: ZeRO-3 draws other numbers than one rank does.
        set_seed(training.seed)
        model = apply_lora(model, training)
    if model_args.vision_tower is not None:
        set_up_vision(args, model, tokenizer)
        set_trainable(args, model)
    elif args.reduction.to_config(None) is not None:
        raise ValueError("DUET flags were given without --vision_tower: a text-only run has no visual tokens to reduce")
    if training.bits != 16:
        settle_quantized_dtypes(model, training.bf16)
    if training.gradient_checkpointing:
        model.enable_input_require_grads()
    if not training.deepspeed:
        widen_trainable(model)
    elif training.bits == 16:
        unify_dtype(model, training)
    if training.feature_cache is not None and model_args.vision_tower is not None:
        set_up_feature_cache(args, model)
    remember_base(model, model_args.model_name_or_path)
    return model, tokenizer


def set_up_feature_cache(args: RunArguments, model: Any) -> None:
    """Keep what the frozen tower makes of pictures in the folder that `--feature_cache` names.

    Raises:
        ValueError: the features depend on more than the picture, or pictures are cut into tiles.
    """
    if args.data.image_aspect_ratio == "anyres":
        raise ValueError("--feature_cache keeps whole pictures; it does not work with --image_aspect_ratio anyres")
    inner = base_model(model)
    inner.get_vision_tower().keep_features(args.training.feature_cache, inner.reduction)


def remember_base(model: Any, path: str | None) -> None:
    """Give relative local paths that a checkpoint stores an absolute form, so that it loads from any directory."""
    config = model.config
    tower = getattr(config, "mm_vision_tower", None)
    if isinstance(tower, str) and Path(tower).is_dir():
        config.mm_vision_tower = str(Path(tower).resolve())
    if path and Path(path).is_dir():
        config._name_or_path = str(Path(path).resolve())
