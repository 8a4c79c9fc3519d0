"""Callers of the Triton kernels: shapes, strides and grids. ``duet.kernels`` decides whether they run.

On tensors of a CPU they run where Triton was imported with ``TRITON_INTERPRET=1``, which is how they are tested.

Shapes: as in ``duet.kernels.reference``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from duet.kernels import reference

_SMALLEST_TILE = 16  # what a matrix product of Triton needs at least
_WIDEST_HEAD = 256


def column_mass(
    query_BHRd: Tensor, key_BHMd: Tensor, scale: float, bounds: Tensor | None = None, valid_BM: Tensor | None = None
) -> Tensor:
    """See ``duet.kernels.column_mass``."""
    heads, rows = query_BHRd.shape[1:3]
    spans = reference.windows(bounds, rows, query_BHRd.device)
    start, stop = (None, None) if spans is None else spans
    weight = None if valid_BM is None else valid_BM.float()
    mass = _sums(query_BHRd, key_BHMd, scale, start=start, stop=stop, valid=valid_BM, weight=weight)
    return mass / (heads * reference.readers(spans, valid_BM, rows))


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
    counted = counted_BR.float()
    total = _sums(
        query_BHRd, key_BKLd, scale, stop=stop_BR.int(), valid=valid_BL, weight=counted, rotary=rotary
    )  # fmt: skip
    return total / (query_BHRd.shape[1] * counted.sum(1, keepdim=True).clamp(min=1.0))


def _sums(
    query: Tensor,
    key: Tensor,
    scale: float,
    start: Tensor | None = None,
    stop: Tensor | None = None,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return each key's attention, summed over heads and weighted rows, [B, N] in fp32.

    Row r sees the valid keys from ``start[r]`` to ``stop[r] - 1``. Shapes: start, stop [B, R] or [R]; weight [B, R].
    """
    if rotary is not None and (rotary[0].dtype != key.dtype or rotary[0].shape[-1] % 2):
        key, rotary = reference.rotate(key, *rotary), None
    if query.dtype != key.dtype:
        query, key = query.float(), key.float()
    query, key = _with_dense_rows(query), _with_dense_rows(key)
    batch, heads, rows, width = query.shape
    key_heads, count = key.shape[1:3]
    cos, sin = (key, key) if rotary is None else (_with_dense_rows(table.expand(batch, -1, -1)) for table in rotary)
    start, stop = (None if edge is None else edge.expand(batch, rows).contiguous() for edge in (start, stop))
    valid, weight = (None if x is None else _bytes(x.contiguous()) for x in (valid, weight))
    block_rows, block_keys, block_width = _tiles(query, heads // key_heads * rows)
    total_rows = heads // key_heads * rows
    lse = torch.empty(batch, key_heads, total_rows, dtype=torch.float32, device=key.device)
    out = torch.empty(batch, key_heads, count, dtype=torch.float32, device=key.device)
    pointers = (query, key, cos, sin, _or(start, lse), _or(stop, lse), _or(valid, lse))
    numbers = (
        scale, rows, count, width, total_rows, *query.stride()[:3], *key.stride()[:3], *cos.stride()[:2], rows,
    )  # fmt: skip
    options: dict[str, Any] = {
        "G": heads // key_heads,
        "WIDTH": 0 if rotary is None else cos.shape[-1],
        "HAS_START": start is not None,
        "HAS_STOP": stop is not None,
        "HAS_VALID": valid is not None,
        "UPCAST": _upcast(key),
        "BLOCK_R": block_rows,
        "BLOCK_N": block_keys,
        "BLOCK_D": block_width,
        # Loading ahead where keys are rotated would hold four tiles more per step: too much for most GPUs.
        "num_stages": 2 if rotary is None else 1,
    }
    with _on(key.device):
        grid = (_cdiv(total_rows, block_rows), key_heads, batch)
        _source().row_lse[grid](*pointers, lse, *numbers, **options)
        grid = (_cdiv(count, block_keys), key_heads, batch)
        _source().column_sums[grid](
            *pointers, _or(weight, lse), lse, out, *numbers, HAS_WEIGHT=weight is not None, **options
        )
    return out.sum(1)


def fits(head_width: int) -> bool:
    """Return whether tiles of heads of this width fit into the fast memory of a GPU's processor."""
    return head_width <= _WIDEST_HEAD


def _tiles(query: Tensor, rows: int) -> tuple[int, int, int]:
    """Return rows, keys and head width of a tile."""
    width = max(_SMALLEST_TILE, _power_of_two(query.shape[-1]))
    side = 64 if query.element_size() < 4 and width <= 128 else 32
    return min(side, max(_SMALLEST_TILE, _power_of_two(rows))), side, width


def gather_all(tensors: Sequence[Tensor], index_BK: Tensor) -> list[Tensor]:
    """See ``duet.kernels.gather_all``."""
    return list(_Gather.apply(index_BK, *tensors))


class _Gather(torch.autograd.Function):
    """One launch for all tensors; a gradient goes back to the rows that it came from."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index, *(_shape_of(x) for x in tensors))
        outs = _launch_gather(tensors, index)
        ctx.mark_non_differentiable(*(out for out in outs if not out.is_floating_point()))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        index, *like = ctx.saved_tensors
        parts = zip(grads, like, ctx.needs_input_grad[1:], strict=True)
        return None, *(_scatter(grad, index, x.shape) if needed else None for grad, x, needed in parts)


def _scatter(grad: Tensor | None, index_BK: Tensor, shape: torch.Size) -> Tensor | None:
    if grad is None:
        return None
    index = index_BK if grad.dim() == 2 else index_BK.unsqueeze(-1).expand_as(grad)
    out = grad.new_zeros(len(grad), *shape[1:]).scatter_add(1, index, grad)
    return out.sum(0, keepdim=True) if shape[0] != len(grad) else out


def _launch_gather(tensors: Sequence[Tensor], index_BK: Tensor) -> list[Tensor]:
    batch, count = index_BK.shape
    index = index_BK.contiguous()
    outs = [x.new_empty(batch, count, *x.shape[2:]) for x in tensors]
    pairs = [(_bytes(x), _bytes(out)) for x, out in zip(tensors, outs, strict=True)]
    tables = [(_with_dense_rows(x.expand(batch, -1, -1)), out) for x, out in pairs if x.dim() == 3]
    columns = [(x.expand(batch, -1), out) for x, out in pairs if x.dim() == 2]
    widths = tuple(x.shape[-1] for x, _ in tables)
    widest = max(widths, default=1)
    block = min(1024, _power_of_two(widest))
    rows = max(1, min(64, 4096 // block))
    with _on(index.device):
        _source().gather_rows[(_cdiv(count, rows), _cdiv(widest, block), batch)](
            index,
            tuple(x for x, _ in tables),
            tuple(out for _, out in tables),
            tuple(n for x, _ in tables for n in x.stride()[:2]),
            tuple(x for x, _ in columns),
            tuple(out for _, out in columns),
            tuple(n for x, _ in columns for n in x.stride()),
            count,
            WIDTHS=widths,
            BLOCK_K=rows,
            BLOCK_W=block,
        )
    return outs


def cluster_means(x_BND: Tensor, members_BCW: Tensor) -> Tensor:
    """See ``duet.kernels.cluster_means``."""
    return _ClusterMeans.apply(x_BND, members_BCW)


class _ClusterMeans(torch.autograd.Function):
    """Means in one launch, and their gradients in another, without atomic additions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, members: Tensor) -> Tensor:
        x, members = _with_dense_rows(x), members.contiguous()
        ctx.save_for_backward(members, _shape_of(x))
        (batch, clusters, width), size = members.shape, x.shape[-1]
        out = x.new_empty(batch, clusters, size)
        block = min(256, _power_of_two(size))
        with _on(x.device):
            _source().cluster_means[(_cdiv(clusters, 4), _cdiv(size, block), batch)](
                x, members, out, *x.stride()[:2], clusters, size, W=width, BLOCK_C=4, BLOCK_D=block
            )
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        members, like = ctx.saved_tensors
        (batch, clusters, width), (_, rows, size) = members.shape, like.shape
        grad = grad_out.new_empty(batch, rows, size)
        grid = (_cdiv(rows, 32), _cdiv(size, 64), batch)
        with _on(grad.device):
            _source().cluster_means_backward[grid](
                grad_out.contiguous(), members, grad, rows, clusters, size, W=width, UPCAST=_upcast(grad),
                BLOCK_N=32, BLOCK_C=32, BLOCK_D=64,
            )  # fmt: skip
        return grad, None


def _source() -> Any:
    """Return the module of the kernels, which imports Triton."""
    from duet.kernels import source

    return source


def interpreted() -> bool:
    """Return whether Triton was imported with its interpreter, so that the kernels run on a CPU."""
    return type(_source().row_lse).__name__ == "InterpretedFunction"


def _upcast(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and interpreted()


def _shape_of(x: Tensor) -> Tensor:
    """Return one number in the shape of a tensor, to keep for a backward pass that asks for nothing else."""
    return x.new_empty(()).expand(x.shape)


def _on(device: torch.device) -> AbstractContextManager:
    """Make a tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _or(x: Tensor | None, unused: Tensor) -> Tensor:
    """Return the tensor, or one that takes its place as an argument and is never read."""
    return unused if x is None else x


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << math.ceil(math.log2(max(1, n)))
