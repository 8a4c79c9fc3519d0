"""``transformers.Qwen2_5_VLForConditionalGeneration``, the model of the paper's Tables 2 and 15.

Most blocks of its tower attend to windows; the last block that sees a whole frame ranks.
Shapes: P patches, U merge units, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from duet.families import FAMILIES
from duet.families.qwen_common import QwenFamily
from duet.families.qwen_tower import PackedFeatures, run_blocks


class Qwen25VLFamily(QwenFamily):
    """``model_type`` "qwen2_5_vl"."""

    host = Qwen2_5_VLForConditionalGeneration
    position_inputs = (*QwenFamily.position_inputs, "second_per_grid_ts")

    def check(self, model: nn.Module) -> None:
        """Require a tower block that sees whole frames."""
        super().check(model)
        config: Any = model.config
        if not any(0 <= index < config.vision_config.depth for index in config.vision_config.fullatt_block_indexes):
            raise ValueError("vision_config.fullatt_block_indexes names no block, so no attention over a frame ranks")

    def run_tower(self, tower: Any, pixels: Tensor, grid: Tensor) -> PackedFeatures:
        """Run the vision tower and its merger. Shapes: pixels [P, ..], grid [pictures, 3] in patches."""
        frames = get_vision_attention_seqlens(grid, tower.config)
        order, bounds = get_vision_window_index(
            grid, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size,
            patch_size=tower.patch_size,
        )  # fmt: skip
        windows = (bounds, None if frames[1] is None else int((bounds[1:] - bounds[:-1]).max()))
        back = torch.argsort(order)
        unit = tower.spatial_merge_unit

        hidden = tower.patch_embed(pixels)
        rotary = tower.rotary_pos_emb(hidden, get_vision_position_ids(grid, tower.spatial_merge_size))
        full = [index for index in range(len(tower.blocks)) if index in tower.fullatt_block_indexes]
        spans = [frames if index in full else windows for index in range(len(tower.blocks))]
        permuted = (_permute(rotary[0], order, unit), _permute(rotary[1], order, unit))
        run = run_blocks(tower.blocks, _permute(hidden, order, unit), permuted, spans, full[-1])
        return PackedFeatures(
            [tower.merger(run.last)[back]],
            _permute(run.ranked_input, back, unit),
            tower.blocks[full[-1]],
            rotary,
            pixels,
        )


def _permute(x_PD: Tensor, order_U: Tensor, unit: int) -> Tensor:
    """Return the patches in another order of their units. Shapes: [P, D], [U] -> [P, D]."""
    return x_PD.unflatten(0, (-1, unit))[order_U].flatten(0, 1)


FAMILIES.register("qwen2_5_vl")(Qwen25VLFamily())
