"""``transformers.InternVLForConditionalGeneration``: tiles whose patches are joined two by two before the projector.

The class token is never handed on, and it ranks badly (FasterVLM's tracker, issue 4), so column mass ranks. Frames of a
video and tiles of an image come in one list, so each of them is a picture of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.internvl.modeling_internvl import (
    InternVLCausalLMOutputWithPast,
    InternVLForConditionalGeneration,
)

from duet.families import FAMILIES, ModelFacts
from duet.families.passes import Frames, View, encode_frames, feature_choice
from duet.families.prompt import Encoded, Pictures
from duet.families.reduced import HostFamily
from duet.question import Question


class InternVLFamily(HostFamily):
    """``model_type`` "internvl"."""

    host = InternVLForConditionalGeneration
    output = InternVLCausalLMOutputWithPast
    inputs = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")

    def facts(self, model: Any) -> ModelFacts:
        """Return tokens of a tile and depth; the class token is not used."""
        units = len(_joined(model).units)
        return ModelFacts(units, model.config.text_config.num_hidden_layers, class_token=False, unit="tile")

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Pictures]:
        """Return the tiles and frames of a batch."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        return [
            Pictures(
                kind="image",
                token_id=model.config.image_token_id,
                expected=[model._duet.facts.patches] * len(pixels),
                rows={"pixel_values": None},
                encode=lambda question: _encode(model, pixels, feature_choice(model, inputs), question),
            )
        ]


def _joined(model: Any) -> View:
    """Return the patches of each token, found by joining their numbers as the model joins features."""
    vision, ratio = model.config.vision_config, model.config.downsample_ratio
    rows, columns = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
    numbers = torch.arange(rows * columns, dtype=torch.float32).view(1, rows, columns, 1)
    units = model.model.pixel_shuffle(numbers, scale_factor=ratio)[0].long()
    return View.pooled(units.flatten(0, 1), tuple(units.shape[:2]))


def _encode(model: Any, pixels: Tensor, choice: tuple[Any, bool], question: Question | None) -> Encoded:
    layer, drops_class = choice
    body, view = model.model, _joined(model)

    def embed(features: Tensor) -> Tensor:
        patches = (body.vision_tower.layernorm(features) if layer == -1 else features)[:, int(drops_class) :]
        side = int(patches.shape[1] ** 0.5)
        joined = body.pixel_shuffle(
            patches.reshape(len(patches), side, side, -1), scale_factor=model.config.downsample_ratio
        )
        return joined.reshape(len(joined), -1, joined.shape[-1])

    how = Frames(_clip_like(body.vision_tower), layer, False, view, embed, body.multi_modal_projector)
    return Encoded.join(encode_frames(how, pixels.to(model.dtype).unsqueeze(1), model._duet.config, question))


def _clip_like(tower: Any) -> Any:
    """Return InternVL's tower under the names that CLIP's parts have."""
    return SimpleNamespace(
        embeddings=tower.embeddings,
        encoder=SimpleNamespace(layers=[_Block(block) for block in tower.encoder.layer]),
        config=SimpleNamespace(patch_size=tower.config.patch_size[0]),
    )


class _Block:
    """One block of InternVL's tower, called and read as one of CLIP's."""

    def __init__(self, block: Any) -> None:
        attention = block.attention
        self._block = block
        self.layer_norm1 = block.layernorm_before
        self.self_attn = SimpleNamespace(
            num_heads=attention.num_heads,
            scale=attention.scale,
            q_proj=lambda hidden: attention.q_norm(attention.q_proj(hidden)),
            k_proj=lambda hidden: attention.k_norm(attention.k_proj(hidden)),
        )

    def __call__(self, hidden_BMD: Tensor, attention_mask: None = None) -> Tensor:
        """Run the block."""
        del attention_mask
        return self._block(hidden_BMD)


FAMILIES.register("internvl")(InternVLFamily())
