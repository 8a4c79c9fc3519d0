"""A key-value cache whose layers hold different positions, because tokens were dropped between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass
class CachedSegment:
    """What a run of decoder layers holds in common.

    Attributes:
        start, stop: layers ``start`` to ``stop - 1``.
        valid: [B, n] bool over the cached positions, or None when none is padding.
        next_position: [B] (or [A, B] for multi-axis positions), the rotary position of the next token.
    """

    start: int
    stop: int
    valid: Tensor | None
    next_position: Tensor

    def index_batch(self, index: Tensor) -> None:
        """Reorder or repeat the samples. Shapes: index [B']."""
        index = index.to(self.next_position.device)
        self.next_position = self.next_position.index_select(-1, index)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, index)


class DuetCache(DynamicCache):
    """A ``DynamicCache`` that knows, for every segment of layers, which positions it holds.

    Everything that decoding needs after a reduced prefill lives here, so that two generations on one model, beam search
    and threads do not disturb each other.

    Modifications to ``DynamicCache``: ``get_seq_length()`` without a layer returns what the caller has fed, in
    the caller's own count, so that ``generate`` slices its inputs right; with a layer it returns what that layer holds.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.segments: list[CachedSegment] = []
        self.fed = 0

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Return the length that the caller has fed, or that one layer holds."""
        return self.fed if layer_idx is None else super().get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return where new queries stand among the keys of one layer."""
        return super().get_seq_length(layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the samples for beam search. Shapes: beam_idx [B]."""
        layers: Any = self.layers
        for layer in layers:
            if layer.keys is not None:
                layer.keys = layer.keys.index_select(0, beam_idx.to(layer.keys.device))
                layer.values = layer.values.index_select(0, beam_idx.to(layer.values.device))
        self._index_segments(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample ``repeats`` times."""
        samples = self.segments[0].next_position.shape[-1] if self.segments else 0
        super().batch_repeat_interleave(repeats)
        self._index_segments(torch.arange(samples).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given samples. Shapes: indices [B']."""
        super().batch_select_indices(indices)
        self._index_segments(indices)

    def crop(self, *args, **kwargs) -> None:
        """Raise: layers hold different positions, so there is no common length to crop to."""
        raise NotImplementedError(
            "a reduced cache cannot be cropped (assisted and prompt-lookup decoding need that); detach DUET for them"
        )

    def _index_segments(self, index: Tensor) -> None:
        for segment in self.segments:
            segment.index_batch(index)
