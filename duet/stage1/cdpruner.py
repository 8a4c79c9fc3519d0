"""CDPruner (arXiv 2506.10967): the most probable subset under a determinantal process that listens to the question.

Shapes: B batch, N patches, K kept, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, keep_patches

if TYPE_CHECKING:
    from duet.config import DuetConfig

_LIFT = 1e-6  # what the released code adds, so that no relevance is zero
_FLOOR = 1e-5  # what is left of a token's norm once others explain it; below is rounding, and ties go by index


class CDPruner:
    """Keep patches that differ from each other, each weighed by how relevant it is to the question.

    The kernel is ``rho_i cos(f_i, f_j) rho_j`` of projected tokens (tower features where no projector is known) and
    relevances between 0 and 1. Relevance comes from ``TowerOutput.question``; without a question all are 1, and the
    choice is by diversity alone. ``variant="release"`` takes the range of relevance over the whole batch, as the
    released code does, so that pictures depend on each other. Nothing is trained by ranking. Memory is O(N (N + K)) per
    image. Source: CDPruner Sec. 3; METHODS 3.8.
    """

    reads_question = True
    reads_projection = True

    def __call__(self, tower: TowerOutput, config: DuetConfig) -> VisionReduction:
        """Return K = ``config.entering`` patches in raster order. Shapes: features [B, M, D]."""
        with torch.no_grad():
            unit = torch.nn.functional.normalize(tower.embedded(), dim=-1)
            weight = unit_range(relevance(tower), whole_batch=config.variant == "release")
            chosen = most_probable_subset(unit, weight, config.entering)
        return keep_patches(tower, chosen)


def relevance(tower: TowerOutput) -> Tensor:
    """Return how much each patch has to do with the question, zero everywhere without one. Shapes: [B, N] in fp32."""
    if tower.question is None:
        return torch.zeros(tower.patches.shape[:2], device=tower.patches.device)
    return tower.question.relevance(tower).float()


def unit_range(values_BN: Tensor, whole_batch: bool = False) -> Tensor:
    """Map values to (0, 1], linearly, image by image; where all are equal, to 1. Shapes: [B, N] -> [B, N]."""
    over = (0, 1) if whole_batch else 1
    low, high = values_BN.amin(over, keepdim=True), values_BN.amax(over, keepdim=True)
    return (values_BN - low + _LIFT) / (high - low + _LIFT)


def most_probable_subset(unit_BND: Tensor, weight_BN: Tensor, count: int) -> Tensor:
    """Return ``count`` picks of each image in order: greedy MAP of the kernel ``w_i (u_i . u_j) w_j``.

    Every step takes the token with the largest variance that the picks do not explain, and extends a Cholesky factor by
    one row (Chen et al., arXiv 1709.05135). Shapes: unit vectors [B, N, D], weights [B, N]; returns [B, ``count``].
    """
    kernel = unit_BND @ unit_BND.transpose(1, 2) * weight_BN.unsqueeze(1) * weight_BN.unsqueeze(2)
    left = weight_BN.square()  # the diagonal without rounding, which would break ties
    factor = kernel.new_zeros(len(kernel), count, kernel.shape[1])
    taken = torch.zeros_like(left, dtype=torch.bool)
    picks = []
    for step in range(count):
        gain = left.clamp(min=_FLOOR).masked_fill(taken, float("-inf"))
        pick = gain.argmax(1, keepdim=True)
        picks.append(pick)
        taken = taken.scatter(1, pick, True)
        at_pick = pick.unsqueeze(-1)
        row = kernel.gather(1, at_pick.expand(-1, -1, kernel.shape[2])).squeeze(1)
        before = factor[:, :step]
        explained = before.gather(2, at_pick.expand(-1, step, -1)).transpose(1, 2) @ before
        factor[:, step] = (row - explained.squeeze(1)) / gain.gather(1, pick).sqrt()
        left = left - factor[:, step].square()
    return torch.cat(picks, 1)


VISION_REDUCERS.register("cdpruner")(CDPruner())
