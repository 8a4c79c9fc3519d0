"""FastV (arXiv 2403.06764): the attention of the last prompt token in the layer that has just run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.queries import marked_indices
from duet.stage2 import LANGUAGE_REDUCERS, Stage

if TYPE_CHECKING:
    from duet.config import DuetConfig


@LANGUAGE_REDUCERS.register("fastv", options={"rows": ("queries", "every")})
@torch.no_grad()
def fastv(stage: Stage, config: DuetConfig) -> Tensor:
    """Return the attention that each position received in the last layer, averaged over heads and rows.

    FastV's row is the last prompt token (``queries="last"``); its keep ratio acts once, after two or three layers. The
    option ``rows="every"`` averages over all positions that are no answer, as SparseVLM's authors ran it; rows before
    the image see none of it and are left out, which scales all scores alike.
    Shapes: returns [B, L]. Source: FastV Sec. 4.1 and its code, which reads the executed layer, not the next one.
    """
    state = stage.state
    if config.option("rows") == "every":
        rows = marked_indices(state.visual | state.text)
    else:
        rows = marked_indices(state.queries, state.rows)
    return stage.last_signals().received(*rows)
