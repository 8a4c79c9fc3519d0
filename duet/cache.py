"""A key-value cache whose layers hold different positions, because tokens were dropped between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer

from duet.versions import take_cache


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

    def make_static(self, room: int) -> None:
        """Give the mask its final width and the positions storage of their own, so that both keep their addresses.

        The mask marks what is to come as valid: causality hides it until it is there.
        """
        self.next_position = self.next_position.clone(memory_format=torch.contiguous_format)
        torch._dynamo.mark_static_address(self.next_position)
        if self.valid is not None:
            self.valid = pad(self.valid, (0, room), value=True)
            torch._dynamo.mark_static_address(self.valid)

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

    Attributes:
        segments: runs of layers that hold the same positions; none before the prefill.
        fed: positions that the caller has fed, by its own count; with static layers, at the end of the prefill.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.segments: list[CachedSegment] = []
        self.fed = 0
        self._prefilled: int | None = None  # what the first layer held when the layers became static

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` works (assisted decoding asks): it does not."""
        return False

    @property
    def is_static(self) -> bool:
        """Whether decoding writes into storage of fixed size and address (CUDA graphs need that)."""
        return self._prefilled is not None

    def make_static(self, room: int) -> None:
        """Give every layer storage for the positions that it holds and ``room`` more, for compiled decoding.

        Each layer is as long as what it kept of the picture: nothing is padded to the longest one.

        Raises:
            ValueError: there was no reduced prefill, no room, or a layer has a sliding window.
        """
        if not self.segments or self.is_static:
            raise ValueError("make_static() comes once, after a reduced prefill")
        if room < 1:
            raise ValueError(f"room is {room}: the prefill alone fills the cache; ask for at least 1 further position")
        layers: Any = self.layers
        if any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers):
            raise ValueError("layers with a sliding window cannot be static with DUET; use the default dynamic cache")
        self._prefilled = layers[0].keys.shape[-2]
        for index, layer in enumerate(layers):
            static = StaticLayer(layer.keys.shape[-2] + room)
            static.update(layer.keys, layer.values)
            self.layers[index] = static
        for segment in self.segments:
            segment.make_static(room)

    def advance(self, new: int) -> None:
        """Count ``new`` positions that the caller has fed; static layers count for themselves, on the device."""
        if not self.is_static:
            self.fed += new

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Return the length that the caller has fed, or that one layer holds; a tensor with static layers."""
        if layer_idx is not None:
            return super().get_seq_length(layer_idx)
        if self._prefilled is None:
            return self.fed
        return super().get_seq_length(0) + (self.fed - self._prefilled)

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

    def reset(self) -> None:
        """Raise: what the layers dropped is part of what they hold, so that another prompt needs another cache."""
        raise NotImplementedError("a reduced cache cannot be reset; begin with a new one, or with none")

    def crop(self, *args, **kwargs) -> None:
        """Raise: layers hold different positions, so there is no common length to crop to."""
        raise NotImplementedError(
            "a reduced cache cannot be cropped (assisted and prompt-lookup decoding need that); detach DUET for them"
        )

    def _index_segments(self, index: Tensor) -> None:
        for segment in self.segments:
            segment.index_batch(index)


def check_prefill_cache(given: Cache | None) -> None:
    """Raise ValueError for a cache that a reduced prefill cannot start with; an empty one is replaced."""
    if given is None:
        return
    if given.get_seq_length() > 0:
        raise ValueError(
            "the cache already holds positions of an unreduced pass; start a reduced prefill with an empty cache. "
            "(PEFT's prefix tuning puts virtual tokens there, and does not work while DUET is attached; prompt tuning "
            "and LoRA do)"
        )
    if getattr(given, "offloading", False):
        raise ValueError(
            "an offloaded cache cannot hold layers of different lengths; leave cache_implementation out, or detach "
            "DUET. A reduced cache is smaller in the first place"
        )
    if type(given) not in (DynamicCache, DuetCache, StaticCache):
        raise ValueError(
            f"a {type(given).__name__} cannot hold layers of different lengths; use the default dynamic cache with "
            'DUET, or cache_implementation="static"'
        )


def masks_for_generate(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Stand in for what ``generate`` makes of the mask when shapes are fixed: one for all layers, of the fed length.

    Layers that kept different positions need different masks, which the decoder makes. The mask of one new position
    says nothing new, and would grow with every step.
    """
    del config
    cache = take_cache(kwargs)
    decodes = isinstance(cache, DuetCache) and cache.segments and inputs_embeds.shape[1] == 1
    return None if decodes else attention_mask
