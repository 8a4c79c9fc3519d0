"""Several tiles per picture (LLaVA-1.6's anyres): how tile features become the tokens of one picture."""

from __future__ import annotations

import torch
from torch import Tensor


def unpad_image(tensor: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Cut off the border that `resize_and_pad_image` added.

    Args:
        tensor: [C, H, W].
        original_size: (width, height) of the picture before padding.

    Returns:
        [C, H', W'] with the original's aspect ratio.

    Source: LLaVA's rule, which truncates the new side instead of rounding it.
    """
    width, height = original_size
    rows, columns = tensor.shape[1:]
    if width / height > columns / rows:
        kept = int(height * (columns / width))
        border = (rows - kept) // 2
        return tensor[:, border : rows - border, :]
    kept = int(width * (rows / height))
    border = (columns - kept) // 2
    return tensor[:, :, border : columns - border]


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
    base, tiles = features[0], features[1:]
    across, down = grid
    if len(tiles) != across * down or base.shape[0] != side * side:
        raise ValueError(
            f"anyres: {len(tiles)} tiles of {base.shape[0]} tokens do not fill a grid of {across} x {down} tiles of "
            f"{side * side} tokens; with a reduced vision tower use mm_patch_merge_type='flat'"
        )
    plane = tiles.view(down, across, side, side, -1)
    if newline is None:
        return torch.cat([base, plane.permute(0, 2, 1, 3, 4).reshape(-1, base.shape[-1])])
    plane = unpad_image(plane.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3), size)
    ends = newline[:, None, None].expand(-1, plane.shape[1], 1).to(plane)
    return torch.cat([base, torch.cat([plane, ends], dim=-1).flatten(1, 2).T])


def merge_single(features: Tensor, newline: Tensor | None) -> Tensor:
    """Tokens [K, D] of a picture that has one tile: with a newline at the end when there is one."""
    if newline is None:
        return features[0]
    return torch.cat([features[0], newline[None].to(features)])
