"""``transformers.Qwen3VLForConditionalGeneration``: features of earlier tower blocks join the first decoder layers.

DeepStack features are reduced as the tokens are and added where the tokens that are left stand.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from duet.families import FAMILIES
from duet.families.qwen_common import QwenFamily
from duet.families.qwen_tower import PackedFeatures, run_blocks


class Qwen3VLFamily(QwenFamily):
    """``model_type`` "qwen3_vl"."""

    host = Qwen3VLForConditionalGeneration

    def run_tower(self, tower: Any, pixels: Tensor, grid: Tensor) -> PackedFeatures:
        """Run the vision tower and its mergers. Shapes: pixels [P, ..], grid [pictures, 3] in patches."""
        hidden = tower.patch_embed(pixels)
        nearest, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.config.spatial_merge_size,
        )
        learned = (tower.pos_embed(nearest) * weights[:, :, None]).sum(1)
        hidden = hidden + learned.to(hidden.dtype)
        rotary = tower.rotary_pos_emb(hidden, get_vision_position_ids(grid, tower.spatial_merge_size))
        frames = get_vision_attention_seqlens(grid, tower.config)
        ranked, taps = len(tower.blocks) - 1, list(tower.deepstack_visual_indexes)
        run = run_blocks(tower.blocks, hidden, rotary, [frames] * len(tower.blocks), ranked, taps)
        mergers = [tower.deepstack_merger_list[taps.index(index)] for index in sorted(taps)]
        deep = [merger(state) for merger, state in zip(mergers, run.tapped, strict=True)]
        return PackedFeatures([tower.merger(run.last), *deep], run.ranked_input, tower.blocks[ranked], rotary, pixels)


FAMILIES.register("qwen3_vl")(Qwen3VLFamily())
