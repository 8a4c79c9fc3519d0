"""Several tiles per picture (LLaVA-1.6's anyres): how tile features become the tokens of one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet import DuetConfig
from duet.families.anyres import Layout
from duet.families.passes import plan
from duet.stage1 import VISION_REDUCERS, runs_tower_itself
from llava.mm_utils import get_anyres_image_grid_shape, read_pinpoints

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


def shown_ranges(plane: tuple[int, int], original_size: tuple[int, int], rounded: bool = False) -> tuple[range, range]:
    """Say which rows and columns of a plane are no border that `resize_and_pad_image` added.

    Args:
        plane: (rows, columns) of the joined tiles.
        original_size: (width, height) of the picture before padding.
        rounded: round the new side to 7 digits before it is cut to a whole number, as transformers does; LLaVA does
            not. About 2 of 100,000 picture sizes differ, by two rows or columns.
    """
    (width, height), (rows, columns) = original_size, plane

    def inside(side: float, whole: int) -> range:
        border = (whole - int(round(side, 7) if rounded else side)) // 2
        return range(border, whole - border)

    if width / height > columns / rows:
        return inside(height * (columns / width), rows), range(columns)
    return range(rows), inside(width * (rows / height), columns)


def unpad_image(tensor: Tensor, original_size: tuple[int, int], rounded: bool = False) -> Tensor:
    """Cut off the border that `resize_and_pad_image` added.

    Args:
        tensor: [C, H, W].
        original_size: (width, height) of the picture before padding.
        rounded: See `shown_ranges`.

    Returns:
        [C, H', W'] with the original's aspect ratio; nothing where the picture is so long and thin that it fills less
        than one row or column.

    Source: LLaVA's rule, which truncates the new side instead of rounding it.
    """
    rows, columns = shown_ranges((tensor.shape[1], tensor.shape[2]), original_size, rounded)
    return tensor[:, rows.start : rows.stop, columns.start : columns.stop]


@dataclass(frozen=True)
class Tiling:
    """How a model lays out the tiles of its pictures.

    Attributes:
        image_size: pixels along one side of a tile.
        side: patches along one side of a tile.
        pinpoints: candidate (width, height) of the joined tiles, as the config holds them.
        unpad: cut the border off and end rows with a newline (`spatial_unpad`).
        rounded: see `shown_ranges`.
    """

    image_size: int
    side: int
    pinpoints: Any
    unpad: bool
    rounded: bool

    @classmethod
    def of(cls, config: Any, tower_config: Any) -> Tiling:
        """Read a model's config and that of its tower."""
        merge = getattr(config, "mm_patch_merge_type", None) or "flat"
        if merge not in MERGE_TYPES:
            raise ValueError(f"unknown mm_patch_merge_type {merge!r}; use 'flat', 'spatial' or 'spatial_unpad'")
        pinpoints = getattr(config, "image_grid_pinpoints", None)
        image_size = tower_config.image_size
        rounded = bool(getattr(config, "mm_unpad_rounded", False))
        return cls(image_size, image_size // tower_config.patch_size, pinpoints, "unpad" in merge, rounded)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(tiles across, tiles down) of a picture of (width, height)."""
        return get_anyres_image_grid_shape(size, self.pinpoints, self.image_size)

    def layout(self, size: tuple[int, int], passes: int | None = None) -> Layout:
        """Which patches of a picture's passes are no border.

        Args:
            size: (width, height) of the picture.
            passes: How many tower passes were given; 1 is a picture without tiles. None: as many as the size asks for.

        Raises:
            ValueError: The size asks for another number of tiles than there are.
        """
        if passes == 1:
            return Layout.single(self.side, self.unpad)
        across, down = self.grid(size)
        if passes is not None and passes != 1 + across * down:
            raise ValueError(
                f"a picture of {size[0]} x {size[1]} pixels has {across} x {down} tiles by image_grid_pinpoints "
                f"{self.pinpoints}, so {1 + across * down} tower passes, but {passes} were given: pass image_sizes as "
                "(width, height), in the pictures' order, and process pictures with the same pinpoints"
            )
        rows, columns = self._shown(size, (across, down))
        shown = (len(rows), len(columns))
        if not shown[0] * shown[1]:  # newlines may be all that the model makes of such a picture
            rows = columns = range(0)
        return Layout(self.side, (down, across), rows, columns, shown, self.unpad)

    def stacked(self, passes: int) -> Layout:
        """The layout of tiles that are kept one after the other (`flat`), wherever they lie in the picture."""
        if passes == 1:
            return Layout.single(self.side, newlines=False)
        rows, columns = range((passes - 1) * self.side), range(self.side)
        return Layout(self.side, (passes - 1, 1), rows, columns, (len(rows), len(columns)), newlines=False)

    def merge(self, features: Tensor, size: tuple[int, int], newline: Tensor | None) -> Tensor:
        """Lay the passes [P, N, D] of a picture of (width, height) out as its tokens [K, D]; see `merge_tiles`."""
        if len(features) == 1:
            return merge_single(features, newline)
        grid = self.grid(size)
        return _merge(features, grid, self.side, *self._shown(size, grid), newline)

    def _shown(self, size: tuple[int, int], grid: tuple[int, int]) -> tuple[range, range]:
        plane = (grid[1] * self.side, grid[0] * self.side)
        return shown_ranges(plane, size, self.rounded) if self.unpad else (range(plane[0]), range(plane[1]))


def count_tokens(layout: Layout, reduction: DuetConfig | None, class_token: bool = True) -> int:
    """Visual tokens that a picture hands to the language model; the most that it can where its content decides.

    Args:
        layout: Of the picture.
        reduction: The reduction in force.
        class_token: Whether the tower has a class token.

    Raises:
        ValueError: A budget per picture that its tiles cannot share.
    """
    shown = [len(view.units) for view in layout.views()]
    plans = [None] * len(shown) if reduction is None else plan(reduction, shown, class_token)
    budgets = [wanted.entering_tokens(count) for wanted, count in zip(plans, shown, strict=True) if wanted is not None]
    if reduction is None or not budgets:
        return layout.placeholders
    if runs_tower_itself(reduction.stage1):
        return budgets[0] * layout.passes
    if getattr(VISION_REDUCERS.get(reduction.stage1), "shares_tiles", False):
        return min(sum(shown), budgets[0] * layout.passes)
    return sum(budgets) + sum(count for wanted, count in zip(plans, shown, strict=True) if wanted is None)


@dataclass(frozen=True)
class TokenCounter:
    """How many visual tokens pictures of a size hand to the language model, known before any is read.

    Attributes:
        tiling: How the model lays out tiles.
        reduction: The reduction in force.
    """

    tiling: Tiling
    reduction: DuetConfig | None

    def __call__(self, size: tuple[int, int]) -> int:
        """Count for a picture of (width, height); see `count_tokens`."""
        return count_tokens(self.tiling.layout(size), self.reduction)

    def most(self) -> int:
        """Count for the picture that has most."""
        return max(map(self, read_pinpoints(self.tiling.pinpoints, self.tiling.image_size)))


def merge_tiles(
    features: Tensor, grid: tuple[int, int], side: int, size: tuple[int, int], newline: Tensor | None
) -> Tensor:
    """Lay the tiles of one picture out as a plane, and put the tokens of the whole picture in front.

    Args:
        features: [1 + tiles, side * side, D]; the first entry is the whole picture.
        grid: (tiles across, tiles down).
        side: patches along one side of a tile.
        size: (width, height) of the picture, for cutting off the border.
        newline: [D] appended to every row of the plane after unpadding (`spatial_unpad`), or None (`spatial`).

    Returns:
        [side * side + rows * columns, D], where columns counts the newline.

    Raises:
        ValueError: The tiles do not fill the grid, or a tile has not side * side tokens.
    """
    plane = (grid[1] * side, grid[0] * side)
    rows, columns = (range(plane[0]), range(plane[1])) if newline is None else shown_ranges(plane, size)
    return _merge(features, grid, side, rows, columns, newline)


def _merge(
    features: Tensor, grid: tuple[int, int], side: int, rows: range, columns: range, newline: Tensor | None
) -> Tensor:
    """`merge_tiles` for the part of the plane that is no border."""
    base, tiles = features[0], features[1:]
    across, down = grid
    if len(tiles) != across * down or base.shape[0] != side * side:
        raise ValueError(
            f"anyres: {len(tiles)} tiles of {base.shape[0]} tokens do not fill a grid of {across} x {down} tiles of "
            f"{side * side} tokens; mm_vision_select_feature must be 'patch', or use mm_patch_merge_type='flat'"
        )
    plane = tiles.view(down, across, side, side, -1).permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)
    plane = plane[rows.start : rows.stop, columns.start : columns.stop]
    if newline is not None:
        plane = torch.cat([plane, newline.to(plane).expand(len(plane), 1, -1)], dim=1)
    return torch.cat([base, plane.flatten(0, 1)])


def merge_single(features: Tensor, newline: Tensor | None) -> Tensor:
    """Tokens [K, D] of a picture that has one tile: with a newline at the end when there is one."""
    if newline is None:
        return features[0]
    return torch.cat([features[0], newline[None].to(features)])
