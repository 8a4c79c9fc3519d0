"""Vision reducers: tower features in, fewer tokens out. One file in this package is one method.

A reducer is a callable ``reduce(tower, config) -> VisionReduction`` registered by name with
``@VISION_REDUCERS.register("name")``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet._registry import Registry
from duet.signals import TowerSignals

if TYPE_CHECKING:
    from duet.config import DuetConfig

CLASS_TOKEN, DOMINANT, CONTEXTUAL = 0, 1, 2
KIND_NAMES = ("class", "dominant", "contextual")


@dataclass(frozen=True)
class TowerOutput:
    """What a reducer gets: the features of one tower block and the signals of that block.

    Attributes:
        features: [B, M, D], the class token first when there is one.
        signals: attention signals of the block that made the features.
        class_token: whether token 0 is a class token.
    """

    features: Tensor
    signals: TowerSignals
    class_token: bool

    @property
    def patches(self) -> Tensor:
        """Patch features, [B, N, D]."""
        return self.features[:, 1:] if self.class_token else self.features


@dataclass(frozen=True)
class VisionReduction:
    """What a reducer returns, with the fate of every patch.

    Attributes:
        tokens: [B, K, D].
        source: [B, K] patch index of each token (for a contextual token its centre), -1 for the class token.
        kind: [K] one of CLASS_TOKEN, DOMINANT, CONTEXTUAL.
        members: [B, C, W] patches that each of the last C (contextual) tokens averages, padded with -1.
        grid: (rows, columns) of patches.
    """

    tokens: Tensor
    source: Tensor
    kind: Tensor
    members: Tensor
    grid: tuple[int, int] = (0, 0)

    @classmethod
    def identity(cls, features: Tensor, class_token: bool, grid: tuple[int, int]) -> VisionReduction:
        """Return the reduction that keeps all M tokens of ``features`` [B, M, D]."""
        batch, count, _ = features.shape
        device = features.device
        source = torch.arange(count, device=device).expand(batch, -1) - int(class_token)
        kind = torch.full((count,), DOMINANT, device=device)
        if class_token:
            kind[0] = CLASS_TOKEN
        return cls(features, source, kind, source.new_empty(batch, 0, 0), grid)


VisionReducer = Callable[[TowerOutput, "DuetConfig"], VisionReduction]
VISION_REDUCERS: Registry[VisionReducer] = Registry("vision reducer", "duet.stage1")
