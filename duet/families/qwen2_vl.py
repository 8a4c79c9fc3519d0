"""``transformers.Qwen2VLForConditionalGeneration``: every tower block attends to a whole frame; the last one ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration
from transformers.vision_utils import get_vision_attention_seqlens, get_vision_position_ids

from duet.families import FAMILIES
from duet.families.qwen_common import QwenFamily
from duet.families.qwen_tower import PackedFeatures, run_blocks


class Qwen2VLFamily(QwenFamily):
    """``model_type`` "qwen2_vl"."""

    host = Qwen2VLForConditionalGeneration

    def run_tower(self, tower: Any, pixels: Tensor, grid: Tensor) -> PackedFeatures:
        """Run the vision tower and its merger. Shapes: pixels [P, ..], grid [pictures, 3] in patches."""
        hidden = tower.patch_embed(pixels)
        rotary = tower.rotary_pos_emb(hidden, get_vision_position_ids(grid, tower.spatial_merge_size))
        frames = get_vision_attention_seqlens(grid, tower.config)
        ranked = len(tower.blocks) - 1
        run = run_blocks(tower.blocks, hidden, rotary, [frames] * len(tower.blocks), ranked)
        return PackedFeatures([tower.merger(run.last)], run.ranked_input, tower.blocks[ranked], rotary, pixels)


FAMILIES.register("qwen2_vl")(Qwen2VLFamily())
