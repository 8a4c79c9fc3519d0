"""Arithmetic on whole checkpoint folders: read all weights, change them, write them with what lies beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch import Tensor

from llava.model.checkpoints import read_tensors, weight_files

_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")
_WEIGHTS = ("*.safetensors", "*.bin")
EXTENDED = ("model.embed_tokens.weight", "lm_head.weight")
"""Weights with a row for each token; a model may have more of them than its base."""


def folder_of(path: str) -> Path:
    """The folder of a checkpoint; one that is on the hub is downloaded.

    Raises:
        FileNotFoundError: it looks local and is not there.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return Path(path)
    if os.path.isabs(path) or path.startswith(".") or path.count("/") != 1:
        raise FileNotFoundError(f"{path} does not exist; give a checkpoint folder or a hub name (owner/name)")
    return Path(snapshot_download(path, allow_patterns=[*_BESIDE, *_WEIGHTS]))


def read_weights(folder: Path, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """All weights of a folder, whole or in shards, in one number type.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file cannot be read.
    """
    files = weight_files(str(folder))
    if not files:
        raise FileNotFoundError(f"{folder} holds no model weights (model*.safetensors or pytorch_model*.bin)")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= {name: tensor.to(dtype) for name, tensor in read_tensors(file).items()}
    return weights


def write_weights(weights: dict[str, Tensor], folder: Path, like: Path) -> None:
    """Write a checkpoint: these weights, and config, tokenizer and the other small files of another folder.

    Raises:
        ValueError: the folder holds a model already.
    """
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} already holds a model; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict({name: tensor.contiguous() for name, tensor in weights.items()}, folder)
    for pattern in _BESIDE:
        for file in sorted(like.glob(pattern)):
            # An index names the shards of the old files.
            if not file.name.endswith(".index.json"):
                shutil.copy(file, folder / file.name)


def combine(
    weights: dict[str, Tensor], base: dict[str, Tensor], change: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Change every weight that a base model has as well; projector and tower stay as they are.

    Args:
        weights: a LLaVA model's, or its difference to the base.
        base: the language model's.
        change: of a weight and the base's, both of one shape.

    Raises:
        ValueError: a weight is in neither of the parts that a base lacks, or has another shape than the base's.
    """
    result = {}
    for name, tensor in weights.items():
        if name not in base:
            if "mm_projector" not in name and "vision_tower" not in name and "image_newline" not in name:
                raise ValueError(f"{name} is not in the base model; was this checkpoint made from another one?")
            result[name] = tensor
            continue
        other = base[name]
        rows = slice(0, len(other)) if name in EXTENDED else slice(None)
        if tensor[rows].shape != other.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the base model's is {tuple(other.shape)}")
        result[name] = tensor.clone()
        result[name][rows] = change(tensor[rows], other)
    return result
