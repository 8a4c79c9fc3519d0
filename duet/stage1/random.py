"""Random patches: what a method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duet.chance import uniform
from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, keep_patches
from duet.tokens import top_indices

if TYPE_CHECKING:
    from duet.config import DuetConfig


@VISION_REDUCERS.register("random")
def random(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Keep patches drawn without replacement, by ``config.seed`` and the image's own pixels."""
    draw = uniform(tower.image_numbers(), tower.patches.shape[1], config.seed)
    return keep_patches(tower, top_indices(draw, config.entering))
