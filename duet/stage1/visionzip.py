"""VisionZip (arXiv 2412.04467): class-token attention keeps, every other patch merges by key similarity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from duet.anchors import MERGES, merge_into_anchors
from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, class_attention
from duet.tokens import rank_descending

if TYPE_CHECKING:
    from duet.config import DuetConfig


@VISION_REDUCERS.register("visionzip", options={"merge": MERGES})
def visionzip(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Keep the class token and ``k1 - 1`` patches; spread ``k2`` anchors over the residual in raster order.

    Every other residual patch joins the anchor with the most similar key; a token is its anchor plus the mean of those,
    as released, or with ``merge="mean"`` the mean of all.
    Shapes: features [B, M, D]; returns K = k1 + k2 tokens. Source: VisionZip Sec. 3.2, its released code.
    """
    order = rank_descending(class_attention(tower.signals))
    kept = int(config.dominant) - int(tower.class_token)
    dominant = order[:, :kept]
    residual = order[:, kept:].sort(dim=1).values
    return merge_into_anchors(tower, dominant, residual, int(config.contextual), config.option("merge"))
