"""The most attended patches: FasterVLM (arXiv 2412.01818), and HiRED (arXiv 2408.10945) on one tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, keep_patches
from duet.stage1.local_cluster import class_attention
from duet.tokens import top_indices

if TYPE_CHECKING:
    from duet.config import DuetConfig


@VISION_REDUCERS.register("fastervlm")
@VISION_REDUCERS.register("hired")
def most_attended(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Keep the most attended patches; the class token itself is not handed on.

    The two methods differ in a mean or a sum over heads, which ranks alike, and in how HiRED shares a budget between
    the tiles of one image, which one tile does not need. A tower without a class token is ranked by column mass.
    """
    return keep_patches(tower, top_indices(class_attention(tower), config.entering))
