"""LLaVA-PruMerge (arXiv 2403.15388): attended patches, each nudged by its neighbours, and one token for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from duet.stage1 import CONTEXTUAL, DOMINANT, VISION_REDUCERS, TowerOutput, VisionReduction
from duet.tokens import gather_tokens, top_indices

if TYPE_CHECKING:
    from duet.config import DuetConfig

_NEIGHBOURS = 32


@VISION_REDUCERS.register("prumerge")
def prumerge(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Keep ``K - 1`` patches by attention, add their neighbours to them, and append a weighted sum of all the others.

    The attention is the class token's in the next tower block, not split into heads, as released; weights are not
    renormalised, so that a kept token moves little. The number of tokens is fixed; the released rule that adapts it to
    an image is ``adaptive_count``. Output is in raster order, the summary last.
    Shapes: features [B, M, D]; returns K tokens. Source: PruMerge Sec. 3.2-3.3.
    """
    patches = tower.patches
    signals = tower.next_signals()
    attention = signals.joint_class_row() if tower.class_token else signals.column_mass()
    count = config.entering - 1
    kept = top_indices(attention, count).sort(dim=1).values
    weights = attention.to(patches.dtype).unsqueeze(-1)
    weighted = patches * weights
    keys = torch.nn.functional.normalize(signals.joint_keys().float(), dim=-1)
    alike = gather_tokens(keys, kept) @ keys.transpose(1, 2)
    alike = alike.scatter(2, kept.unsqueeze(-1), float("-inf"))
    near = top_indices(alike, min(_NEIGHBOURS, patches.shape[1] - 1))
    nudges = gather_tokens(weighted, near.flatten(1)).unflatten(1, (count, -1)).sum(2)
    dropped = torch.ones_like(attention, dtype=torch.bool).scatter(1, kept, False)
    summary = (weighted * dropped.unsqueeze(-1)).sum(1, keepdim=True)
    tokens = torch.cat((gather_tokens(patches, kept) + nudges, summary), 1)
    centre = top_indices(attention.masked_fill(~dropped, -1.0), 1)
    kind = torch.full((count + 1,), DOMINANT, device=patches.device)
    kind[-1] = CONTEXTUAL
    members = dropped.nonzero()[:, 1].view(len(patches), 1, -1)
    return VisionReduction(tokens, torch.cat((kept, centre), 1), kind, members)


def adaptive_count(attention: torch.Tensor) -> torch.Tensor:
    """Return how many patches the released rule keeps: those above the third quartile by 1.5 interquartile ranges.

    Per image; the release computes the quartiles over its whole batch. Shapes: [B, N] -> [B].
    """
    low, high = torch.quantile(attention.float(), torch.tensor([0.25, 0.75], device=attention.device), dim=1)
    return (attention > (high + 1.5 * (high - low)).unsqueeze(1)).sum(1)
