"""``transformers.LlavaNextVideoForConditionalGeneration``: images in tiles, videos in frames that the model pools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next_video.modeling_llava_next_video import (
    LlavaNextVideoCausalLMOutputWithPast,
    LlavaNextVideoForConditionalGeneration,
)

from duet.families import FAMILIES, ModelFacts
from duet.families.anyres import anyres_facts, anyres_pictures
from duet.families.passes import Frames, View, encode_frames, feature_choice
from duet.families.prompt import Encoded, Pictures, videos_of
from duet.families.reduced import HostFamily
from duet.question import Question


class LlavaNextVideoFamily(HostFamily):
    """``model_type`` "llava_next_video"."""

    host = LlavaNextVideoForConditionalGeneration
    output = LlavaNextVideoCausalLMOutputWithPast
    inputs = (
        "pixel_values", "image_sizes", "pixel_values_videos", "vision_feature_layer",
        "vision_feature_select_strategy",
    )  # fmt: skip

    def facts(self, model: Any) -> ModelFacts:
        """Return patches of a tile, depth and class token."""
        return anyres_facts(model)

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Pictures]:
        """Return the images and the videos; a frame is reduced after its patches were pooled, and before projection."""
        found = anyres_pictures(model, inputs, vision_feature_select_strategy="default")
        videos = inputs.get("pixel_values_videos")
        if videos is not None:
            view = _pooled(model)
            choice, expected = feature_choice(model, inputs), videos.shape[1] * len(view.units)
            found.append(
                videos_of(
                    model, videos, expected, lambda question: _encode_videos(model, videos, view, choice, question)
                )
            )
        return found


def _pooled(model: Any) -> View:
    """Return the squares of patches that the model's pooling joins; it leaves out what fills no square."""
    stride = model.config.spatial_pool_stride
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    squares = torch.arange(side * side).view(side, side).unfold(0, stride, stride).unfold(1, stride, stride)
    return View.pooled(squares.reshape(-1, stride * stride), (side // stride, side // stride))


def _encode_videos(
    model: Any, videos: Tensor, view: View, choice: tuple[Any, bool], question: Question | None
) -> Encoded:
    layer, drops_class = choice
    body = model.model

    def embed(features: Tensor) -> Tensor:
        return body.vision_resampler(features[:, 1:] if drops_class else features)

    how = Frames(body.vision_tower, layer, False, view, embed, body.multi_modal_projector)
    return Encoded.join(encode_frames(how, videos, model._duet.config, question))


FAMILIES.register("llava_next_video")(LlavaNextVideoFamily())
