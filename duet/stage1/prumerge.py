"""LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388): attended patches, nudged by their neighbours, and one for the rest.

Shapes: B batch, N patches, K kept patches, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.stage1 import CONTEXTUAL, DOMINANT, VISION_REDUCERS, TowerOutput, VisionReduction
from duet.tokens import compaction_index, gather_tokens, rank_descending, top_indices

if TYPE_CHECKING:
    from duet.config import DuetConfig

_NEIGHBOURS = 32
_FENCE = 1.5  # interquartile ranges above the third quartile, from where on a patch is an outlier


class PruMerge:
    """Keep attended patches, add their neighbours to them, and append a weighted sum of all the others.

    The attention is the class token's in the next tower block, not split into heads, as released; weights are not
    renormalised, so that a kept token moves little. PruMerge+ keeps spatially uniform patches besides the attended
    ones. The number of tokens is ``config.entering``, or, adaptively, what the outliers of an image's attention say
    (option ``fence``). Output is in raster order, the summary last.

    ``variant="release"`` does as the released code: attended patches in order of attention, then uniform ones;
    quartiles over the whole batch; with a fixed number, uniform patches that may be attended ones once more.
    A tower without a class token uses column mass. Source: PruMerge Sec. 3.2-3.3; METHODS 2.4 for the release.

    Args:
        adaptive: find the number of tokens image by image.
        plus: PruMerge+.
    """

    reads_next_block = True

    def __init__(self, adaptive: bool = False, plus: bool = False) -> None:
        self.adaptive = adaptive
        self._plus = plus

    def __call__(self, tower: TowerOutput, config: DuetConfig) -> VisionReduction:
        """Return K + 1 tokens, or with ``counts`` as many as each image needs. Shapes: features [B, M, D]."""
        signals = tower.next_signals()
        attention = signals.joint_class_row() if tower.class_token else signals.column_mass()
        release = config.variant == "release"
        if not self.adaptive:
            index = _fixed(attention, config.entering - 1, self._plus, release)
            return _merge(tower.patches, attention, signals.joint_keys(), index, None)
        counts = adaptive_count(attention, config.option("fence"), whole_batch=release).clamp(min=1)
        index, real = _adaptive(attention, counts, self._plus, release)
        return _merge(tower.patches, attention, signals.joint_keys(), index, real)


def adaptive_count(attention: Tensor, fence: float = _FENCE, whole_batch: bool = False) -> Tensor:
    """Return how many patches are outliers: above the third quartile by ``fence`` interquartile ranges.

    Shapes: [B, N] -> [B]. The quartiles are an image's own, or, as released, those of the whole batch.
    """
    over = attention.float().flatten().unsqueeze(0) if whole_batch else attention.float()
    low, high = torch.quantile(over, torch.tensor([0.25, 0.75], device=attention.device), dim=1)
    return (attention > (high + fence * (high - low)).unsqueeze(1)).sum(1)


def _fixed(attention: Tensor, count: int, plus: bool, release: bool) -> Tensor:
    """Return ``count`` patches of each image; PruMerge+ takes half of them, rounded down, evenly from the others.

    Shapes: [B, N] -> [B, count].
    """
    uniform = count // 2 if plus else 0
    order = rank_descending(attention)
    attended, others = order[:, : count - uniform], order[:, count - uniform :].sort(dim=1).values
    if uniform == 0:
        return attended if release else attended.sort(dim=1).values
    numbers = torch.arange(uniform, device=order.device)
    if release:
        step = order.shape[1] // uniform
        return torch.cat((attended, (step // 2 + numbers * step).expand(len(order), -1)), 1)
    places = (2 * numbers + 1) * others.shape[1] // (2 * uniform)
    return torch.cat((attended, others[:, places]), 1).sort(dim=1).values


def _adaptive(attention: Tensor, counts: Tensor, plus: bool, release: bool) -> tuple[Tensor, Tensor]:
    """Return the patches of each image in output order, padded, and which are real. Shapes: [B, N] -> [B, K].

    PruMerge+ adds every ``s``-th patch, ``s = int(int(N / count) / 3)``, so about three for each attended one.
    """
    batch, patches = attention.shape
    places = torch.arange(patches, device=attention.device).expand(batch, -1)
    rank = torch.empty_like(places).scatter_(1, rank_descending(attention), places)
    attended = rank < counts.unsqueeze(1)
    kept = attended
    if plus:
        stride = (patches // counts // 3).clamp(min=1).unsqueeze(1)
        kept = attended | ((places % stride == 0) & (places < patches - 1))
    key = rank.where(attended, places + patches) if release else places
    key = key.masked_fill(~kept, 2 * patches)
    total = kept.sum(1)
    index = key.argsort(dim=1, stable=True)[:, : int(total.max())]
    return index, places[:, : index.shape[1]] < total.unsqueeze(1)


def _merge(patches: Tensor, attention: Tensor, keys: Tensor, index: Tensor, real: Tensor | None) -> VisionReduction:
    """Nudge the kept patches by their neighbours and append the summary of the dropped ones.

    Shapes: patches and keys [B, N, D], attention [B, N], kept patches [B, K]; real [B, K] bool where images differ.
    """
    kept = torch.zeros_like(attention, dtype=torch.bool)
    kept = kept.scatter(1, index, True) if real is None else kept.scatter(1, index, real)
    weights = attention.to(patches.dtype)
    near = _neighbour_weights(weights, keys, index)
    tokens = gather_tokens(patches, index) + near @ patches
    summary = (weights * ~kept).unsqueeze(1) @ patches
    centre = top_indices(attention.masked_fill(kept, -1.0), 1)
    members = _listed(~kept).unsqueeze(1)
    if real is None:
        kind = torch.full((index.shape[1] + 1,), DOMINANT, device=index.device)
        kind[-1] = CONTEXTUAL
        return VisionReduction(torch.cat((tokens, summary), 1), torch.cat((index, centre), 1), kind, members)
    end = real.sum(1, keepdim=True)
    has_summary = ~kept.all(1, keepdim=True)  # where nothing is dropped, there is nothing to sum up
    room = torch.nn.functional.pad(tokens * real.unsqueeze(-1), (0, 0, 0, 1))
    tokens = room.scatter(1, end.unsqueeze(-1).expand_as(summary), summary)
    source = torch.nn.functional.pad(index.where(real, -1), (0, 1), value=-1)
    source = source.scatter(1, end, centre.where(has_summary, -1))
    kind = torch.full_like(source, DOMINANT).scatter(1, end, CONTEXTUAL)
    return VisionReduction(tokens, source, kind, members, counts=(end + has_summary).squeeze(1))


def _neighbour_weights(weights: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """Return the weight with which each patch is added to a kept one: its attention, for the 32 most similar ones.

    Shapes: weights [B, N], keys [B, N, D], index [B, K]; returns [B, K, N].
    """
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    alike = gather_tokens(unit, index) @ unit.transpose(1, 2)
    alike = alike.scatter(2, index.unsqueeze(-1), float("-inf"))
    near = top_indices(alike, min(_NEIGHBOURS, keys.shape[1] - 1))
    spread = weights.unsqueeze(1).expand(-1, index.shape[1], -1)
    return torch.zeros_like(spread).scatter(2, near, spread.gather(2, near))


def _listed(mask: Tensor) -> Tensor:
    """Return the marked places of each row, padded with -1. Shapes: [B, N] -> [B, N]."""
    index = compaction_index(mask, mask.shape[1], left_padded=False)
    return index.where(mask.gather(1, index), -1)


VISION_REDUCERS.register("prumerge")(PruMerge())
VISION_REDUCERS.register("prumerge_plus")(PruMerge(plus=True))
VISION_REDUCERS.register("prumerge_adaptive", options={"fence": _FENCE})(PruMerge(adaptive=True))
VISION_REDUCERS.register("prumerge_plus_adaptive", options={"fence": _FENCE})(PruMerge(adaptive=True, plus=True))
