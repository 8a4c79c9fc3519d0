"""Image down-sampling: a smaller picture, hence fewer patches. The only baseline that also saves the tower's work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.grids import pooled_grid
from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction

if TYPE_CHECKING:
    from duet.config import DuetConfig


class Downsample:
    """Resize the picture to as many patches as tokens are wanted; the tower's positions are interpolated.

    Source: the baseline of VTC-Bench (arXiv 2510.07143), at the picture's own aspect ratio as far as the number allows.
    """

    def resize(self, pixel_values: Tensor, config: DuetConfig, patch: int) -> Tensor:
        """Return smaller pictures. Shapes: [B, 3, H, W] -> [B, 3, rows * patch, columns * patch]."""
        grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        size = [side * patch for side in pooled_grid(config.entering, grid)]
        return torch.nn.functional.interpolate(
            pixel_values.float(), size=size, mode="bicubic", antialias=True, align_corners=False
        ).to(pixel_values.dtype)

    def __call__(self, tower: TowerOutput, config: DuetConfig) -> VisionReduction:
        """Hand on every patch of the smaller picture."""
        return VisionReduction.identity(tower.patches, False, tower.grid)


VISION_REDUCERS.register("downsample")(Downsample())
