"""DivPrune (arXiv 2503.02175): the subset of tokens whose nearest members lie farthest apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, keep_patches

if TYPE_CHECKING:
    from duet.config import DuetConfig

_BLOCK = 256  # rows of the similarity matrix held at once, for the first pick


class DivPrune:
    """Keep tokens greedily: first the one farthest from its nearest neighbour, then the one farthest from those kept.

    Distance is one minus the cosine of projected tokens (of tower features where no projector is known). Memory is
    O(N) per image: distances to the kept set are updated by one matrix-vector product per pick.
    Source: DivPrune Algorithm 1; ties go to the lower index.
    """

    reads_projection = True

    def __call__(self, tower: TowerOutput, config: DuetConfig) -> VisionReduction:
        """Reduce the tower's patches."""
        return keep_patches(tower, farthest_subset(tower, config.entering))


VISION_REDUCERS.register("divprune")(DivPrune())


@torch.no_grad()
def farthest_subset(tower: TowerOutput, count: int) -> Tensor:
    """Return the picks in the order in which they were made. Shapes: [B, ``count``]."""
    unit = torch.nn.functional.normalize(tower.embedded(), dim=-1)
    nearest = _nearest_distance(unit)
    picks = nearest.argmax(1, keepdim=True)
    nearest = torch.full_like(nearest, float("inf"))
    while True:
        last = picks[:, -1:]
        chosen = unit.gather(1, last.unsqueeze(-1).expand(-1, -1, unit.shape[-1]))
        distance = 1 - (unit @ chosen.transpose(1, 2)).squeeze(-1)
        nearest = torch.minimum(nearest, distance).scatter(1, last, float("-inf"))
        if picks.shape[1] == count:
            return picks
        picks = torch.cat((picks, nearest.argmax(1, keepdim=True)), 1)


def _nearest_distance(unit: Tensor) -> Tensor:
    """Return each token's distance to its nearest other token. Shapes: [B, N, D] -> [B, N]."""
    parts = []
    for start in range(0, unit.shape[1], _BLOCK):
        near = unit[:, start : start + _BLOCK] @ unit.transpose(1, 2)
        index = torch.arange(near.shape[1], device=unit.device)
        near[:, index, index + start] = float("-inf")
        parts.append(1 - near.max(-1).values)
    return torch.cat(parts, 1)
