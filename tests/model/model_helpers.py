"""Golden data and tiny models for the tests of `llava.model`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava.model import LlavaLlamaForCausalLM

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LLAVA = GOLDEN / "llava_tiny"
CLIP = GOLDEN / "clip_tiny"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
IMAGE = -200


def tensors(name: str) -> dict[str, torch.Tensor]:
    """Tensors of a golden case; a missing file is an error."""
    return load_file(GOLDEN / "cases" / f"{name}.safetensors")


def facts(name: str) -> dict:
    """JSON of a golden case."""
    return json.loads((GOLDEN / "cases" / f"{name}.json").read_text(encoding="utf-8"))


def pixels(name: str) -> torch.Tensor:
    """Normalised pixels [3, 336, 336] of a golden picture."""
    image = np.asarray(Image.open(GOLDEN / "cases" / f"pixels_{name}.png"))
    return (torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 - MEAN) / STD


def golden_model(**kwargs) -> LlavaLlamaForCausalLM:
    """The golden LLaVA, freshly loaded."""
    return LlavaLlamaForCausalLM.from_pretrained(LLAVA, **kwargs)


def copy_golden(folder: Path, **config) -> Path:
    """Copy the golden checkpoint, with an absolute tower path and changed config values."""
    shutil.copytree(LLAVA, folder)
    edit_config(folder, **({"mm_vision_tower": str(CLIP)} | config))
    return folder


def edit_config(folder: Path, drop: tuple[str, ...] = (), **values) -> None:
    """Change a folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}), encoding="utf-8")


def edit_weights(folder: Path, change) -> dict[str, torch.Tensor]:
    """Rewrite a folder's model.safetensors with `change(state) -> state`."""
    path = folder / "model.safetensors"
    state = change(load_file(path))
    save_file(state, path, metadata={"format": "pt"})
    return state


def tower_state(old_layout: bool, seed: int | None = None) -> dict[str, torch.Tensor]:
    """Tower weights under LLaVA's checkpoint names; with a seed, slightly changed ("tuned")."""
    generator = torch.Generator().manual_seed(seed or 0)
    out = {}
    for key, value in load_file(CLIP / "model.safetensors").items():
        name = key.removeprefix("vision_model.")
        level = "vision_model." if old_layout else ""
        if value.is_floating_point() and seed is not None:
            value = value + 0.01 * torch.randn(value.shape, generator=generator)
        if "position_ids" not in name:
            out[f"model.vision_tower.vision_tower.{level}{name}"] = value
    return out


def prompt(*parts: int | list[int]) -> list[int]:
    """Token ids from pieces; `IMAGE` marks a picture."""
    ids: list[int] = [1]
    for part in parts:
        ids += part if isinstance(part, list) else [part]
    return ids


def pad_batch(rows: list[list[int]], side: str, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T], padded on one side."""
    length = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        fill = [pad] * (length - len(row))
        ids.append(fill + row if side == "left" else row + fill)
        mask.append([0] * len(fill) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(fill))
    return torch.tensor(ids), torch.tensor(mask)


def assert_same_logits(one: LlavaLlamaForCausalLM, two: LlavaLlamaForCausalLM, exact: bool = True) -> None:
    """Two models give the same logits for a prompt with a picture."""
    ids = torch.tensor([prompt([5, 6], IMAGE, [7, 8, 9])])
    image = pixels("coffee")[None]
    with torch.no_grad():
        a, b = one(input_ids=ids, images=image).logits, two(input_ids=ids, images=image).logits
    if exact:
        assert torch.equal(a, b), (a - b).abs().max()
    else:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
