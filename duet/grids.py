"""Grids of patches with a wanted number of cells."""

from __future__ import annotations

import math


def pooled_grid(tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns whose product is ``tokens``, as near to the grid's shape as possible, flat before tall.

    Raises:
        ValueError: no such grid; names the nearest numbers that have one.
    """

    def shapes(count: int) -> list[tuple[int, int]]:
        return [(r, count // r) for r in range(1, grid[0] + 1) if count % r == 0 and count // r <= grid[1]]

    found = shapes(tokens)
    if not found:
        near = sorted((n for n in range(1, math.prod(grid) + 1) if shapes(n)), key=lambda n: abs(n - tokens))[:4]
        raise ValueError(
            f"no grid within {grid[0]} x {grid[1]} patches has {tokens} cells; near numbers that can be made: "
            f"{', '.join(map(str, sorted(near)))}"
        )
    skew = [max(r * grid[1], c * grid[0]) / min(r * grid[1], c * grid[0]) for r, c in found]
    return found[skew.index(min(skew))]
