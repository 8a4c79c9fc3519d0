"""``transformers.LlavaNextForConditionalGeneration`` (LLaVA-1.6), the model of the paper's Tables 9, 10 and 13."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextCausalLMOutputWithPast,
    LlavaNextForConditionalGeneration,
)

from duet.families import FAMILIES, ModelFacts
from duet.families.anyres import anyres_facts, anyres_pictures
from duet.families.prompt import Pictures
from duet.families.reduced import HostFamily


class LlavaNextFamily(HostFamily):
    """``model_type`` "llava_next"."""

    host = LlavaNextForConditionalGeneration
    output = LlavaNextCausalLMOutputWithPast
    inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def facts(self, model: Any) -> ModelFacts:
        """Return patches of a tile, depth and class token."""
        return anyres_facts(model)

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Pictures]:
        """Return the images; each is reduced tile by tile, and ranked in the decoder as one."""
        return anyres_pictures(model, inputs, vision_feature_select_strategy="default")


FAMILIES.register("llava_next")(LlavaNextFamily())
