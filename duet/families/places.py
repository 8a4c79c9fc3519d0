"""Where a caller's positions went: what comes out of a reduced pass is paired with what was given.

Every text position stays. A position whose token was dropped is answered by the last token before it that stayed: that
one predicts what comes next, so a next-token loss over all positions equals that over the positions that stayed.

Shapes: B batch, L positions as the caller counts them, K positions that are left, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet.decoder import DecoderOutput
from duet.tokens import IGNORE_INDEX, gather_tokens


@dataclass(frozen=True)
class Places:
    """What is left of a caller's positions.

    Attributes:
        kept: [B, K] the caller's position of each one that is left, ascending, -1 for padding; None where all stayed.
        length: L.
    """

    kept: Tensor | None
    length: int

    @classmethod
    def of(cls, entered: Tensor | None, out: DecoderOutput, length: int) -> Places:
        """Return the places after stage 1 (``entered`` [B, ..], as ``Prompt.origin``) and the decoder."""
        if out.origin is None or entered is None:
            return cls(entered if out.origin is None else out.origin, length)
        kept = entered.gather(1, out.origin.clamp(min=0))
        return cls(kept.masked_fill(out.origin < 0, -1), length)

    def index(self) -> Tensor:
        """Return which position that is left answers for each of the caller's. Shapes: [B, L]."""
        assert self.kept is not None
        batch, left = self.kept.shape
        number = torch.arange(left, device=self.kept.device).expand(batch, -1)
        at = self.kept.new_full((batch, self.length + 1), -1)  # padding goes to one place more
        at = at.scatter(1, self.kept.where(self.kept >= 0, self.length), number)[:, :-1]
        first = at.masked_fill(at < 0, left).amin(1, keepdim=True).clamp(max=left - 1)
        return at.cummax(1).values.maximum(first)

    def spread(self, x_BKX: Tensor) -> Tensor:
        """Return values at all of the caller's positions. Shapes: [B, K, X] to [B, L, X]."""
        return x_BKX if self.kept is None else gather_tokens(x_BKX, self.index())

    def spread_labels(self, labels_BK: Tensor | None) -> Tensor | None:
        """Return labels at the caller's positions; dropped tokens have none. Shapes: [B, K] to [B, L]."""
        if labels_BK is None or self.kept is None:
            return labels_BK
        at = labels_BK.new_full((len(labels_BK), self.length + 1), IGNORE_INDEX)
        return at.scatter(1, self.kept.where(self.kept >= 0, self.length), labels_BK)[:, :-1]

    def pick(self, hidden_BKD: Tensor, wanted: int | Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return what ``logits_to_keep`` names: the last n of the caller's positions, or chosen ones.

        Args:
            hidden_BKD: [B, K, D].
            wanted: n > 0; or positions [n], [B, n]; or a bool mask [L], or [B, L], which flattens the batch.
            attention_mask: [B, L] of the caller, or None.

        Raises:
            ValueError: a position is named whose token was dropped.
        """
        if isinstance(wanted, int):
            if self.kept is None:
                return hidden_BKD[:, -wanted:]
            return gather_tokens(hidden_BKD, self.index()[:, -wanted:])
        if wanted.dim() == 1 and wanted.dtype == torch.bool:
            wanted = wanted.nonzero().flatten()
        wanted = wanted.to(hidden_BKD.device)
        if self.kept is None:
            return _pick_plain(hidden_BKD, wanted)
        marks = self._marked(wanted)
        present = torch.zeros(len(self.kept), self.length + 1, dtype=torch.bool, device=marks.device)
        present = present.scatter(1, self.kept.where(self.kept >= 0, self.length), True)[:, :-1]
        if attention_mask is not None and attention_mask.shape == present.shape:
            present = present | ~attention_mask.to(marks.device).bool()  # padding answers for nothing
        missing = (marks & ~present).nonzero().tolist()
        if missing:
            row, position = missing[0]
            raise ValueError(
                f"logits_to_keep names position {position} of sample {row}, whose visual token was dropped, so it has "
                "no logits; name text positions, or pass a number, which counts from the end"
            )
        return _pick_plain(gather_tokens(hidden_BKD, self.index()), wanted)

    def _marked(self, wanted: Tensor) -> Tensor:
        """Return the positions that are named, as a mask [B, L]."""
        assert self.kept is not None
        if wanted.dtype == torch.bool:
            return wanted
        positions = wanted.expand(len(self.kept), -1) % self.length
        marks = torch.zeros(len(self.kept), self.length, dtype=torch.bool, device=wanted.device)
        return marks.scatter(1, positions, True)


def _pick_plain(hidden: Tensor, wanted: Tensor) -> Any:
    if wanted.dtype == torch.bool:
        return hidden[wanted]
    return hidden[:, wanted] if wanted.dim() == 1 else torch.take_along_dim(hidden, wanted.unsqueeze(-1), dim=1)
