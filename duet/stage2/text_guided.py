"""DUET-VLM Sec. 3.2: rank visual tokens by the attention that text rows pay to them.

Shapes: B batch, L sequence, R query rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.signals import DecoderSignals
from duet.stage2 import LANGUAGE_REDUCERS, Stage
from duet.tokens import IGNORE_INDEX, compaction_index, top_indices

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
        rows, counted = _salient_rows(signals, rows, counted, config.salient_tokens)
    elif isinstance(config.queries, tuple):
        rows, counted = _chosen_rows(rows, counted, config.queries)
    return signals.received(rows, counted)


def marked_indices(mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the marked positions of each row in order, padded to the longest row, and which of them are real.

    Shapes: mask [B, L] bool; returns [B, R] indices and [B, R] bool, R at least 1.
    """
    index = compaction_index(mask_BL, max(1, int(mask_BL.sum(1).max())), left_padded=False)
    return index, mask_BL.gather(1, index)


def _salient_rows(signals: DecoderSignals, rows: Tensor, counted: Tensor, count: int) -> tuple[Tensor, Tensor]:
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


def query_rows(valid: Tensor | None, visual: Tensor, answers: Tensor | None, queries: str | tuple[int, ...]) -> Tensor:
    """Return the text rows that may rank visual tokens.

    ``"last"``: the last prompt token, or in training the token before each answer. Otherwise: every text token after
    the first visual one that is no answer. Where that leaves none (plain captions: everything after the image is an
    answer), the token before the first answer ranks. Padding and answers never rank.

    Args:
        valid: [B, L] bool or None.
        visual: [B, L] bool.
        answers: [B, L] bool, positions that the model has to predict, or None.
        queries: ``DuetConfig.queries``.

    Shapes: returns [B, L] bool with at least one mark in every row that holds a token.
    Source: DUET-VLM Sec. 3.2 and App. B; PyramidDrop for the rows before answers and the fallback.
    """
    tokens = torch.ones_like(visual) if valid is None else valid
    answers = torch.zeros_like(visual) if answers is None else answers & tokens
    prompt_end = _before_answers(answers)
    prompt_end = torch.where(prompt_end.any(1, keepdim=True), prompt_end, _last(tokens))
    if queries == "last":
        return prompt_end
    rows = tokens & ~visual & ~answers & (visual.cumsum(1) > 0)
    return torch.where(rows.any(1, keepdim=True), rows, _first(prompt_end))


def answers_from_labels(labels: Tensor | None) -> Tensor | None:
    """Return where a label supervises, [B, L] bool, or None without labels."""
    return None if labels is None else labels != IGNORE_INDEX


def _before_answers(answers: Tensor) -> Tensor:
    """Mark the position before the first token of each answer span. Shapes: [B, L] -> [B, L]."""
    starts = answers[:, 1:] & ~answers[:, :-1]
    return torch.nn.functional.pad(starts, (0, 1))


def _first(mask: Tensor) -> Tensor:
    return mask & (mask.cumsum(1) == 1)


def _last(mask: Tensor) -> Tensor:
    return _first(mask.flip(1)).flip(1)
