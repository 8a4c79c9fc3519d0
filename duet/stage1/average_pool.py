"""Average pooling on the patch grid: the simplest way to fewer tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from duet.stage1 import CONTEXTUAL, VISION_REDUCERS, TowerOutput, VisionReduction

if TYPE_CHECKING:
    from duet.config import DuetConfig


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


@VISION_REDUCERS.register("average_pool")
def average_pool(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Average the patches in each cell of a coarser grid.

    A cell covers rows ``floor(r R / rows)`` to ``ceil((r + 1) R / rows)``, as adaptive pooling does, so neighbours may
    share patches. Shapes: features [B, M, D]; returns K = rows * columns tokens in raster order.
    """
    rows, columns = tower.grid
    shape = pooled_grid(config.entering, tower.grid)
    patches = tower.patches
    cells = patches.transpose(1, 2).unflatten(2, tower.grid)
    tokens = torch.nn.functional.adaptive_avg_pool2d(cells, shape).flatten(2).transpose(1, 2)
    down, across = _spans(rows, shape[0]), _spans(columns, shape[1])
    groups = [[r * columns + c for r in range(*span) for c in range(*other)] for span in down for other in across]
    width = max(map(len, groups))
    members = torch.tensor([group + [-1] * (width - len(group)) for group in groups], device=patches.device)
    source = torch.tensor([group[len(group) // 2] for group in groups], device=patches.device)
    batch = len(patches)
    kind = torch.full((len(groups),), CONTEXTUAL, device=patches.device)
    return VisionReduction(tokens, source.expand(batch, -1), kind, members.expand(batch, -1, -1))


def _spans(size: int, cells: int) -> list[tuple[int, int]]:
    return [(size * i // cells, -(-size * (i + 1) // cells)) for i in range(cells)]
