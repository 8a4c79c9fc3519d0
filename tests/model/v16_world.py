"""A tiny random LLaVA-1.6 for the tests of anyres: towers of 24-pixel tiles with 6 x 6 patches, four decoder layers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_helpers import LLAVA
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from llava.model import LlavaConfig, LlavaLlamaForCausalLM, LlavaMistralConfig, LlavaMistralForCausalLM

TILE, SIDE, WIDTH = 24, 6, 32
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
SIZES = [(45, 20), (22, 40), (48, 48), (60, 9), (24, 24), (30, 31)]
"""(width, height) of pictures: every grid but one, much and little border."""
_TEXT: dict[str, Any] = {
    "vocab_size": 2000, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_TOWER = CLIPVisionConfig(
    hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=TILE, patch_size=4,
    initializer_range=0.3,
)  # fmt: skip


def write_tower(folder: Path) -> Path:
    """Write a random vision tower with its preprocessing."""
    torch.manual_seed(1)
    CLIPVisionModel(_TOWER).save_pretrained(folder)
    side = {"height": TILE, "width": TILE}
    CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size=side).save_pretrained(folder)
    return folder


def write_original(folder: Path, tower: Path, mistral: bool = False, **config: Any) -> Path:
    """Write a checkpoint in LLaVA's own layout: random weights, a tower of its own, `image_newline`, a tokenizer."""
    values = _TEXT | {
        "mm_vision_tower": str(tower), "mm_hidden_size": WIDTH, "mm_projector_type": "mlp2x_gelu", "use_mm_proj": True,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "spatial_unpad",
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": PINPOINTS, "unfreeze_mm_vision_tower": True, "tokenizer_padding_side": "right",
    }  # fmt: skip
    torch.manual_seed(0)
    classes: tuple[Any, Any] = (
        (LlavaMistralForCausalLM, LlavaMistralConfig) if mistral else (LlavaLlamaForCausalLM, LlavaConfig)
    )
    cls, kind = classes
    model = cls(kind(**values | config))
    if hasattr(model.get_model(), "image_newline"):
        torch.nn.init.normal_(model.get_model().image_newline)
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(LLAVA / name, folder / name)
    return folder


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A smooth random picture of (width, height), so that ways of resizing differ little."""
    rng = np.random.default_rng([seed, *size])
    coarse = Image.fromarray(rng.integers(0, 255, (3, 3, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def merged_count(size: tuple[int, int], grid: tuple[int, int], side: int) -> tuple[int, int]:
    """(rows, columns) that unpadding leaves of a plane of (across, down) tiles, from the definition.

    The picture fills one side of the plane; of the other it fills as much as its aspect says, cut to a whole number,
    and half of the rest, cut to a whole number again, goes on either end.
    """
    (width, height), (across, down) = size, (grid[0] * side, grid[1] * side)
    if width * down > height * across:
        return down - 2 * ((down - height * across // width) // 2), across
    return down, across - 2 * ((across - width * down // height) // 2)
