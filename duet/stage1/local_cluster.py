"""DUET-VLM Algorithm 1 (Sec. 3.1): dominant patches, and averages over local clusters of the rest.

Shapes: B batch, M tower tokens, N patches, K kept, C contextual tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.anchors import join_anchors, merge_into_anchors, split_evenly
from duet.kernels import cluster_means
from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, class_attention, in_raster_order, kinds
from duet.tokens import gather_tokens, rank_descending, top_indices

if TYPE_CHECKING:
    from duet.config import DuetConfig


CHOICES = {
    "score": ("column_mass", "class_row"),
    "centroids": ("top", "strided"),
    "neighbours": ("attention", "keys"),
    "merge": ("mean", "sum"),
    "order": ("score", "raster"),
}
"""What else could be chosen in Algorithm 1, the paper's choice first."""
OPTIONS = {**CHOICES, "readers": 0}


def _check(config: DuetConfig) -> None:
    varied = sorted(set(config.options) & set(OPTIONS))
    if config.variant == "release" and varied:
        raise ValueError(f"variant='release' has made its choices; leave out the option(s) {', '.join(varied)}")
    if config.option("readers") < 0:
        raise ValueError(f"readers must be 0 (all patches) or a number of patches, not {config.option('readers')}")
    if config.option("readers") and config.option("score") != "column_mass":
        raise ValueError(f"readers are asked for score='column_mass', not {config.option('score')!r}; leave one out")


@VISION_REDUCERS.register("local_cluster", options=OPTIONS, check=_check)
def local_cluster(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Keep the ``k1`` most attended patches and average ``k2`` local clusters of the rest.

    ``config.variant`` chooses between the paper's Algorithm 1, which ``options`` vary, and the code that its authors
    released. Shapes: features [B, M, D]; returns K = k1 + k2 tokens. Source: Algorithm 1, Eq. (1)-(2).
    """
    return paper_clusters(tower, config) if config.variant == "paper" else released_clusters(tower, config)


def paper_clusters(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Algorithm 1 as written: column mass ranks, the next ``k2`` ranks are centroids, rows choose neighbours.

    Where the paper is silent: a centroid counts among its own ``w`` members, neighbourhoods may overlap, other
    centroids may be members, dominant tokens come out in raster order, contextual ones by descending column mass. The
    class token is not used. Where fewer than ``w`` residual patches exist, a cluster averages all of them.

    Options (METHODS 5.1 lists where they come from):
        score: rank by column mass, or by the class token's attention.
        centroids: the best residual patches, or evenly spaced ones of the best ``w k2``.
        neighbours: the ``w`` patches that a centroid attends to most; or every other one of the best ``w k2`` joins the
            centroid with the most similar key, so that clusters are disjoint and ``w`` is their mean size.
        merge: the mean of a cluster, or its centroid plus the mean of the others.
        order: contextual tokens behind the dominant ones, or all in raster order, at their centroids.
        readers: how many patches' attention makes the column mass, spread evenly; 0 for all, whose scores take a time
            that grows with the square of the patches.
    """
    patches = tower.patches
    dominant_count, contextual_count = int(config.dominant), int(config.contextual)
    by_mass = config.option("score") == "column_mass"
    signals = tower.signals
    ranked = rank_descending(signals.column_mass(config.option("readers")) if by_mass else class_attention(signals))
    dominant = ranked[:, :dominant_count].sort(dim=1).values
    pool = ranked[:, dominant_count : dominant_count + config.cluster_width * contextual_count]
    strided = config.option("centroids") == "strided"
    centroids, others = split_evenly(pool if strided else pool[:, :contextual_count], contextual_count)
    others = others if strided else pool[:, contextual_count:]
    tokens, members = gather_tokens(patches, dominant), centroids.new_empty(len(patches), 0, 0)
    if contextual_count:
        if config.option("neighbours") == "keys":
            clusters, members = join_anchors(tower, centroids, others, config.option("merge"))
        else:
            width = min(config.cluster_width, patches.shape[1] - dominant_count)
            members = _attended_neighbours(tower, dominant, centroids, width)
            clusters = _merged(patches, members, config)
        tokens = torch.cat((tokens, clusters.to(tokens.dtype)), dim=1)
    kind = kinds(tokens.device, dominant=dominant_count, contextual=contextual_count)
    reduction = VisionReduction(tokens, torch.cat((dominant, centroids), dim=1), kind, members)
    return reduction if config.option("order") == "score" else in_raster_order(reduction)


def _merged(patches: Tensor, members_BCW: Tensor, config: DuetConfig) -> Tensor:
    """Return one token for each cluster, the centroid being its first member. Shapes: [B, N, D] -> [B, C, D]."""
    if config.option("merge") == "mean":
        return cluster_means(patches, members_BCW)
    clusters = gather_tokens(patches, members_BCW.flatten(1)).unflatten(1, tuple(members_BCW.shape[1:]))
    others = clusters[:, :, 1:]
    return clusters[:, :, 0] + others.sum(2) / max(1, others.shape[2])


def _attended_neighbours(tower: TowerOutput, dominant: Tensor, centroids: Tensor, width: int) -> Tensor:
    """Return the ``width`` residual patches that each centroid attends to most, itself first. Shapes: [B, C, w]."""
    taken = torch.zeros(tower.patches.shape[:2], dtype=torch.bool, device=dominant.device).scatter(1, dominant, True)
    members, first = [], 0
    for rows in tower.signals.rows(centroids):
        own = centroids[:, first : first + rows.shape[1], None]
        members.append(top_indices(rows.masked_fill_(taken.unsqueeze(1), -1.0).scatter_(2, own, 2.0), width))
        first += rows.shape[1]
    return torch.cat(members, dim=1)


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
