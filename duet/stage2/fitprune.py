"""FitPrune (arXiv 2409.10197): a few tokens at every layer, those with least attention from picture and text.

Published, a token leaves between the attention and the MLP of a layer. An MLP looks at one token only, so leaving after
the layer, as here, gives the same tokens, at the cost of that MLP. How many leave where comes from a calibration
(``duet.calibrate``), which ``duet.methods.solve`` turns into a schedule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.calibrate import attention_masses
from duet.stage2 import LANGUAGE_REDUCERS, Stage

if TYPE_CHECKING:
    from duet.config import DuetConfig


@LANGUAGE_REDUCERS.register("fitprune", options={"calibration": ""})
@torch.no_grad()
def fitprune(stage: Stage, config: DuetConfig) -> Tensor:
    """Score a token by the product of what it receives from visual tokens and from the text after the image.

    Both are sums over rows of the largest attention among heads, in the layer that ran last. The option
    ``calibration`` names the file that ``duet.methods.solve`` makes the schedule from; a schedule that is given needs
    none. Shapes: returns [B, L]. Source: FitPrune Sec. 3 and its code.
    """
    own, cross = attention_masses(stage)
    return own * cross
