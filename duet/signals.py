"""What a reducer may ask of an attention layer, computed from queries and keys without an attention map.

A row of attention is one query against all keys. A column mass, how much attention a token receives, is summed over
blocks of queries (``duet.kernels``), so memory is O(block * N), never N * N, and the layer itself keeps SDPA or
FlashAttention. Scores and softmax are in fp32.

Shapes: B batch, H heads, M tower tokens (with the class token), N patches, R rows, L sequence, T text tokens, d head
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from duet import kernels
from duet.kernels import reference
from duet.kernels.reference import rotate


class kept:
    """A property that is computed once for each instance.

    ``functools.cached_property`` holds one lock for all instances of a class while it computes (before Python 3.12),
    so that threads would wait for each other in the middle of a pass.
    """

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Return the value, which from then on stands in the instance's ``__dict__`` and is found there."""
        if instance is None:
            return self
        value = vars(instance)[self._name] = self._compute(instance)
        return value


def spread(count: int, size: int, device: torch.device) -> Tensor | slice:
    """Return an index of ``count`` of ``size`` places, evenly spread and in no step with the rows of a grid.

    It takes one of each of ``count`` equal parts (parts of less than two places may share one), or all places where
    ``count`` is 0 or not below ``size``.
    """
    if not 0 < count < size:
        return slice(None)
    part = torch.arange(count, device=device, dtype=torch.float64)
    inside = part * (math.sqrt(5) - 1) / 2 % 1  # multiples of the golden ratio leave no large gaps
    return ((part + inside) * size / count).long()


def attention_rows(query_BHRd: Tensor, key_BHMd: Tensor, multiple: int = 1) -> Iterator[Tensor]:
    """Yield the attention of chosen queries to all keys, averaged over heads, in blocks of queries.

    Shapes: scaled queries [B, H, R, d] in fp32, keys [B, H, M, d]; yields [B, r, M], where ``multiple`` divides r.
    """
    keys = key_BHMd.float().transpose(-1, -2)
    batch, heads, rows, _ = query_BHRd.shape
    size = reference.block_rows(batch, heads, keys.shape[-1], rows, keys.device)
    for block in query_BHRd.split(max(1, size // multiple) * multiple, dim=2):
        yield (block @ keys).softmax(-1).mean(1)


class TowerSignals:
    """Signals of one block of a vision transformer, computed on demand from the block's input.

    The block itself is left alone: it is shared by all threads that run the model. Queries and keys are computed a
    second time, once each and for all tokens as the block does it, so that they have the block's own bits; of a tower
    of 23 blocks that is less than a hundredth.

    Args:
        hidden_BMD: input of the block after its first layer norm, [B, M, D].
        attention: the block's attention module, with ``q_proj``, ``k_proj``, ``num_heads`` and ``scale``.
        class_token: whether token 0 is a class token.
    """

    def __init__(self, hidden_BMD: Tensor, attention: Any, class_token: bool) -> None:
        self._hidden = hidden_BMD
        self._attention = attention
        self._heads = int(attention.num_heads)
        self.class_token = class_token

    def select(self, index_B: Tensor) -> TowerSignals:
        """Return the signals of the images with the given numbers."""
        return TowerSignals(self._hidden[index_B.to(self._hidden.device)], self._attention, self.class_token)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self._heads, -1)).transpose(1, 2)

    @kept
    @torch.no_grad()
    def _projected_queries(self) -> Tensor:
        """Queries of all tokens, heads side by side, [B, M, D]."""
        return self._attention.q_proj(self._hidden)

    @kept
    @torch.no_grad()
    def _projected_keys(self) -> Tensor:
        """Keys of all tokens, heads side by side, [B, M, D]."""
        return self._attention.k_proj(self._hidden)

    def _scaled(self, query_BRD: Tensor) -> Tensor:
        return self._split(query_BRD).float() * self._attention.scale

    @property
    def _keys(self) -> Tensor:
        return self._split(self._projected_keys)

    @property
    def _first_patch(self) -> int:
        return int(self.class_token)

    def class_row(self) -> Tensor:
        """Return the class token's attention to the patches, per head.

        Shapes: returns [B, H, N]; the softmax runs over all M keys, then the class column is cut off.
        Raises:
            ValueError: the tower has no class token.
        """
        if not self.class_token:
            raise ValueError("this vision tower has no class token; use column_mass() instead of class_row()")
        query = self._scaled(self._projected_queries[:, :1])
        return (query @ self._keys.float().transpose(-1, -2)).softmax(-1)[:, :, 0, 1:]

    def column_mass(self, readers: int = 0) -> Tensor:
        """Return the attention that each patch receives from all patches, averaged over heads and queries.

        Args:
            readers: how many patches to ask, spread evenly; 0, or more than there are, for all of them.

        Shapes: returns [B, N]. Source: DUET-VLM Algorithm 1 line 2 (a sum there; the ranking is the same).
        """
        first = self._first_patch
        places = spread(readers, self._hidden.shape[1] - first, self._hidden.device)
        queries = self._split(self._projected_queries[:, first:][:, places])
        return kernels.column_mass(queries, self._keys, self._attention.scale)[:, first:]

    def rows(self, patch_BR: Tensor, multiple: int = 1) -> Iterator[Tensor]:
        """Yield the attention rows of chosen patches over all patches, averaged over heads, in blocks of rows.

        However many blocks there are, the block's projections run once: ranks of a ZeRO-3 job stay in step.
        Shapes: patch indices [B, R]; yields [B, r, N], where ``multiple`` divides r. Source: Algorithm 1 line 6.
        """
        index = (patch_BR + self._first_patch).unsqueeze(-1).expand(-1, -1, self._hidden.shape[-1])
        queries = self._scaled(self._projected_queries.gather(1, index))
        for block in attention_rows(queries, self._keys, multiple):
            yield block[..., self._first_patch :]

    def joint_class_row(self) -> Tensor:
        """Return the class token's attention to the patches with all heads taken as one. Shapes: [B, N].

        Source: PruMerge's code, which does not split queries and keys.
        """
        if not self.class_token:
            raise ValueError("this vision tower has no class token; use column_mass() instead of joint_class_row()")
        query, keys = self._projected_queries[:, :1].float(), self._projected_keys.float()
        return (query @ keys.transpose(-1, -2) * keys.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]

    def joint_keys(self) -> Tensor:
        """Return the keys of the patches with all heads side by side. Shapes: [B, N, D]."""
        return self._keys.transpose(1, 2).flatten(2)[:, self._first_patch :]

    def key_metric(self) -> Tensor:
        """Return the keys of all tower tokens averaged over heads, before any rotation. Shapes: [B, M, d]."""
        return self._keys.mean(1)


class DecoderSignals:
    """Attention of chosen rows at the input of one decoder layer, evaluated with that layer's own weights.

    Args:
        layer: a decoder layer with ``input_layernorm`` and ``self_attn`` (``q_proj``, ``k_proj``, optional norms).
        hidden_BLD: input of the layer, [B, L, D].
        rotary: (cos, sin) of the current positions, each [B or 1, L, r].
        valid_BL: [B, L] bool, or None when nothing is padding.
    """

    def __init__(self, layer: Any, hidden_BLD: Tensor, rotary: tuple[Tensor, Tensor], valid_BL: Tensor | None) -> None:
        self._attention = layer.self_attn
        self._normed = layer.input_layernorm(hidden_BLD)
        self._rotary = rotary
        self._valid = valid_BL

    def _heads(self, x: Tensor, norm: str) -> Tensor:
        x = x.unflatten(-1, (-1, int(self._attention.head_dim)))
        if hasattr(self._attention, norm):
            x = getattr(self._attention, norm)(x)
        return x.transpose(1, 2)

    @kept
    def _unrotated(self) -> Tensor:
        """Keys before rotation, [B, Hkv, L, d]."""
        return self._heads(self._attention.k_proj(self._normed), "k_norm")

    @kept
    def _keys(self) -> Tensor:
        """Rotated keys in fp32, [B, Hkv, L, d]."""
        return rotate(self._unrotated, *self._rotary).float()

    def _queries(self, index_BR: Tensor) -> Tensor:
        """Rotated queries of chosen rows, [B, H, R, d]."""
        picked = self._normed.gather(1, index_BR.unsqueeze(-1).expand(-1, -1, self._normed.shape[-1]))
        query = self._heads(self._attention.q_proj(picked), "q_norm")
        cos, sin = (_pick_rows(table, index_BR) for table in self._rotary)
        return rotate(query, cos, sin)

    def key_norms(self) -> Tensor:
        """Return the sum of absolute values of each position's rotated keys, over all key heads. Shapes: [B, L]."""
        return self._keys.abs().sum(dim=(1, 3))

    def received(self, index_BR: Tensor, counted_BR: Tensor, causal: bool = True) -> Tensor:
        """Return the attention that each position receives from chosen rows, averaged over heads and rows.

        The softmax runs over the whole causal prefix of a row, or up to the last row. Shapes: row positions [B, R],
        counted [B, R] bool marks the rows that are real; returns [B, L].
        Source: DUET-VLM Sec. 3.2; PyramidDrop Eq. (1) for a single row.
        """
        stop = self._stops(index_BR, counted_BR, causal)
        keys, rotary = (self._unrotated, self._rotary) if kernels.usable(self._normed) else (self._keys, None)
        queries, scale = self._queries(index_BR), self._attention.scaling
        return kernels.received(queries, keys, stop, counted_BR, scale, self._valid, rotary)

    def rows(
        self, index_BR: Tensor, counted_BR: Tensor, causal: bool = True
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the attention probabilities of chosen rows in blocks of rows, each softmaxed over its causal prefix.

        However many blocks there are, the layer's projections run once: ranks of a ZeRO-3 job stay in step.
        Shapes: row positions [B, R], counted [B, R]; yields positions [B, r], counted [B, r] as 0 or 1, and
        probabilities [B, H, r, L] in fp32. A row that may see nothing is uniform.
        """
        keys = self._keys
        stops = self._stops(index_BR, counted_BR, causal)
        for places, stop, counted, queries in self._blocks(index_BR, stops, counted_BR.float()):
            allowed = reference.prefixes(stop, self._valid, keys.shape[2])
            yield places, counted, reference.probabilities(queries, allowed, keys)

    def largest_received(self, index_BR: Tensor, counted_BR: Tensor) -> Tensor:
        """Return, summed over chosen rows, the most attention that any head pays to each position. Shapes: [B, L].

        Source: FitPrune's code, which takes the maximum over heads before it adds rows up.
        """
        total = self._keys.new_zeros(self._keys.shape[0], self._keys.shape[2])
        for _, counted, probabilities in self.rows(index_BR, counted_BR):
            total += (probabilities.amax(1) * counted.unsqueeze(-1)).sum(1)
        return total

    def position_prior(self, index_BR: Tensor) -> Tensor:
        """Return the logits that positions alone make, relative to that of a position with itself. Shapes: [B, R, L].

        Queries and keys of ones are rotated and multiplied: 1 at distance zero, falling with distance, maybe below 0.
        Source: SparseVLM 2.0's correction of attention that decays with distance.
        """
        cos, sin = (table.expand(index_BR.shape[0], -1, -1).float() for table in self._rotary)
        ones = cos.new_ones(len(cos), 1, cos.shape[1], int(self._attention.head_dim))
        keys = rotate(ones, cos, sin)[:, 0]
        queries = keys.gather(1, index_BR.unsqueeze(-1).expand(-1, -1, keys.shape[-1]))
        return queries @ keys.transpose(-1, -2) / (queries * queries).sum(-1, keepdim=True)

    def received_among(self, index_BT: Tensor, counted_BT: Tensor) -> Tensor:
        """Return the attention that text tokens receive from later text tokens, per reader, averaged over heads.

        Keys are the chosen tokens only, a token's attention to itself is left out, and each sum is divided by its
        number of readers, because causal columns have unequal numbers of them. Shapes: positions [B, T] in ascending
        order, counted [B, T] bool; returns [B, T], zero where there is no reader. Source: DUET-VLM App. B.
        """
        width = self._keys.shape[-1]
        keys = self._keys.gather(2, index_BT[:, None, :, None].expand(-1, self._keys.shape[1], -1, width))
        total = keys.new_zeros(index_BT.shape)
        readers = keys.new_zeros(index_BT.shape)
        for rows, mark, queries in self._blocks(index_BT, counted_BT.float()):
            later = rows.unsqueeze(-1) - index_BT.unsqueeze(1)
            allowed = (later >= 0) & counted_BT.unsqueeze(1)
            strict = ((later > 0) & counted_BT.unsqueeze(1)) * mark.unsqueeze(-1)
            total += (reference.probabilities(queries, allowed, keys).mean(1) * strict).sum(1)
            readers += strict.sum(1)
        return total / readers.clamp(min=1.0)

    def _stops(self, index_BR: Tensor, counted_BR: Tensor, causal: bool) -> Tensor:
        """Return before which position each row stops to see: behind itself, or behind the last row. Shapes: [B, R]."""
        last = index_BR if causal else index_BR.masked_fill(~counted_BR, 0).amax(1, keepdim=True).expand_as(index_BR)
        return last + 1

    def _blocks(self, index_BR: Tensor, *per_row_BR: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield positions, what else there is per row, and queries [B, Hkv, G, r, d], as many as are scored at once."""
        queries = self._queries(index_BR).float() * self._attention.scaling
        queries = queries.unflatten(1, (self._keys.shape[1], -1))
        batch, key_heads, group, rows, _ = queries.shape
        size = reference.block_rows(batch, key_heads * group, self._normed.shape[1], rows, queries.device)
        parts = [x.split(size, 1) for x in (index_BR, *per_row_BR)]
        yield from zip(*parts, queries.split(size, 3), strict=True)


def _pick_rows(table: Tensor, index_BR: Tensor) -> Tensor:
    table = table.expand(index_BR.shape[0], -1, -1)
    return table.gather(1, index_BR.unsqueeze(-1).expand(-1, -1, table.shape[-1]))
