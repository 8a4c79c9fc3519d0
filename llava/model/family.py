"""Tell `duet.attach` and `duet.detach` about LLaVA's own classes."""

from __future__ import annotations

from typing import Any

from torch import nn

from duet import DuetConfig
from duet.families import FAMILIES, Family, ModelFacts
from llava.model.llava_arch import LlavaMetaForCausalLM


class LlavaFamily(Family):
    """LLaVA's own models. They read `config.duet` themselves, so nothing is put in front of them."""

    mixin = None
    places_patches = True

    def check(self, model: nn.Module) -> None:
        """Accept models with a vision tower only.

        Raises:
            ValueError: Not a LLaVA model with its head, or one without a vision tower.
        """
        if not isinstance(model, LlavaMetaForCausalLM) or model.get_vision_tower() is None:
            raise ValueError(
                f"{type(model).__name__} has no vision tower to reduce; attach to the full LLaVA model, and call "
                "initialize_vision_modules first if it was made from a plain language model"
            )

    def facts(self, model: Any) -> ModelFacts:
        """Return patches of a tower pass, depth and class token of a model."""
        unit = "tile" if getattr(model.config, "image_aspect_ratio", None) == "anyres" else "image"
        return ModelFacts(model.get_vision_tower().num_patches, model.config.num_hidden_layers, True, unit)

    def check_config(self, model: Any, config: DuetConfig) -> None:
        """Refuse what tiles cannot take; `duet.attach` and `set_reduction` both ask here."""
        super().check_config(model, config)
        if config.positions == "patch" and self.facts(model).unit == "tile":
            raise ValueError(
                "positions='patch' counts the patches of one picture, and image_aspect_ratio='anyres' cuts it into "
                "tiles; take positions='auto'"
            )


for _model_type in ("llava_llama", "llava_mistral"):
    FAMILIES.register(_model_type)(LlavaFamily())
