"""DUET-VLM Sec. 3.2: rank visual tokens by the attention that text rows pay to them.

Shapes: B batch, L sequence, R query rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.queries import marked_indices
from duet.signals import DecoderSignals
from duet.stage2 import LANGUAGE_REDUCERS, Stage
from duet.tokens import top_indices

if TYPE_CHECKING:
    from duet.config import DuetConfig


@LANGUAGE_REDUCERS.register("text_guided")
@torch.no_grad()
def text_guided(stage: Stage, config: DuetConfig) -> Tensor:
    """Return the attention that each position receives from the query rows, evaluated with the next layer's weights.

    ``config.queries`` chooses the rows. Shapes: returns [B, L] in fp32, averaged over heads and rows; ranking is
    detached. Source: DUET-VLM Sec. 3.2; with the last row and no stage 1 this is PyramidDrop (arXiv 2410.17247).
    """
    signals = stage.next_signals()
    rows, counted = marked_indices(stage.state.queries)
    if config.queries == "salient":
        rows, counted = salient_rows(signals, rows, counted, config.salient_tokens)
    elif isinstance(config.queries, tuple):
        rows, counted = _chosen_rows(rows, counted, config.queries)
    return signals.received(rows, counted)


def salient_rows(signals: DecoderSignals, rows: Tensor, counted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` text tokens that receive most text-to-text attention, plus the last one."""
    received = signals.received_among(rows, counted)
    last = counted.sum(1, keepdim=True).clamp(min=1) - 1
    received = received.masked_fill(~counted, -1.0).scatter(1, last, 2.0)
    picked = top_indices(received, min(count + 1, rows.shape[1])).sort(dim=1).values
    return rows.gather(1, picked), counted.gather(1, picked)


def _chosen_rows(rows: Tensor, counted: Tensor, indices: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the rows with the given indices; a sample that has none of them uses its last row."""
    total = counted.sum(1, keepdim=True)
    wanted = torch.tensor(indices, device=rows.device).expand(rows.shape[0], -1)
    wanted = torch.where(wanted < 0, wanted + total, wanted)
    inside = (wanted >= 0) & (wanted < total)
    inside[:, 0] |= ~inside.any(1)
    wanted = torch.where(inside & (wanted >= 0) & (wanted < total), wanted, total - 1).clamp(min=0)
    return rows.gather(1, wanted), inside & counted.gather(1, wanted)
