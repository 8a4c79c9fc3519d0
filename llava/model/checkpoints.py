"""Checkpoint files: key names of the layouts in use, projector files, and a strict report of what did not fit.

Three layouts hold the same weights. "Ours" is what a model has in memory; it differs from LLaVA's files only in the
`vision_model.` level that CLIP lost in transformers 5. Files are written in LLaVA's layout.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
TOWER_PREFIX = "model.vision_tower."
_NEW_TOWER = "model.vision_tower.vision_tower."
_OLD_TOWER = _NEW_TOWER + "vision_model."
_PROJECTOR_MARK = "mm_projector."
NEWLINE_KEY = "image_newline"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Regular expressions for keys of llava-hf: hub files, and the names that transformers 5 has in memory.
HF_KEY_MAPPING = {
    r"^(?:model\.)?language_model\.model\.": "model.",
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.(?!model\.|lm_head\.)": "model.",
    r"^(?:model\.)?multi_modal_projector\.linear_1\.": "model.mm_projector.0.",
    r"^(?:model\.)?multi_modal_projector\.linear_2\.": "model.mm_projector.2.",
    r"^(?:model\.)?vision_tower\.vision_model\.": _NEW_TOWER,
    r"^(?:model\.)?vision_tower\.(?!vision_tower\.|vision_model\.)": _NEW_TOWER,
    r"^image_newline$": "model.image_newline",
}


def to_original_key(key: str) -> str:
    """Name of one of our keys in LLaVA's files (old CLIP layout)."""
    if key.startswith(_NEW_TOWER) and not key.startswith(_OLD_TOWER):
        return _OLD_TOWER + key[len(_NEW_TOWER) :]
    return key


def to_own_key(key: str) -> str:
    """Our name for a key of any layout: LLaVA's, llava-hf's, or ours."""
    if key.startswith(_OLD_TOWER):
        return _NEW_TOWER + key[len(_OLD_TOWER) :]
    if key.startswith((_NEW_TOWER, "model.mm_projector.")):
        return key
    for pattern, replacement in HF_KEY_MAPPING.items():
        if re.match(pattern, key):
            return re.sub(pattern, replacement, key)
    return key


def to_hf_key(key: str) -> str:
    """Name of one of our keys in transformers 5's `LlavaForConditionalGeneration` or `LlavaNextForConditional...`.

    Raises:
        ValueError: The key has no place there (a projector that is not `mlp2x_gelu`, an unknown part).
    """
    for own, other in (
        ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
        (_OLD_TOWER, "model.vision_tower."),
        (_NEW_TOWER, "model.vision_tower."),
        ("lm_head.", "lm_head."),
        ("model.image_newline", "model.image_newline"),
    ):
        if key.startswith(own):
            return other + key[len(own) :]
    if key.startswith("model.mm_projector.") or not key.startswith("model."):
        raise ValueError(f"{key}: llava-hf has no place for this weight; it knows the mlp2x_gelu projector only")
    return "model.language_model." + key[len("model.") :]


def to_hub_key(key: str) -> str:
    """Name in llava-hf's hub files of a key that transformers 5 has in memory."""
    for memory, hub in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.image_newline", "image_newline"),
    ):
        if key.startswith(memory):
            return hub + key[len(memory) :]
    return key


def to_original_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a whole state dict to LLaVA's layout. Keys that already are stay as they are."""
    return {to_original_key(key): tensor for key, tensor in state.items()}


def read_tensors(path: str) -> dict[str, Tensor]:
    """Read one .safetensors or .bin/.pt file.

    Raises:
        ValueError: The file cannot be read as either.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable checkpoint file ({error})") from error
    except Exception as error:
        # safetensors and pickle raise types of their own for damaged files.
        if type(error).__name__ not in ("SafetensorError", "UnpicklingError"):
            raise
        raise ValueError(f"{path}: not a readable checkpoint file ({error})") from error


def tensor_sizes(path: str) -> list[tuple[torch.dtype, int]]:
    """Return dtype and number of elements of each tensor in one .safetensors or .bin/.pt file.

    Of safetensors only the header is read, and types that are no floats are given as uint8.

    Raises:
        ValueError: The file cannot be read as either.
    """
    if not path.endswith(".safetensors"):
        return [(tensor.dtype, tensor.numel()) for tensor in read_tensors(path).values()]
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            parts = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118  (no mapping)
            return [(_FLOATS.get(part.get_dtype(), torch.uint8), math.prod(part.get_shape())) for part in parts]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable checkpoint file ({error})") from error


def find_file(folder: str, names: Iterable[str]) -> str | None:
    """Return the first of `names` that exists in `folder`, or None."""
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    return None


def weight_files(folder: str) -> list[str]:
    """List the files that hold a model's weights, whole or in shards, safetensors before .bin."""
    for suffix in (".safetensors", ".bin"):
        pattern = re.compile(rf"^(model|pytorch_model)(-\d{{5}}-of-\d{{5}})?{re.escape(suffix)}$")
        found = sorted(name for name in os.listdir(folder) if pattern.match(name))
        if found:
            return [os.path.join(folder, name) for name in found]
    return []


def read_projector_file(path: str) -> dict[str, Tensor]:
    """Read the tensors of a projector file, or of the folder that has one.

    Args:
        path: `mm_projector.bin`, a safetensors file, or a folder: of a projector, a LoRA run, or a whole model.

    Raises:
        FileNotFoundError: Nothing there.
        ValueError: The file cannot be read.
    """
    if os.path.isfile(path):
        return read_tensors(path)
    if not os.path.isdir(path):
        raise FileNotFoundError(
            f"projector {path!r} does not exist: give mm_projector.bin, mm_projector.safetensors or a folder"
        )
    single = find_file(path, (*PROJECTOR_FILES, *NON_LORA_FILES))
    tensors: dict[str, Tensor] = {}
    for file in [single] if single else weight_files(path):
        tensors.update(read_tensors(file))
    if not tensors:
        raise FileNotFoundError(
            f"{path}: no mm_projector.bin, mm_projector.safetensors or model weights in this folder"
        )
    return tensors


def projector_state(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Pick the projector's weights, whatever prefix they were saved under.

    Args:
        tensors: keys such as `model.mm_projector.0.weight`, `base_model.model.model.mm_projector...`, `module....`, or
            llava-hf's `multi_modal_projector.linear_1...`; a file of bare `0.weight` keys works too.
        source: file name for the error.

    Raises:
        ValueError: No key belongs to a projector.
    """
    found = {}
    for key, tensor in tensors.items():
        own = to_own_key(key) if "multi_modal_projector" in key else key
        if _PROJECTOR_MARK in own:
            found[own.split(_PROJECTOR_MARK, 1)[1]] = tensor
    if not found and all(re.match(r"^(\d+\.)?(weight|bias)$", key) for key in tensors):
        found = dict(tensors)
    if not found:
        some = ", ".join(list(tensors)[:5]) or "none"
        raise ValueError(
            f"{source}: no key contains 'mm_projector.', so there is no projector in it (keys: {some} ...)"
        )
    return found


def gathered(parameters: Iterable[Tensor]) -> contextlib.AbstractContextManager:
    """Return a context in which partitioned parameters are whole and changes on rank 0 reach every rank.

    Outside ZeRO-3 it does nothing. Every rank must enter it.
    """
    parameters = list(parameters)
    if not any(map(_partitioned, parameters)):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 has spread a module's weights over the ranks, which all have to call it together then."""
    return any(map(_partitioned, module.parameters()))


def copy_into(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a complete state into a module, under ZeRO-3 too.

    Raises:
        ValueError: A key is missing, unknown, or has another shape; the message names it.
    """
    parameters = dict(module.named_parameters()) | dict(module.named_buffers())
    report_mismatch(sorted(set(parameters) - set(state)), sorted(set(state) - set(parameters)), source)
    with torch.no_grad(), gathered(module.parameters()):
        for name, parameter in parameters.items():
            if parameter.shape != state[name].shape:
                raise ValueError(
                    f"{source}: {name} has shape {tuple(state[name].shape)}, the model needs {tuple(parameter.shape)}; "
                    "was the file made for another language model or projector type?"
                )
            parameter.copy_(state[name].to(device=parameter.device, dtype=parameter.dtype))


def newline_state(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Pick LLaVA-1.6's `image_newline` [D], whatever prefix it was saved under; None where there is none."""
    return next((tensor for key, tensor in tensors.items() if key.rsplit(".", 1)[-1] == NEWLINE_KEY), None)


def load_projector_weights(model: Any, path: str, newline_may_be_missing: bool = False) -> None:
    """Load projector weights from a file or folder into a model, and `image_newline` if the model has one.

    Args:
        model: A LLaVA model, its inner decoder, or a PEFT wrap of it; partitioned by ZeRO-3 or not.
        path: See `read_projector_file`.
        newline_may_be_missing: Leave the model's own newline where the file has none, as LLaVA-1.5's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No projector weights in it, or they do not fit; the message names file and key.
    """
    projector = next((m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] == "mm_projector"), None)
    if projector is None:
        raise ValueError("this model has no mm_projector; call initialize_vision_modules first")
    tensors = read_projector_file(path)
    copy_into(projector, projector_state(tensors, path), path)
    newlines = {name: p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == NEWLINE_KEY}
    stored = newline_state(tensors)
    if newlines and stored is not None:
        load_partial(model, dict.fromkeys(newlines, stored), path)
    elif newlines and not newline_may_be_missing:
        raise ValueError(
            f"{path}: no {NEWLINE_KEY}, which mm_patch_merge_type='spatial_unpad' needs; take the file of a run that "
            "was trained with it"
        )


def strip_non_lora_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo the prefixes that a PEFT wrap put on `non_lora_trainables` keys."""
    stripped = {key.removeprefix("module.").removeprefix("base_model."): tensor for key, tensor in tensors.items()}
    if any(key.startswith("model.model.") for key in stripped):
        stripped = {key.removeprefix("model."): tensor for key, tensor in stripped.items()}
    return {to_own_key(key): tensor for key, tensor in stripped.items()}


def load_partial(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> list[str]:
    """Copy some weights into a model. Every one of them must have a place.

    Args:
        model: The model.
        tensors: Our key names.
        source: File name for errors.

    Returns:
        The keys that were loaded.

    Raises:
        ValueError: A key is unknown or has another shape.
    """
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    report_mismatch([], sorted(set(tensors) - set(parameters)), source)
    with torch.no_grad(), gathered(parameters[key] for key in tensors if isinstance(parameters[key], nn.Parameter)):
        for key, tensor in tensors.items():
            if parameters[key].shape != tensor.shape:
                raise ValueError(
                    f"{source}: {key} has shape {tuple(tensor.shape)}, the model needs {tuple(parameters[key].shape)}"
                )
            parameters[key].copy_(tensor.to(device=parameters[key].device, dtype=parameters[key].dtype))
    return sorted(tensors)


def report_mismatch(missing: Iterable[str], unexpected: Iterable[str], source: str) -> None:
    """Raise when a checkpoint and a model disagree on what weights there are.

    Raises:
        ValueError: Names the missing and unexpected keys.
    """
    missing, unexpected = list(missing), list(unexpected)
    if not missing and not unexpected:
        return
    parts = [
        f"{len(keys)} {kind} key(s): {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    raise ValueError(
        f"checkpoint {source} does not fit the model: {'; '.join(parts)}. "
        "Is it complete, and does its config.json describe these weights?"
    )
