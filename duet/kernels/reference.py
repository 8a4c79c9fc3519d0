"""The kernels in PyTorch: what Triton's must equal, and what runs where they do not.

Scores and softmax are in fp32 and computed for blocks of query rows, so memory is O(rows of a block * N).

Shapes: B batch, H query heads, K key heads, R rows, M tokens of a tower, L sequence, d head width, D width, C clusters,
W members of a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20  # scores held at once on a CPU (fp32: 4 MiB); more do not stay in its cache
DEVICE_BLOCK_ELEMENTS = 1 << 23  # elsewhere; large enough to keep a GPU busy
_FEWEST_ROWS = 128  # of a block; a product of fewer is slow, so images, then heads, are taken apart first


def _at_once(device: torch.device) -> int:
    return BLOCK_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS


def block_rows(batch: int, heads: int, keys: int, rows: int, device: torch.device) -> int:
    """Return how many query rows to score at once; never all of them for long sequences."""
    return max(1, min(rows, 256, _at_once(device) // max(1, batch * heads * keys)))


def column_mass(
    query_BHRd: Tensor, key_BHMd: Tensor, scale: float, bounds: Tensor | None = None, valid_BM: Tensor | None = None
) -> Tensor:
    """See ``duet.kernels.column_mass``."""
    batch, heads, rows, _ = query_BHRd.shape
    maps = max(1, _at_once(key_BHMd.device) // (max(1, key_BHMd.shape[2]) * _FEWEST_ROWS))
    images = max(1, maps // heads)
    if batch > images:
        masks = [None] * -(-batch // images) if valid_BM is None else valid_BM.split(images)
        parts = zip(query_BHRd.split(images), key_BHMd.split(images), masks, strict=True)
        return torch.cat([column_mass(query, key, scale, bounds, valid) for query, key, valid in parts])
    if heads > maps:
        parts = zip(query_BHRd.split(maps, 1), key_BHMd.split(maps, 1), strict=True)
        each = [column_mass(query, key, scale, bounds, valid_BM) * (query.shape[1] / heads) for query, key in parts]
        return torch.stack(each).sum(0)
    keys = key_BHMd.float().transpose(-1, -2).contiguous()  # else every block's product copies them
    mass = keys.new_zeros(batch, keys.shape[-1])
    spans = windows(bounds, rows, query_BHRd.device)
    # Blocks as for a full part: the bits of an image's mass must not depend on the batch that it comes in.
    size = block_rows(images, heads, keys.shape[-1], rows, keys.device)
    held = keys.new_empty(batch, heads, size, keys.shape[-1])  # one for all blocks: fresh memory costs page faults
    for first, block in zip(range(0, rows, size), query_BHRd.split(size, dim=2), strict=True):
        scores = torch.matmul(block.float() * scale, keys, out=held if block.shape[2] == size else None)
        if spans is None and valid_BM is None:
            mass += torch.softmax(scores, -1, out=scores).sum(dim=(1, 2))
            continue
        allowed, counted = _seen(spans, valid_BM, first, block.shape[2], keys)
        scores.masked_fill_(~allowed.unsqueeze(1), torch.finfo(scores.dtype).min)
        shares = torch.softmax(scores, -1, out=scores).mul_((allowed & counted.unsqueeze(-1)).unsqueeze(1))
        mass += shares.sum(dim=(1, 2))
    return mass / (heads * readers(spans, valid_BM, rows))


def windows(bounds: Tensor | None, length: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return where the segment of each position starts and ends. Shapes: bounds [S + 1]; returns [M], [M] int32."""
    if bounds is None:
        return None
    bounds = bounds.to(device=device, dtype=torch.int32)
    segment = torch.bucketize(torch.arange(length, device=device, dtype=torch.int32), bounds[1:-1], right=True)
    return bounds[segment], bounds[segment + 1]


def readers(spans: tuple[Tensor, Tensor] | None, valid_BM: Tensor | None, rows: int) -> Tensor | int:
    """Return how many valid queries may see each key, at least 1. Shapes: [B or 1, M], or a number without masks."""
    if spans is None:
        return rows if valid_BM is None else valid_BM.sum(1, keepdim=True).clamp(min=1)
    start, stop = spans
    if valid_BM is None:
        return (stop - start).unsqueeze(0)
    before = torch.nn.functional.pad(valid_BM.int().cumsum(1), (1, 0))
    return (before[:, stop.long()] - before[:, start.long()]).clamp(min=1)


def _seen(spans, valid_BM: Tensor | None, first: int, rows: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return which keys a block of queries may see, [B or 1, r, M], and which of the queries count, [B or 1, r]."""
    count, device = keys.shape[-1], keys.device
    allowed = torch.ones(1, rows, count, dtype=torch.bool, device=device)
    counted = torch.ones(1, rows, dtype=torch.bool, device=device)
    if spans is not None:
        start, stop = (edge[first : first + rows, None] for edge in spans)
        place = torch.arange(count, device=device)
        allowed = ((place >= start) & (place < stop)).unsqueeze(0)
    if valid_BM is not None:
        allowed, counted = allowed & valid_BM.unsqueeze(1), valid_BM[:, first : first + rows]
    return allowed, counted


def received(
    query_BHRd: Tensor,
    key_BKLd: Tensor,
    stop_BR: Tensor,
    counted_BR: Tensor,
    scale: float,
    valid_BL: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See ``duet.kernels.received``."""
    keys = (key_BKLd if rotary is None else rotate(key_BKLd, *rotary)).float()
    query = (query_BHRd.float() * scale).unflatten(1, (keys.shape[1], -1))
    batch, key_heads, group, rows, _ = query.shape
    size = block_rows(batch, key_heads * group, keys.shape[2], rows, keys.device)
    total = keys.new_zeros(batch, keys.shape[2])
    blocks = zip(stop_BR.split(size, 1), counted_BR.float().split(size, 1), query.split(size, 3), strict=True)
    for stop, counted, block in blocks:
        attention = probabilities(block, prefixes(stop, valid_BL, keys.shape[2]), keys)
        total += (attention.mean(1) * counted.unsqueeze(-1)).sum(1)
    return total / counted_BR.float().sum(1, keepdim=True).clamp(min=1.0)


def prefixes(stop_BR: Tensor, valid_BL: Tensor | None, length: int) -> Tensor:
    """Return which keys each row may see: valid ones before ``stop``. Shapes: [B, R, L] bool."""
    allowed = torch.arange(length, device=stop_BR.device) < stop_BR.unsqueeze(-1)
    return allowed if valid_BL is None else allowed & valid_BL.unsqueeze(1)


def probabilities(query_BKGRd: Tensor, allowed_BRL: Tensor, key_BKLd: Tensor) -> Tensor:
    """Return attention probabilities, [B, H, R, L]; a row that may see nothing is uniform and counts for nothing."""
    scores = query_BKGRd @ key_BKLd.transpose(-1, -2).unsqueeze(2)
    scores = scores.masked_fill(~allowed_BRL[:, None, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1).flatten(1, 2)


def rotate(x_BHLd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions in the half-split layout of Hugging Face decoders.

    Shapes: x [B, H, L, d]; cos, sin [B or 1, L, r] with r <= d (the rest of the head is not rotated).
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = cos.shape[-1]
    turned, rest = x_BHLd[..., :width], x_BHLd[..., width:]
    first, second = turned.chunk(2, dim=-1)
    out = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


def gather_all(tensors: Sequence[Tensor], index_BK: Tensor) -> list[Tensor]:
    """See ``duet.kernels.gather_all``."""
    return [_gather(x.expand(index_BK.shape[0], *x.shape[1:]), index_BK) for x in tensors]


def _gather(x: Tensor, index_BK: Tensor) -> Tensor:
    if x.dim() == 2:
        return x.gather(1, index_BK)
    return x.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def cluster_means(x_BND: Tensor, members_BCW: Tensor) -> Tensor:
    """See ``duet.kernels.cluster_means``."""
    members = _gather(x_BND, members_BCW.flatten(1)).unflatten(1, tuple(members_BCW.shape[1:]))
    return members.mean(2).to(x_BND.dtype)
