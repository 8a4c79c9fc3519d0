"""``transformers.LlavaForConditionalGeneration`` (LLaVA-1.5 and models of the same class)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaForConditionalGeneration

from duet.families import FAMILIES, ModelFacts
from duet.families.prompt import Encoded, Pictures
from duet.families.reduced import HostFamily
from duet.question import Question
from duet.vision import encode_vision


class LlavaFamily(HostFamily):
    """``model_type`` "llava"."""

    host = LlavaForConditionalGeneration
    output = LlavaCausalLMOutputWithPast
    inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")
    places_patches = True

    def check(self, model: nn.Module) -> None:
        """Accept towers with the parts of CLIP's or SigLIP's."""
        super().check(model)
        tower: Any = model.model.vision_tower  # type: ignore[union-attr]
        body = getattr(tower, "vision_model", tower)
        if not hasattr(body, "embeddings") or not hasattr(getattr(body, "encoder", None), "layers"):
            raise ValueError(
                f"the vision tower {type(tower).__name__} is not supported; CLIPVisionModel, SiglipVisionModel and "
                "towers with their parts are. Another tower is one file: see docs/add-a-family.md"
            )

    def facts(self, model: Any) -> ModelFacts:
        """Return patches, depth and class token from the configuration."""
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        has_class = hasattr(
            getattr(model.model.vision_tower, "vision_model", model.model.vision_tower).embeddings, "class_embedding"
        )
        return ModelFacts(side * side, model.config.text_config.num_hidden_layers, has_class)

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Pictures]:
        """Return the images; every one has as many placeholders as the tower has patches."""
        pixels, facts = inputs.get("pixel_values"), model._duet.facts
        if pixels is None:
            return []
        strategy = inputs.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
        keeps_class = strategy == "full"
        expected = facts.patches + int(keeps_class and facts.class_token)
        layer = inputs.get("vision_feature_layer")
        layer = model.config.vision_feature_layer if layer is None else layer
        return [
            Pictures(
                kind="image",
                token_id=model.config.image_token_id,
                expected=[expected] * len(pixels),
                rows={"pixel_values": None},
                encode=lambda question: _encode(model, pixels, layer, keeps_class, question),
            )
        ]


def _encode(model: Any, pixel_values: Tensor, layer: Any, keeps_class: bool, question: Question | None) -> Encoded:
    """Return the projected visual tokens of images. Shapes: pixels [I, 3, height, width]."""
    projector = model.model.multi_modal_projector
    reduction = encode_vision(
        model.model.vision_tower,
        pixel_values.to(model.model.vision_tower.dtype),
        select_layer=layer,
        class_token=keeps_class,
        config=model._duet.config,
        project=projector,
        question=question,
    )
    places = None
    if model._duet.config.positions == "patch":
        facts = model._duet.facts
        places = torch.cat(reduction.places(facts.patches, keeps_class and facts.class_token))
    return replace(Encoded.join(reduction.per_image(projector(reduction.tokens))), places=places)


FAMILIES.register("llava")(LlavaFamily())
