"""FasterVLM (arXiv 2412.01818): the most attended patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, class_attention, keep_patches
from duet.tokens import top_indices

if TYPE_CHECKING:
    from duet.config import DuetConfig


@VISION_REDUCERS.register("fastervlm")
def fastervlm(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Keep the patches with most class-token attention; the class token itself is not handed on.

    A tower without a class token is ranked by column mass. Shapes: features [B, M, D]; returns K tokens.
    Source: FasterVLM Sec. 3.
    """
    return keep_patches(tower, top_indices(class_attention(tower.signals), config.entering))
