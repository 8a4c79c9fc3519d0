"""``transformers.VideoLlavaForConditionalGeneration``, the model of the paper's Tables 4 and 14.

A video is reduced frame by frame and ranked in the decoder as one. Without reduction a frame brings its class token
along (257 tokens); with it, only methods that count the class token do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.video_llava.modeling_video_llava import (
    VideoLlavaCausalLMOutputWithPast,
    VideoLlavaForConditionalGeneration,
)

from duet.families import FAMILIES, ModelFacts
from duet.families.passes import Frames, View, encode_frames, feature_choice
from duet.families.prompt import Encoded, Pictures, videos_of
from duet.families.reduced import HostFamily
from duet.question import Question
from duet.vision import encode_vision


class VideoLlavaFamily(HostFamily):
    """``model_type`` "video_llava"."""

    host = VideoLlavaForConditionalGeneration
    output = VideoLlavaCausalLMOutputWithPast
    inputs = (
        "pixel_values", "pixel_values_images", "pixel_values_videos", "vision_feature_layer",
        "vision_feature_select_strategy",
    )  # fmt: skip

    def facts(self, model: Any) -> ModelFacts:
        """Return patches of an image or a frame, depth and class token."""
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        return ModelFacts(side * side, model.config.text_config.num_hidden_layers, class_token=True, unit="frame")

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Pictures]:
        """Return the images and the videos of a batch."""
        found = []
        patches = model._duet.facts.patches
        layer, drops_class = feature_choice(model, inputs)
        name = "pixel_values_images" if inputs.get("pixel_values_images") is not None else "pixel_values"
        images, videos = inputs.get(name), inputs.get("pixel_values_videos")
        if images is not None:
            found.append(
                Pictures(
                    kind="image",
                    token_id=model.config.image_token_id,
                    expected=[patches + int(not drops_class)] * len(images),
                    rows={name: None},
                    encode=lambda question: _encode_images(model, images, layer, drops_class, question),
                )
            )
        if videos is not None:
            expected = videos.shape[1] * (patches + 1)
            found.append(
                videos_of(model, videos, expected, lambda question: _encode_videos(model, videos, layer, question))
            )
        return found


def _encode_images(model: Any, pixels: Tensor, layer: Any, drops_class: bool, question: Question | None) -> Encoded:
    projector = model.model.multi_modal_projector
    reduction = encode_vision(
        model.model.image_tower, pixels, select_layer=layer, class_token=not drops_class, config=model._duet.config,
        project=projector, question=question,
    )  # fmt: skip
    return Encoded.join(reduction.per_image(projector(reduction.tokens)))


def _encode_videos(model: Any, videos: Tensor, layer: Any, question: Question | None) -> Encoded:
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    view = View.rectangle((side, side), range(side), range(side))
    how = Frames(model.model.video_tower, layer, True, view, None, model.model.multi_modal_projector)
    return Encoded.join(encode_frames(how, videos, model._duet.config, question))


FAMILIES.register("video_llava")(VideoLlavaFamily())
