"""Model families: how to reach the parts of a Hugging Face model. One file in this package is one family.

A family subclasses ``Family`` and registers an instance under the model's ``model_type``:
``FAMILIES.register("llava")(LlavaFamily())``. Packages that own their model classes register theirs in the same way.
docs/add-a-family.md has the whole way. What several families share is in modules that register nothing: ``prompt``,
``reduced``, ``passes``, ``anyres``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import nn

from duet.config import DuetConfig
from duet.registry import Registry


@dataclass(frozen=True)
class ModelFacts:
    """What a configuration is checked against.

    Attributes:
        patches: patches per tower pass; None where pictures differ in size.
        num_layers: decoder layers.
        class_token: whether the tower has a class token.
        unit: what one tower pass shows: a whole picture ("image"), or a "tile" or a "frame" of one.
    """

    patches: int | None
    num_layers: int
    class_token: bool
    unit: str = "image"


class Family(ABC):
    """How DUET enters one kind of model."""

    mixin: type | None = None
    """Class put in front of the model's own class while DUET is attached; None if the model reduces by itself."""
    places_patches = False
    """Whether a token can have the position of its patch (``positions="patch"``)."""

    @abstractmethod
    def facts(self, model: Any) -> ModelFacts:
        """Return the sizes that a configuration must fit."""

    def parts(self, model: Any) -> list[tuple[nn.Module, type]]:
        """Return the modules whose classes change while DUET is attached, each with what is put before its class."""
        return [] if self.mixin is None else [(model, self.mixin)]

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if this particular model cannot be reduced."""
        del model

    @property
    def takes_videos(self) -> bool:
        """Whether the model has an input for videos, so that their frames can be told from images."""
        return False

    def check_config(self, model: Any, config: DuetConfig) -> None:
        """Raise ValueError if a configuration cannot work with this family."""
        if config.across_frames is not None and not self.takes_videos:
            raise ValueError(
                f"across_frames merges the frames of a video, but model_type {model.config.model_type!r} has no input "
                "for videos; leave it out"
            )
        if config.positions == "patch" and not self.places_patches:
            raise ValueError(
                f"positions='patch' counts the patches of one tower pass and is for LLaVA-1.5; model_type "
                f"{model.config.model_type!r} takes 'auto', 'compact' or 'original'"
            )


FAMILIES: Registry[Family] = Registry("model family", "duet.families")


def find(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises:
        ValueError: the model has no ``config.model_type`` or an unsupported one; the supported ones are listed.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES.names():
        raise ValueError(
            f"duet.attach does not know {type(model).__name__} (model_type {model_type!r}); supported model types: "
            f"{', '.join(FAMILIES.names())}. A family is one file: see docs/add-a-family.md"
        )
    family = FAMILIES.get(model_type)
    family.check(model)
    return family
