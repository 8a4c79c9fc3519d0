"""What ranking and merging spend their time in: Triton kernels for CUDA and ROCm, PyTorch everywhere else.

Every function here has two implementations, in ``reference`` (PyTorch) and in ``launch`` and ``source`` (Triton), and
decides anew for each call by the tensors that it gets. ``DUET_KERNELS=off`` in the environment turns the kernels off.

Shapes: B batch, H query heads, K key heads, R rows, M tokens of a tower, L sequence, N tokens, d head width, D width,
C clusters, W members of a cluster, S segments.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from duet.kernels import launch, reference

logger = logging.getLogger(__name__)

SWITCH = "DUET_KERNELS"
_WORDS = {"on": True, "1": True, "": True, "off": False, "0": False}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_TRITON = (3, 3)  # tuples as arguments
_OLDEST_NVIDIA = (8, 0)  # compute capability that Triton supports


@torch.no_grad()
def column_mass(
    query_BHRd: Tensor, key_BHMd: Tensor, scale: float, bounds: Tensor | None = None, valid_BM: Tensor | None = None
) -> Tensor:
    """Return the attention that each key receives, averaged over heads and queries, without an attention map.

    Args:
        query_BHRd, key_BHMd: queries and keys of one layer.
        scale: what scores are multiplied with, usually ``d ** -0.5``.
        bounds: [S + 1] where segments start, and the end (``cu_seqlens``): a query sees its own segment only, and the
            mean is over the queries of that segment. Needs R = M.
        valid_BM: [B, M] bool, what is no padding; padding neither asks nor answers. Needs R = M.

    Shapes: returns [B, M] in fp32. Source: METHODS 0.3 (row sums first, then columns), DUET-VLM Algorithm 1 line 2.
    """
    if (bounds is not None or valid_BM is not None) and query_BHRd.shape[2] != key_BHMd.shape[2]:
        raise ValueError(
            f"bounds and valid need as many queries as keys, got {query_BHRd.shape[2]} queries and "
            f"{key_BHMd.shape[2]} keys; hand over the queries of all tokens"
        )
    how = launch if usable(query_BHRd, key_BHMd) and launch.fits(key_BHMd.shape[-1]) else reference
    return how.column_mass(query_BHRd, key_BHMd, scale, bounds, valid_BM)


@torch.no_grad()
def received(
    query_BHRd: Tensor,
    key_BKLd: Tensor,
    stop_BR: Tensor,
    counted_BR: Tensor,
    scale: float,
    valid_BL: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the attention that each position receives from a few rows, averaged over heads and rows.

    Args:
        query_BHRd: queries of the rows, rotated where the model rotates.
        key_BKLd: keys of all positions; each key head serves H / K query heads in a row.
        stop_BR: a row sees the positions before this one.
        counted_BR: [B, R] bool, the rows that are real.
        scale: what scores are multiplied with.
        valid_BL: [B, L] bool, or None when nothing is padding.
        rotary: (cos, sin), each [B or 1, L, r], to rotate the keys with; None where they are rotated already.

    Shapes: returns [B, L] in fp32. Source: DUET-VLM Sec. 3.2; METHODS 0.3.
    """
    how = launch if usable(query_BHRd, key_BKLd) and launch.fits(key_BKLd.shape[-1]) else reference
    return how.received(query_BHRd, key_BKLd, stop_BR, counted_BR, scale, valid_BL, rotary)


def gather_all(tensors: Sequence[Tensor], index_BK: Tensor) -> list[Tensor]:
    """Return ``x[b, index[b, k]]`` of several tensors, in one launch on a GPU; gradients flow through.

    Shapes: each [B or 1, N] or [B or 1, N, D], of any type; index [B, K]; returns [B, K] or [B, K, D] each.
    """
    how = launch if _runs_on(index_BK.device) else reference
    return how.gather_all(tensors, index_BK)


def cluster_means(x_BND: Tensor, members_BCW: Tensor) -> Tensor:
    """Return the mean of each cluster's members; gradients flow through, and clusters may overlap.

    Shapes: tokens [B, N, D], members [B, C, W] of tokens; returns [B, C, D] in the tokens' type.
    Source: DUET-VLM Eq. (2).
    """
    how = launch if usable(x_BND) and members_BCW.numel() else reference
    return how.cluster_means(x_BND, members_BCW)


def usable(*tensors: Tensor) -> bool:
    """Return whether kernels run on these tensors: all on a GPU that has a working Triton, of types that it multiplies.

    Where a GPU cannot, the reason is logged once.
    """
    return all(x.dtype in _FLOATS for x in tensors) and _runs_on(tensors[0].device)


def _runs_on(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling() or not _switched_on():
        return False
    return not obstacle(device.index or 0)


def _switched_on() -> bool:
    word = os.environ.get(SWITCH, "").lower()
    if word not in _WORDS:
        raise ValueError(
            f"{SWITCH}={word!r} in the environment is neither 'on' nor 'off'; set one of them, or unset it"
        )
    return _WORDS[word]


@functools.cache
def obstacle(index: int) -> str:
    """Return why kernels do not run on a GPU, "" where they do; the first call for each GPU logs the reason."""
    reason = _find_obstacle(index)
    if reason:
        logger.warning("no Triton kernels on cuda:%d, PyTorch ranks instead (same results, slower): %s", index, reason)
    return reason


def _find_obstacle(index: int) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton  # type: ignore[import-not-found]

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, _OLDEST_TRITON))}"
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < _OLDEST_NVIDIA:
        return f"compute capability {capability[0]}.{capability[1]} is below {_OLDEST_NVIDIA[0]}.{_OLDEST_NVIDIA[1]}"
    try:
        x = torch.ones(1, 16, 16, device=f"cuda:{index}")
        launch.column_mass(x[None], x[None], 1.0)
        launch.cluster_means(x, torch.zeros(1, 1, 1, dtype=torch.long, device=x.device))
    except Exception as error:  # a compiler, a driver and a device are tried here; whatever fails, PyTorch works
        return f"a first kernel failed with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""
