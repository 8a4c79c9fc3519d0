"""HiRED (arXiv 2408.10945): a budget for the tiles of one picture, spent on the patches that attract attention.

Shapes: B tower passes, P pictures with the same tiles, T tiles of each, N patches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, class_attention, keep_marked, keep_patches
from duet.tokens import rank_descending, top_indices

if TYPE_CHECKING:
    from duet.config import DuetConfig


class HiRED:
    """Keep the patches with most class-token attention, where tiles with more content keep more.

    A picture of one pass keeps ``K = config.entering`` patches. One with tiles keeps ``K`` times its passes: a share
    ``alpha`` on the pass of the whole picture, the rest on its tiles, in proportion to how many of the most
    attended places of the whole picture, by the first block's class token, each tile covers. The sum is exact: what
    rounding leaves over goes to the largest remainders. ``variant="release"`` rounds down only, and reads the places of
    the whole picture band by band in place of tile by tile, as the released code does.
    A tower without a class token is ranked by column mass. Source: HiRED Sec. 4; METHODS 2.2 for the release.
    """

    shares_tiles = True

    def __call__(self, tower: TowerOutput, config: DuetConfig) -> VisionReduction:
        """Return what each pass keeps, in raster order; with ``counts`` where pictures have tiles."""
        score = class_attention(tower.signals)
        if tower.tiles is None or not any(map(math.prod, tower.tiles)):
            return keep_patches(tower, top_indices(score, config.entering))
        budget = _budgets(tower, config)
        places = torch.arange(score.shape[1], device=score.device).expand_as(score)
        rank = torch.empty_like(places).scatter_(1, rank_descending(score), places)
        return keep_marked(tower, rank < budget.unsqueeze(1))


def _budgets(tower: TowerOutput, config: DuetConfig) -> Tensor:
    """Return how many patches each pass keeps, [B]."""
    assert tower.tiles is not None
    content = class_attention(tower.first_signals())
    starts: dict[tuple[int, int], list[int]] = {}
    passes = 0
    for shape in tower.tiles:
        starts.setdefault(shape, []).append(passes)
        passes += 1 + math.prod(shape)
    budget = torch.empty(passes, dtype=torch.long, device=content.device)
    for shape, first in starts.items():
        whole = torch.tensor(first, device=content.device)
        parts = share(content[whole], tower.grid, shape, config)
        budget[whole.unsqueeze(1) + torch.arange(parts.shape[1], device=whole.device)] = parts
    return budget


def share(content_PN: Tensor, grid: tuple[int, int], tiles: tuple[int, int], config: DuetConfig) -> Tensor:
    """Return how many patches the whole picture and each of its tiles keep. Shapes: [P, N] -> [P, 1 + T].

    Args:
        content_PN: how much each place of the whole picture attracts attention.
        grid: rows and columns of patches of one pass.
        tiles: rows and columns of tiles.
        config: ``entering`` tokens per pass, option ``alpha``, ``variant``.
    """
    patches, count, alpha = content_PN.shape[1], math.prod(tiles), config.option("alpha")
    total = config.entering * (1 + count)
    whole = max(min(int(alpha * total), patches), total - count * patches)
    rest = total - whole
    marked = top_indices(content_PN, int(patches * (1 - alpha)) if count else 0)
    release = config.variant == "release"
    owner = _bands(patches, count) if release else _footprints(grid, tiles)
    covered = torch.nn.functional.one_hot(owner.to(marked.device)[marked], max(1, count)).sum(1)[:, :count]
    parts = _round_down(covered, rest, patches) if release else _apportion(covered, rest, patches)
    return torch.cat((parts.new_full((len(parts), 1), whole), parts), 1)


def _footprints(grid: tuple[int, int], tiles: tuple[int, int]) -> Tensor:
    """Return the tile that covers each place of the whole picture, [N]."""
    rows, columns = (torch.arange(side) * number // side for side, number in zip(grid, tiles, strict=True))
    return (rows.unsqueeze(1) * tiles[1] + columns).flatten()


def _bands(patches: int, count: int) -> Tensor:
    """Return the released code's owner of each place: equal runs of the raster. Shapes: [N]."""
    return torch.arange(patches) * count // patches


def _round_down(weights_PT: Tensor, rest: int, limit: int) -> Tensor:
    return (rest * weights_PT // weights_PT.sum(1, keepdim=True).clamp(min=1)).clamp(max=limit)


def _apportion(weights_PT: Tensor, rest: int, limit: int) -> Tensor:
    """Deal out ``rest`` places in proportion to weights, at most ``limit`` each; the sum is exact.

    Every tile gets its whole shares; then the largest remainders get one more, the lower tile first, and where some
    tiles are full, the others go on in the same order. Shapes: [P, T] -> [P, T].
    """
    sums = weights_PT.sum(1, keepdim=True).clamp(min=1)
    seats = torch.arange(limit, device=weights_PT.device)
    claim = (rest * weights_PT).unsqueeze(-1) - seats * sums.unsqueeze(-1)
    chosen = claim.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :rest]
    return torch.nn.functional.one_hot(chosen // limit, max(1, weights_PT.shape[1])).sum(1)[:, : weights_PT.shape[1]]


def _check(config: DuetConfig) -> None:
    alpha = config.option("alpha")
    if not 0 < alpha < 1:
        raise ValueError(f"hired's option alpha must lie between 0 and 1 (the whole picture's share), got {alpha}")


VISION_REDUCERS.register("hired", options={"alpha": 0.5}, check=_check)(HiRED())
