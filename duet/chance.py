"""Random numbers that depend on what they are for, never on batch size, order or device."""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0x2127599BF4325C37, 0x165667919E3779F9)  # odd constants; products wrap around in int64


def scatter_bits(numbers: Tensor) -> Tensor:
    """Return int64 numbers whose bits look random, the same for the same input. Shapes: any."""
    mixed = numbers.long()
    for multiplier in _MULTIPLIERS:
        mixed = (mixed ^ (mixed >> 29)) * multiplier
    return mixed ^ (mixed >> 32)


def uniform(identity_B: Tensor, count: int, seed: int) -> Tensor:
    """Return one number in [0, 1) for each of ``count`` items of every sample.

    Args:
        identity_B: [B] int64, what stands for a sample.
        count: items per sample.
        seed: of the experiment.

    Shapes: returns [B, count] in fp64.
    """
    items = torch.arange(count, device=identity_B.device)
    start = scatter_bits(identity_B + scatter_bits(torch.tensor(seed + 1, device=identity_B.device)))
    bits = scatter_bits(start.unsqueeze(1) + scatter_bits(items + 1))
    return (bits & ((1 << 52) - 1)).double() / (1 << 52)
