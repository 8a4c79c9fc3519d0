"""Bipartite soft matching after the tower, the merging step of ToMe (arXiv 2210.09461)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, keep_clusters
from duet.tokens import gather_tokens, rank_descending

if TYPE_CHECKING:
    from duet.config import DuetConfig


@VISION_REDUCERS.register("tome_post")
def tome_post(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Merge the most similar pairs, in rounds, until ``K`` tokens are left; a token is the mean of its patches.

    A round splits the tokens by parity, gives every even one its most similar odd one (cosine of keys averaged over
    heads), and merges the best pairs, at most half of the tokens. Output is ordered by each token's first patch.
    Shapes: features [B, M, D]; returns K tokens. Source: ToMe Sec. 3, applied once the tower has run.
    """
    patches = tower.patches
    batch, count, _ = patches.shape
    metric = torch.nn.functional.normalize(tower.signals.key_metric()[:, int(tower.class_token) :].float(), dim=-1)
    owner = torch.arange(count, device=patches.device).expand(batch, -1)
    alive = owner
    while alive.shape[1] > config.entering:
        alive, owner = _merge_round(alive, owner, metric, alive.shape[1] - config.entering)
    means = gather_tokens(_cluster_means(patches.float(), owner), alive).to(patches.dtype)
    return keep_clusters(means, owner.unsqueeze(1) == alive.unsqueeze(-1))


def _merge_round(alive_BT: Tensor, owner_BN: Tensor, metric: Tensor, excess: int) -> tuple[Tensor, Tensor]:
    """Merge up to ``excess`` even tokens into odd ones; returns the tokens left and every patch's token."""
    even, odd = alive_BT[:, ::2], alive_BT[:, 1::2]
    means = _cluster_means(metric, owner_BN)
    left, right = (torch.nn.functional.normalize(gather_tokens(means, group), dim=-1) for group in (even, odd))
    best = (left @ right.transpose(1, 2)).max(-1)
    order = rank_descending(best.values)
    count = min(excess, odd.shape[1])
    merged, stays = order[:, :count], order[:, count:].sort(dim=1).values
    target = torch.arange(owner_BN.shape[1], device=owner_BN.device).repeat(len(owner_BN), 1)
    target.scatter_(1, even.gather(1, merged), odd.gather(1, best.indices.gather(1, merged)))
    alive = torch.cat((even.gather(1, stays), odd), 1).sort(dim=1).values
    return alive, target.gather(1, owner_BN)


def _cluster_means(values: Tensor, owner: Tensor) -> Tensor:
    """Return at each patch's place the mean of the patches that it owns. Shapes: [B, N, D] -> [B, N, D]."""
    sums = torch.zeros_like(values).scatter_add(1, owner.unsqueeze(-1).expand_as(values), values)
    sizes = torch.zeros_like(owner, dtype=values.dtype).scatter_add(
        1, owner, torch.ones_like(owner, dtype=values.dtype)
    )
    return sums / sizes.clamp(min=1).unsqueeze(-1)
