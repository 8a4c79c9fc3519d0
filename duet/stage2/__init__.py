"""Language reducers: which visual tokens stay, decided inside the decoder. One file in this package is one method.

A reducer is a callable ``score(stage, config) -> [B, L]`` registered by name with
``@LANGUAGE_REDUCERS.register("name")``; the decoder loop keeps the best-scored visual tokens of each sample. It looks
at no other sample of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from duet.registry import Registry
from duet.signals import DecoderSignals

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
        previous: [B, L, D], the input of the layer that ran last.
        kept: how many visual tokens of each sample stay.
    """

    decoder: Any
    layer: int
    state: TokenState
    previous: Tensor
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


LanguageReducer = Callable[[Stage, "DuetConfig"], Tensor]
LANGUAGE_REDUCERS: Registry[LanguageReducer] = Registry("language reducer", "duet.stage2")
