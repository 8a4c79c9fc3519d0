"""Choosing and gathering tokens: the one tie rule, and the state that a drop gathers in lockstep.

Shapes: B batch, L sequence, N candidates, K kept, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duet.kernels import gather_all

IGNORE_INDEX = -100
_AT_ONCE = 1 << 18  # scores that become whole numbers at once


def rank_descending(scores_BN: Tensor) -> Tensor:
    """Return the candidates of each row from the highest score to the lowest.

    Shapes: scores [B, N], compared in fp32; returns indices [B, N]. Ties go to the lower index (paper silent).
    """
    return torch.sort(scores_BN.float(), dim=-1, descending=True, stable=True).indices


def top_indices(scores_BN: Tensor, count: int) -> Tensor:
    """Return the ``count`` best candidates of each row, best first.

    Shapes: scores [.., N], compared in fp32; returns [.., count]. Ties go to the lower index.
    """
    size = scores_BN.shape[-1]
    if 4 * count > size:
        return rank_descending(scores_BN)[..., :count]
    blocks = scores_BN.reshape(-1, size).split(max(1, _AT_ONCE // size))
    return torch.cat([_few_of_many(block, count) for block in blocks]).view(*scores_BN.shape[:-1], count)


def _few_of_many(scores_BN: Tensor, count: int) -> Tensor:
    """Return what ``top_indices`` does without sorting: score and place become one whole number.

    The bits of a float order like those of a whole number, those of a negative one the other way round.
    """
    bits = (scores_BN.float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0: there is only one zero
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    size = scores_BN.shape[-1]
    places = torch.arange(size - 1, -1, -1, device=order.device)
    return torch.topk(order * size + places, count, dim=-1).indices


def gather_tokens(x_BNd: Tensor, index_BK: Tensor) -> Tensor:
    """Return ``x[b, index[b, k]]``. Shapes: x [B, N] or [B, N, D], index [B, K]; returns [B, K] or [B, K, D]."""
    if x_BNd.dim() == 2:
        return x_BNd.gather(1, index_BK)
    return x_BNd.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, x_BNd.shape[-1]))


def compaction_index(keep_BL: Tensor, length: int, left_padded: bool) -> Tensor:
    """Return the marked positions of each row in order, at the end that is not padded.

    Shapes: keep [B, L] bool; returns [B, ``length``] indices; a row with fewer marks is filled with unmarked positions.
    """
    order = torch.sort(keep_BL.to(torch.uint8), dim=1, descending=not left_padded, stable=True).indices
    return order[:, order.shape[1] - length :] if left_padded else order[:, :length]


@dataclass(frozen=True)
class TokenState:
    """Everything about a batch of sequences that has to shrink together.

    Attributes:
        hidden: [B, L, D].
        valid: [B, L] bool, or None when no position is padding.
        visual: [B, L] bool, positions that came from an image.
        text: [B, L] bool, text after the first visual token that is no answer (see ``queries.query_rows``).
        queries: [B, L] bool, the rows among them that rank visual tokens.
        origin: [B, L] index of each position in the sequence that entered the first layer.
        positions: [B, L] (or [1, L], or [A, B, L] for multi-axis rotary positions).
        labels: [B, L] or None.
        left_padded: padding stands before the tokens.
        rows: no sample has more ``queries`` than this; None where that is not known.
    """

    hidden: Tensor
    valid: Tensor | None
    visual: Tensor
    text: Tensor
    queries: Tensor
    origin: Tensor
    positions: Tensor
    labels: Tensor | None
    left_padded: bool
    rows: int | None = None

    def keep(self, keep_BL: Tensor, length: int, padded: bool) -> TokenState:
        """Return the state with only the positions that ``keep_BL`` marks, in their order.

        Args:
            keep_BL: [B, L] bool.
            length: the largest number of marks in a row; shorter rows are padded to it.
            padded: whether any row is shorter than ``length``.
        """
        index = compaction_index(keep_BL, length, self.left_padded)
        axes = self.positions.unbind(0) if self.positions.dim() == 3 else (self.positions,)
        always = (self.hidden, self.visual, self.text, self.queries, self.origin, *axes)
        sometimes = (keep_BL if padded else None, self.labels)
        gathered = gather_all([x for x in (*always, *sometimes) if x is not None], index)
        hidden, visual, text, queries, origin = gathered[:5]
        positions = gathered[5 : len(always)]
        rest = iter(gathered[len(always) :])
        valid, labels = (None if x is None else next(rest) for x in sometimes)
        if valid is not None:
            visual, text, queries = visual & valid, text & valid, queries & valid
            labels = None if labels is None else labels.masked_fill(~valid, IGNORE_INDEX)
        return replace(
            self,
            hidden=hidden,
            valid=valid,
            visual=visual,
            text=text,
            queries=queries,
            origin=origin,
            positions=torch.stack(positions) if self.positions.dim() == 3 else positions[0],
            labels=labels,
        )


def compact_positions(valid: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Return positions 0..n-1 over the valid tokens of each row. Shapes: valid [B, L] or None; returns [B, L]."""
    if valid is None:
        return torch.arange(length, device=device).expand(batch, -1)
    return (valid.long().cumsum(1) - 1).clamp_(min=0)


def on_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return Python numbers as a tensor, without waiting for what the device has still to do. Shapes: as given."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


@dataclass(frozen=True)
class Counts:
    """What Python has to know of a batch to give tensors their shapes.

    Attributes:
        tokens: how many of each sample are no padding.
        visual: how many of them are visual.
        left_padded: padding stands before the tokens.
        rows: the most rows that rank in any sample; None where it was not asked for.
    """

    tokens: list[int]
    visual: list[int]
    left_padded: bool = False
    rows: int | None = None

    def repeated(self, times: int) -> Counts:
        """Return the numbers of a batch in which every sample stands ``times`` times in a row."""
        tokens, visual = ([n for n in numbers for _ in range(times)] for numbers in (self.tokens, self.visual))
        return replace(self, tokens=tokens, visual=visual)

    def left(self) -> Counts:
        """Return the numbers of the same batch with its padding, if it has any, in front."""
        return replace(self, left_padded=min(self.tokens) < max(self.tokens))

    @classmethod
    def read(cls, valid_BL: Tensor | None, visual_BL: Tensor, rows_BL: Tensor | None = None) -> Counts:
        """Count on the device and wait for the numbers, once."""
        length = visual_BL.shape[1]
        sums = [visual_BL.sum(1)]
        if rows_BL is not None:
            sums.append(rows_BL.sum(1))
        visual, *rest = torch.stack([*sums, *cls.sums(valid_BL)]).tolist()
        rows = None if rows_BL is None else max(1, *rest.pop(0))
        return replace(cls.of(visual, rest, length), rows=rows)

    @staticmethod
    def sums(valid_BL: Tensor | None) -> list[Tensor]:
        """Return what ``of`` has to know of a mask, [B] each; nothing of none."""
        return [] if valid_BL is None else [valid_BL.sum(1), valid_BL[:, 0].long(), valid_BL[:, -1].long()]

    @classmethod
    def of(cls, visual: list[int], sums: list[list[int]], length: int) -> Counts:
        """Return the numbers of a batch of samples with ``visual`` tokens and a mask with these ``sums``."""
        tokens, starts, ends = sums or ([length] * len(visual), [1], [1])
        return cls(tokens, visual, left_padded=not all(starts) and all(ends))
