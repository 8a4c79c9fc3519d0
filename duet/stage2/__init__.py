"""Language reducers: which visual tokens stay, decided inside the decoder. One file in this package is one method.

A reducer is a callable ``rank(stage, config)`` registered by name with ``@LANGUAGE_REDUCERS.register("name")``. It
returns scores [B, L], of which the decoder loop keeps each sample's best visual tokens, or a ``Decision`` where it
merges tokens or chooses their number itself. It looks at no other sample of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duet.registry import Registry
from duet.signals import DecoderSignals
from duet.tokens import on_device, rank_descending

if TYPE_CHECKING:
    from duet.config import DuetConfig
    from duet.tokens import TokenState


@dataclass(frozen=True)
class Stage:
    """What a reducer gets: a decoder between two of its layers.

    Attributes:
        decoder: the model without its head.
        layer: how many layers have run; the next one has this index.
        state: the batch at the input of the next layer.
        entered: the batch at the input of the first layer; ``state.origin`` numbers its positions.
        previous: [B, L, D], the input of the layer that ran last.
        before: how many visual tokens each sample has.
        kept: how many of them stay, at most where a reducer decides for itself.
    """

    decoder: Any
    layer: int
    state: TokenState
    entered: TokenState
    previous: Tensor
    before: list[int]
    kept: list[int]

    def next_signals(self) -> DecoderSignals:
        """Return attention with the next layer's weights, on its input. Ranking is detached."""
        return self._signals(self.layer, self.state.hidden)

    def last_signals(self) -> DecoderSignals:
        """Return attention as the layer that ran last executed it."""
        return self._signals(self.layer - 1, self.previous)

    def _signals(self, layer: int, hidden: Tensor) -> DecoderSignals:
        rotary = self.decoder.rotary_emb(hidden, self.state.positions)
        return DecoderSignals(self.decoder.layers[layer], hidden.detach(), rotary, self.state.valid)


@dataclass(frozen=True)
class Decision:
    """What a reducer returns that does more than rank.

    Attributes:
        keep: [B, L] bool, the visual positions that go on; a merged token stands at one of those that it merges.
        kept: how many they are in each sample.
        hidden: [B, L, D] with merged tokens in place, or None where none changed. Gradients flow through it.
        merged_into: [B, L] position of the merged token that each position went into, -1 for all others, or None.
    """

    keep: Tensor
    kept: list[int]
    hidden: Tensor | None = None
    merged_into: Tensor | None = None


def keep_best(score_BL: Tensor, visual_BL: Tensor, kept: list[int]) -> Tensor:
    """Mark the ``kept[b]`` visual positions of each sample that score highest. Shapes: [B, L] -> [B, L] bool."""
    order = rank_descending(score_BL.masked_fill(~visual_BL, float("-inf")))
    quota = on_device(kept, order.device).unsqueeze(1)
    chosen = torch.arange(order.shape[1], device=order.device) < quota
    return torch.zeros_like(visual_BL).scatter(1, order, chosen) & visual_BL


LanguageReducer = Callable[[Stage, "DuetConfig"], Tensor | Decision]
LANGUAGE_REDUCERS: Registry[LanguageReducer] = Registry("language reducer", "duet.stage2")
