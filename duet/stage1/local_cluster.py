"""DUET-VLM Algorithm 1 (Sec. 3.1): dominant patches, and averages over local clusters of the rest.

Shapes: B batch, M tower tokens, N patches, K kept, C contextual tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.stage1 import CLASS_TOKEN, CONTEXTUAL, DOMINANT, VISION_REDUCERS, TowerOutput, VisionReduction
from duet.tokens import gather_tokens, rank_descending, top_indices

if TYPE_CHECKING:
    from duet.config import DuetConfig


@VISION_REDUCERS.register("local_cluster")
def local_cluster(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Keep the ``k1`` most attended patches and average ``k2`` local clusters of the rest.

    ``config.variant`` chooses between the paper's Algorithm 1 and the code that its authors released.
    Shapes: features [B, M, D]; returns K = k1 + k2 tokens. Source: Algorithm 1, Eq. (1)-(2).
    """
    return paper_clusters(tower, config) if config.variant == "paper" else released_clusters(tower, config)


def paper_clusters(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Algorithm 1 as written: column mass ranks, the next ``k2`` ranks are centroids, rows choose neighbours.

    Where the paper is silent: a centroid counts among its own ``w`` members, neighbourhoods may overlap, other
    centroids may be members, dominant tokens come out in raster order, contextual ones by descending column mass. The
    class token is not used. Where fewer than ``w`` residual patches exist, a cluster averages all of them.
    """
    patches = tower.patches
    dominant_count, contextual_count = config.dominant, config.contextual
    best = top_indices(tower.signals.column_mass(), dominant_count + contextual_count)
    dominant = best[:, :dominant_count].sort(dim=1).values
    centroids = best[:, dominant_count:]
    width = min(config.cluster_width, patches.shape[1] - dominant_count)
    members = centroids.new_empty(patches.shape[0], 0, width)
    tokens = gather_tokens(patches, dominant)
    if contextual_count:
        members = _attended_neighbours(tower, dominant, centroids, width)
        clusters = gather_tokens(patches, members.flatten(1)).unflatten(1, (contextual_count, width))
        tokens = torch.cat((tokens, clusters.mean(2).to(tokens.dtype)), dim=1)
    kind = _kinds(tokens.device, dominant=dominant_count, contextual=contextual_count)
    return VisionReduction(tokens, torch.cat((dominant, centroids), dim=1), kind, members)


def _attended_neighbours(tower: TowerOutput, dominant: Tensor, centroids: Tensor, width: int) -> Tensor:
    """Return the ``width`` residual patches that each centroid attends to most, itself first. Shapes: [B, C, w]."""
    rows = tower.signals.rows(centroids)
    rows = rows.scatter(2, dominant.unsqueeze(1).expand(-1, rows.shape[1], -1), -1.0)
    rows = rows.scatter(2, centroids.unsqueeze(-1), 2.0)
    return top_indices(rows, width)


def released_clusters(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """The released code: class-token attention ranks, every ``w``-th of the next ``w * k2`` patches is an anchor.

    The rest of that pool joins the anchor with the most similar key; a token is its anchor plus the mean of those (a
    sum, so its norm is about doubled). The class token is one of ``k1``. Patches outside the pool are dropped.
    """
    score = class_attention(tower)
    with_class = int(tower.class_token)
    order = rank_descending(score)
    kept = config.dominant - with_class
    size = min(max(1, config.cluster_width * config.contextual), order.shape[1] - kept)
    return merge_into_anchors(tower, order[:, :kept], order[:, kept : kept + size], config.contextual)


def class_attention(tower: TowerOutput) -> Tensor:
    """Return the ranking score of the released code: class-token attention summed over heads, [B, N].

    A tower without a class token is ranked by column mass, as the released code does for Qwen2.5-VL.
    """
    return tower.signals.class_row().sum(1) if tower.class_token else tower.signals.column_mass()


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
    is_anchor = torch.zeros(size, dtype=torch.bool, device=pool.device)
    is_anchor[torch.arange(contextual, device=pool.device) * stride] = True
    anchors, others = pool[:, is_anchor], pool[:, ~is_anchor]

    parts, source = [gather_tokens(patches, dominant)], [dominant]
    if tower.class_token:
        parts.insert(0, tower.features[:, :1])
        source.insert(0, dominant.new_full((batch, 1), -1))
    members = anchors.new_empty(batch, 0, 0)
    if contextual:
        choice = _most_similar(tower.signals.key_metric()[:, first:], anchors, others)
        parts.append(_add_means(patches, anchors, others, choice))
        members = _cluster_members(anchors, others, choice)
    kind = _kinds(pool.device, class_token=first, dominant=dominant.shape[1], contextual=contextual)
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


def _kinds(device: torch.device, dominant: int, contextual: int, class_token: int = 0) -> Tensor:
    values = [CLASS_TOKEN] * class_token + [DOMINANT] * dominant + [CONTEXTUAL] * contextual
    return torch.tensor(values, device=device)
