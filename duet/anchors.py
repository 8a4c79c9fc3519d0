"""Merging patches into anchors, as VisionZip (arXiv 2412.04467) and the released code of DUET-VLM do.

Shapes: B batch, N patches, P patches of a pool, C anchors, O other patches of the pool, D width, d width of a key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duet.stage1 import TowerOutput, VisionReduction, kinds
from duet.tokens import gather_tokens, on_device

MERGES = ("sum", "mean")


def merge_into_anchors(
    tower: TowerOutput, dominant: Tensor, pool: Tensor, contextual: int, merge: str = "sum"
) -> VisionReduction:
    """Keep ``dominant`` patches, and merge ``pool`` into anchors that are spaced evenly in it.

    Shapes: dominant [B, K1] and pool [B, P] patch indices, the pool in the order that anchors are spaced in; returns
    the class token if there is one, dominant patches in raster order, then anchors in pool order.
    """
    patches, first = tower.patches, int(tower.class_token)
    batch, size = pool.shape
    contextual = min(contextual, size)
    dominant = dominant.sort(dim=1).values
    anchors, others = split_evenly(pool, contextual)
    parts, source = [gather_tokens(patches, dominant)], [dominant]
    if tower.class_token:
        parts.insert(0, tower.features[:, :1])
        source.insert(0, dominant.new_full((batch, 1), -1))
    members = anchors.new_empty(batch, 0, 0)
    if contextual:
        tokens, members = join_anchors(tower, anchors, others, merge)
        parts.append(tokens)
    kind = kinds(pool.device, class_token=first, dominant=dominant.shape[1], contextual=contextual)
    return VisionReduction(torch.cat(parts, 1), torch.cat([*source, anchors], 1), kind, members)


def split_evenly(pool_BP: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` evenly spaced entries of the pool, from the first on, and the others. Shapes: [B, C], [B, O]."""
    size = pool_BP.shape[1]
    chosen = [number * max(1, size // max(1, count)) for number in range(count)]
    rest = sorted(set(range(size)) - set(chosen))
    # Numbers, not a mask: a device would have to report how many marks a mask has.
    chosen, rest = (on_device(places, pool_BP.device) for places in (chosen, rest))
    return pool_BP[:, chosen], pool_BP[:, rest]


def join_anchors(tower: TowerOutput, anchors_BC: Tensor, others_BO: Tensor, merge: str) -> tuple[Tensor, Tensor]:
    """Let every other patch join the anchor with the most similar key.

    Args:
        tower: what the patches come from; keys are averaged over heads.
        anchors_BC: patches that others join.
        others_BO: patches that join.
        merge: ``"sum"`` adds the mean of those that joined to the anchor, so that its norm about doubles; ``"mean"``
            averages all of them. An anchor that none joins stays as it is.

    Returns:
        Tokens [B, C, D], and [B, C, 1 + O] patches of each: the anchor, those that joined, others as -1.
    """
    patches, width = tower.patches, anchors_BC.shape[1]
    metric = torch.nn.functional.normalize(tower.signals.key_metric()[:, int(tower.class_token) :].float(), dim=-1)
    choice = (gather_tokens(metric, others_BO) @ gather_tokens(metric, anchors_BC).transpose(1, 2)).argmax(-1)
    chosen = torch.nn.functional.one_hot(choice, width).to(patches.dtype)
    sums, joined = chosen.transpose(1, 2) @ gather_tokens(patches, others_BO), chosen.sum(1).unsqueeze(-1)
    own = gather_tokens(patches, anchors_BC)
    tokens = own + sums / joined.clamp(min=1) if merge == "sum" else (own + sums) / (joined + 1)
    mine = choice.unsqueeze(1) == torch.arange(width, device=choice.device)[None, :, None]
    return tokens, torch.cat((anchors_BC.unsqueeze(-1), others_BO.unsqueeze(1).where(mine, -1)), dim=-1)
