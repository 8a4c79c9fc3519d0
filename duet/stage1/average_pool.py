"""Average pooling on the patch grid: the simplest way to fewer tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from duet.grids import pooled_grid
from duet.stage1 import CONTEXTUAL, VISION_REDUCERS, TowerOutput, VisionReduction

if TYPE_CHECKING:
    from duet.config import DuetConfig


@VISION_REDUCERS.register("average_pool", options={"pool": ("mean", "max"), "keep_norm": False})
def average_pool(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Average the patches in each cell of a coarser grid.

    A cell covers rows ``floor(r R / rows)`` to ``ceil((r + 1) R / rows)``, as adaptive pooling does, so neighbours may
    share patches. Option ``pool="max"`` takes each feature's largest value; ``keep_norm`` scales every token to the
    mean norm of the image's patches, since averages are shorter than what they average.
    Shapes: features [B, M, D]; returns K = rows * columns tokens in raster order.
    """
    rows, columns = tower.grid
    shape = pooled_grid(config.entering, tower.grid)
    patches = tower.patches
    cells = patches.transpose(1, 2).unflatten(2, tower.grid)
    pool = functional.adaptive_avg_pool2d if config.option("pool") == "mean" else functional.adaptive_max_pool2d
    tokens = pool(cells, shape).flatten(2).transpose(1, 2)
    if config.option("keep_norm"):
        tokens = functional.normalize(tokens, dim=-1) * patches.norm(dim=-1).mean(1)[:, None, None]
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
