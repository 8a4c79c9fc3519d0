"""LoRA and QLoRA: where adapters go, and how their state is gathered."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.model.checkpoints import gathered, load_partial, read_tensors

logger = logging.getLogger(__name__)

NOT_ADAPTED = ("mm_projector", "vision_tower", "vision_resampler", "lm_head")


def maybe_zero_3(param: torch.Tensor, ignore_status: bool = False, name: str | None = None) -> torch.Tensor:
    """Copy one parameter to the CPU, gathering it first under ZeRO-3 (LLaVA's name and signature)."""
    with gathered([param] if isinstance(param, nn.Parameter) else []):
        return param.detach().cpu().clone()


def _collect(
    named: Iterable[tuple[str, torch.Tensor]], wanted: Callable[[str, torch.Tensor], bool]
) -> dict[str, torch.Tensor]:
    return {name: maybe_zero_3(value, ignore_status=True, name=name) for name, value in named if wanted(name, value)}


def get_peft_state_maybe_zero_3(named_params: Iterable[tuple[str, torch.Tensor]], bias: str) -> dict[str, torch.Tensor]:
    """State of the LoRA layers.

    Args:
        named_params: of the adapted model.
        bias: `none`, `all` (every bias) or `lora_only` (the biases of adapted layers).

    Raises:
        ValueError: another `bias`.
    """
    named = list(named_params)
    if bias == "none":
        return _collect(named, lambda name, _: "lora_" in name)
    if bias == "all":
        return _collect(named, lambda name, _: "lora_" in name or "bias" in name)
    if bias == "lora_only":
        adapted = {name.split("lora_")[0] for name, _ in named if "lora_" in name}
        return _collect(
            named,
            lambda name, _: (
                "lora_" in name or ("bias" in name and name.replace("base_layer.", "").removesuffix("bias") in adapted)
            ),
        )
    raise ValueError(f"lora_bias {bias!r}: expected none, all or lora_only")


def get_peft_state_non_lora_maybe_zero_3(
    named_params: Iterable[tuple[str, torch.Tensor]], require_grad_only: bool = True
) -> dict[str, torch.Tensor]:
    """State of everything that learns beside the LoRA layers (the projector)."""
    return _collect(
        named_params, lambda name, value: "lora_" not in name and (value.requires_grad or not require_grad_only)
    )


def get_mm_adapter_state_maybe_zero_3(
    named_params: Iterable[tuple[str, torch.Tensor]], keys_to_match: Iterable[str]
) -> dict[str, torch.Tensor]:
    """State of the parameters whose names contain one of the keys."""
    keys = tuple(keys_to_match)
    return _collect(named_params, lambda name, _: any(key in name for key in keys))


def find_all_linear_names(model: nn.Module) -> list[str]:
    """Leaf names of the linear layers that LoRA adapts: those of the decoder, never of the tower, projector or head."""
    return sorted({path.rsplit(".", 1)[-1] for path in adapted_paths(model)})


def adapted_paths(model: nn.Module) -> list[str]:
    """Full paths of the decoder's linear layers."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in path.split(".") for part in NOT_ADAPTED)
    ]


def targets_pattern(paths: Iterable[str]) -> str:
    """One regular expression that matches exactly the given kind of paths, whatever the layer's number."""
    return "|".join(sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(path)) for path in paths}))


def apply_lora(model: nn.Module, args: Any) -> nn.Module:
    """Wrap the decoder with LoRA adapters.

    Leaf names alone would also match the tower's q, k and v projections, so the targets are given by their full paths.

    Args:
        model: the LLaVA model, in place.
        args: the training arguments (`lora_*`).

    Returns:
        The PEFT model.

    Raises:
        ImportError: peft is not installed.  ValueError: the model has no linear layer to adapt.
    """
    paths = adapted_paths(model)
    if not paths:
        raise ValueError("--lora_enable True: the model has no linear layer outside the vision tower and the projector")
    return adapt(model, args, paths, task_type="CAUSAL_LM")


def adapt(model: Any, args: Any, paths: list[str], **further: Any) -> Any:
    """Put adapters on the modules with the given paths, and start them from `--lora_weight_path` if it is given.

    Args:
        model: in place.
        args: the training arguments (`lora_*`).
        paths: of linear layers.
        **further: for `peft.LoraConfig`.
    """
    from peft import LoraConfig, get_peft_model

    bias: Any = args.lora_bias
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        target_modules=targets_pattern(paths),
        lora_dropout=args.lora_dropout,
        bias=bias,
        **further,
    )
    adapted = get_peft_model(model, config)
    if args.lora_weight_path:
        load_adapter(adapted, args.lora_weight_path)
    return adapted


def load_adapter(model: Any, folder: str | Path) -> None:
    """Put saved adapter weights, and the projector beside them, into an adapted model.

    Args:
        model: the PEFT model.
        folder: has `adapter_model.safetensors` (or `.bin`) and, where the projector learned, `non_lora_trainables.bin`.

    Raises:
        FileNotFoundError: no adapter there.  ValueError: weights that fit nothing in the model.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise FileNotFoundError(f"{folder}: no adapter_model.safetensors or adapter_model.bin")
    weights = load_peft_weights(str(folder), device="cpu")
    with gathered((value for name, value in model.named_parameters() if "lora_" in name)):
        result = set_peft_model_state_dict(model, weights)
    if result.unexpected_keys:
        raise ValueError(
            f"{folder}: {len(result.unexpected_keys)} adapter weights fit nothing, e.g. {result.unexpected_keys[0]}"
        )
    absent = [name for name in result.missing_keys if "lora_" in name]
    if absent:
        raise ValueError(f"{folder}: {len(absent)} adapter weights are missing, e.g. {absent[0]}")
    rest = folder / "non_lora_trainables.bin"
    if rest.is_file():
        load_partial(model, read_tensors(str(rest)), str(rest))


def quantization_config(args: Any) -> Any | None:
    """bitsandbytes settings for `--bits 4` and `--bits 8`; None for 16.

    The projector, the tower and the head stay in full width.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if args.bits == 16:
        return None
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"--bits {args.bits} needs bitsandbytes: pip install -e '.[train]'")
    from transformers import BitsAndBytesConfig

    from llava.model.builder import KEPT_PRECISE

    return BitsAndBytesConfig(
        load_in_4bit=args.bits == 4,
        load_in_8bit=args.bits == 8,
        llm_int8_skip_modules=list(KEPT_PRECISE),
        llm_int8_threshold=6.0,
        llm_int8_has_fp16_weight=False,
        bnb_4bit_compute_dtype=args.compute_dtype,
        bnb_4bit_use_double_quant=args.double_quant,
        bnb_4bit_quant_type=args.quant_type,
    )


def settle_quantized_dtypes(model: nn.Module, bf16: bool) -> None:
    """After a quantised load: norms in fp32; adapters, head and embedding in bf16 when that is the compute type.

    Source: LLaVA's QLoRA recipe.
    """
    for name, module in model.named_modules():
        if "vision_tower" in name or "mm_projector" in name:
            continue
        is_lora = any(part in name.split(".") for part in ("lora_A", "lora_B"))
        if is_lora and bf16:
            module.to(torch.bfloat16)
        elif "norm" in name.rsplit(".", 1)[-1]:
            module.to(torch.float32)
        elif bf16 and name.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens"):
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dtype == torch.float32:
                module.to(torch.bfloat16)
