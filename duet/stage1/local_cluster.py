"""DUET-VLM Algorithm 1 (Sec. 3.1): dominant patches, and averages over local clusters of the rest.

Shapes: B batch, M tower tokens, N patches, K kept, C contextual tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.anchors import merge_into_anchors
from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, class_attention, kinds
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
    dominant_count, contextual_count = int(config.dominant), int(config.contextual)
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
    kind = kinds(tokens.device, dominant=dominant_count, contextual=contextual_count)
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
    score = class_attention(tower.signals)
    with_class = int(tower.class_token)
    order = rank_descending(score)
    kept, contextual = int(config.dominant) - with_class, int(config.contextual)
    size = min(max(1, config.cluster_width * contextual), order.shape[1] - kept)
    return merge_into_anchors(tower, order[:, :kept], order[:, kept : kept + size], contextual)
