"""The text rows that rank visual tokens. Shapes: B batch, L sequence, R query rows."""

from __future__ import annotations

import torch
from torch import Tensor

from duet.tokens import IGNORE_INDEX, compaction_index


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


def marked_indices(mask_BL: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the marked positions of each row in order, padded to the longest row, and which of them are real.

    Shapes: mask [B, L] bool; returns [B, R] indices and [B, R] bool. R is at least 1, and ``most`` where the caller
    knows that no row has more marks; else a device has to report how many there are.
    """
    length = max(1, int(mask_BL.sum(1).max())) if most is None else min(max(1, most), mask_BL.shape[1])
    index = compaction_index(mask_BL, length, left_padded=False)
    return index, mask_BL.gather(1, index)


def surviving_rows(rows: Tensor, origin: Tensor, left: Tensor, left_origin: Tensor, valid: Tensor | None) -> Tensor:
    """Return the rows that rank after a drop: those that are left, or the last token up to where they were.

    A row may itself be a visual token that is dropped, where no text stands between the image and the answer.

    Args:
        rows: [B, L] the rows before the drop.
        origin: [B, L] where each position entered.
        left: [B, L'] the rows among what is left.
        left_origin: [B, L'].
        valid: [B, L'] bool or None.
    """
    last = origin.masked_fill(~rows, -1).amax(1, keepdim=True)
    before = left_origin <= last
    return torch.where(left.any(1, keepdim=True), left, _last(before if valid is None else before & valid))


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
