"""Merging patches into anchors, as VisionZip (arXiv 2412.04467) and the released code of DUET-VLM do.

Shapes: B batch, N patches, P patches of a pool, C anchors, D width, d width of a key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duet.stage1 import TowerOutput, VisionReduction, kinds
from duet.tokens import gather_tokens


def merge_into_anchors(tower: TowerOutput, dominant: Tensor, pool: Tensor, contextual: int) -> VisionReduction:
    """Keep ``dominant`` patches, and merge ``pool`` into anchors that are spaced evenly in it.

    Shapes: dominant [B, K1] and pool [B, P] patch indices, the pool in the order that anchors are spaced in; returns
    the class token if there is one, dominant patches in raster order, then anchors in pool order.
    """
    patches, first = tower.patches, int(tower.class_token)
    batch, size = pool.shape
    contextual = min(contextual, size)
    dominant = dominant.sort(dim=1).values
    stride = max(1, size // max(1, contextual))
    # Numbers, not masks: a device would have to report how many marks a mask has.
    anchor_places = torch.arange(contextual) * stride
    other_places = torch.ones(size).scatter(0, anchor_places, 0.0).nonzero().flatten()
    anchors, others = (pool[:, places.to(pool.device)] for places in (anchor_places, other_places))

    parts, source = [gather_tokens(patches, dominant)], [dominant]
    if tower.class_token:
        parts.insert(0, tower.features[:, :1])
        source.insert(0, dominant.new_full((batch, 1), -1))
    members = anchors.new_empty(batch, 0, 0)
    if contextual:
        choice = _most_similar(tower.signals.key_metric()[:, first:], anchors, others)
        parts.append(_add_means(patches, anchors, others, choice))
        members = _cluster_members(anchors, others, choice)
    kind = kinds(pool.device, class_token=first, dominant=dominant.shape[1], contextual=contextual)
    return VisionReduction(torch.cat(parts, 1), torch.cat([*source, anchors], 1), kind, members)


def _most_similar(metric_BNd: Tensor, anchors: Tensor, others: Tensor) -> Tensor:
    """Return for each other patch the anchor whose key has the highest cosine. Shapes: [B, C], [B, P] -> [B, P]."""
    metric = torch.nn.functional.normalize(metric_BNd.float(), dim=-1)
    return (gather_tokens(metric, others) @ gather_tokens(metric, anchors).transpose(1, 2)).argmax(-1)


def _add_means(patches: Tensor, anchors: Tensor, others: Tensor, choice: Tensor) -> Tensor:
    """Return each anchor plus the mean of the patches that chose it; alone it stays as it is. Shapes: [B, C, D]."""
    chosen = torch.nn.functional.one_hot(choice, anchors.shape[1]).to(patches.dtype)
    sums = chosen.transpose(1, 2) @ gather_tokens(patches, others)
    return gather_tokens(patches, anchors) + sums / chosen.sum(1).clamp(min=1).unsqueeze(-1)


def _cluster_members(anchors: Tensor, others: Tensor, choice: Tensor) -> Tensor:
    """Return [B, C, 1 + P]: the anchor, then the patches that chose it, others as -1."""
    mine = choice.unsqueeze(1) == torch.arange(anchors.shape[1], device=anchors.device)[None, :, None]
    return torch.cat((anchors.unsqueeze(-1), others.unsqueeze(1).where(mine, -1)), dim=-1)
