"""Random visual tokens inside the decoder: what a ranking has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.chance import uniform
from duet.stage2 import LANGUAGE_REDUCERS, Stage

if TYPE_CHECKING:
    from duet.config import DuetConfig


@LANGUAGE_REDUCERS.register("random")
def random(stage: Stage, config: DuetConfig) -> Tensor:
    """Score the visual tokens of every sample at random, by ``config.seed``, the layer and each token's number.

    The number counts a sample's visual tokens from its first one, so padding and the rest of the batch do not matter;
    samples with equally many visual tokens keep the same places. Shapes: returns [B, L].
    """
    visual = stage.state.visual
    ordinal = (visual.cumsum(1) - 1).clamp(min=0)
    draw = uniform(ordinal.new_tensor([stage.layer]), visual.shape[1], config.seed)
    return draw.expand(len(visual), -1).gather(1, ordinal).to(torch.float32)
