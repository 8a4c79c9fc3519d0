"""DART (arXiv 2502.11494): tokens that duplicate a few pivots least."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.stage2 import LANGUAGE_REDUCERS, Stage
from duet.tokens import gather_tokens, rank_descending, top_indices

if TYPE_CHECKING:
    from duet.config import DuetConfig

_VISUAL_PIVOTS = _TEXT_PIVOTS = 4


@LANGUAGE_REDUCERS.register("dart")
@torch.no_grad()
def dart(stage: Stage, config: DuetConfig) -> Tensor:
    """Score the visual pivots highest, then, pivot by pivot, the tokens that resemble it least.

    Pivots are the visual and the text tokens after the image with the largest key norm (L1, over all key heads, in the
    layer that ran last); similarity is the cosine of normed hidden states. Pivots take turns in a fixed order, visual
    ones first, and share the budget evenly, the first ones taking the remainder.
    Shapes: returns [B, L]. Source: DART Sec. 3 and its code.
    """
    state = stage.state
    norms = stage.last_signals().key_norms()
    unit = torch.nn.functional.normalize(stage.decoder.norm(state.hidden).float(), dim=-1)
    score = torch.full_like(norms, float("-inf"))
    for row, kept in enumerate(stage.kept):
        if kept:
            score[row] = _scores(unit[row], norms[row], state.visual[row], state.text[row], kept)
    return score


def _scores(unit: Tensor, norms: Tensor, visual: Tensor, text: Tensor, kept: int) -> Tensor:
    """Return one sample's scores: how early each visual token is taken. Shapes: [L, D], [L], [L], [L] -> [L]."""
    pivots = _largest(norms, visual, min(_VISUAL_PIVOTS, kept))
    free = visual.clone()
    free[pivots] = False
    taken, guides = [pivots], torch.cat((pivots, _largest(norms, text, _TEXT_PIVOTS)))
    budget = min(kept - len(pivots), int(free.sum()))
    for number, guide in enumerate(guides):
        share = budget // len(guides) + (number < budget % len(guides))
        distance = (-(unit @ unit[guide])).masked_fill(~free, float("-inf"))
        picked = rank_descending(distance[None])[0, :share]
        free[picked] = False
        taken.append(picked)
    order = torch.cat(taken)
    score = torch.full_like(norms, float("-inf"))
    score[order] = torch.arange(len(order), 0, -1, device=norms.device, dtype=norms.dtype)
    return score


def _largest(values: Tensor, mask: Tensor, count: int) -> Tensor:
    index = top_indices(values.masked_fill(~mask, float("-inf"))[None], count)[0]
    return index[gather_tokens(mask[None], index[None])[0]]
