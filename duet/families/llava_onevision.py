"""``transformers.LlavaOnevisionForConditionalGeneration``: a tower without class token, tiles, several images, videos.

A sample with several images brings each in one pass. A video's frames are reduced after the model pooled them, and the
newline that ends a video stays only where stage 1 leaves the video whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionCausalLMOutputWithPast,
    LlavaOnevisionForConditionalGeneration,
)

from duet.families import FAMILIES, ModelFacts
from duet.families.anyres import anyres_facts, anyres_pictures
from duet.families.passes import Frames, View, encode_frames, feature_choice
from duet.families.prompt import Encoded, Pictures, videos_of
from duet.families.reduced import HostFamily
from duet.question import Question


class LlavaOnevisionFamily(HostFamily):
    """``model_type`` "llava_onevision"."""

    host = LlavaOnevisionForConditionalGeneration
    output = LlavaOnevisionCausalLMOutputWithPast
    inputs = (
        "pixel_values", "image_sizes", "pixel_values_videos", "image_sizes_videos", "vision_feature_layer",
        "vision_feature_select_strategy", "vision_aspect_ratio", "batch_num_images",
    )  # fmt: skip

    def facts(self, model: Any) -> ModelFacts:
        """Return patches of a tile, depth and class token."""
        return anyres_facts(model)

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Pictures]:
        """Return the images and the videos of a batch."""
        aspect = inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        counts, single = inputs.get("batch_num_images"), None
        if counts is not None:
            single = [count != 1 for count in torch.as_tensor(counts).tolist() for _ in range(count)]
        most = int(aspect.removeprefix("anyres_max_"))
        found = anyres_pictures(model, inputs, single, most, vision_aspect_ratio=aspect)
        videos = inputs.get("pixel_values_videos")
        if videos is not None:
            view = _pooled(model)
            choice, expected = feature_choice(model, inputs), videos.shape[1] * len(view.units) + 1
            found.append(
                videos_of(
                    model, videos, expected, lambda question: _encode_videos(model, videos, view, choice, question)
                )
            )
        return found


def _pooled(model: Any) -> View:
    vision = model.config.vision_config
    return _halved(vision.image_size // vision.patch_size)


@lru_cache(maxsize=8)
def _halved(side: int) -> View:
    """Return the weights of patches in the model's bilinear pooling to half the side, found by pooling unit vectors."""
    half = math.ceil(side / 2)
    unit_vectors = torch.eye(side * side).view(1, -1, side, side)
    pooled = torch.nn.functional.interpolate(unit_vectors, size=[half, half], mode="bilinear")
    return View.weighted(pooled[0].flatten(1).t(), (half, half))


def _encode_videos(
    model: Any, videos: Tensor, view: View, choice: tuple[Any, bool], question: Question | None
) -> Encoded:
    layer, drops_class = choice
    body = model.model

    def embed(features: Tensor) -> Tensor:
        return body.apply_pooling(body.multi_modal_projector(features[:, 1:] if drops_class else features))

    how = Frames(body.vision_tower, layer, False, view, embed, torch.nn.Identity(), body.image_newline)
    return Encoded.join(encode_frames(how, videos, model._duet.config, question))


FAMILIES.register("llava_onevision")(LlavaOnevisionFamily())
