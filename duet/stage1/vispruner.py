"""VisPruner (arXiv 2412.01818v2): half of the tokens by importance, half by removing near-duplicates of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, class_attention, keep_patches
from duet.tokens import gather_tokens, rank_descending

if TYPE_CHECKING:
    from duet.config import DuetConfig

_STEP = 8  # tokens removed per round, as released


def _check(config: DuetConfig) -> None:
    share = config.option("important")
    if not 0 <= share <= 1:
        raise ValueError(f"vispruner's option important must lie between 0 and 1 (a share of the tokens), got {share}")


@VISION_REDUCERS.register("vispruner", options={"important": 0.5}, check=_check)
def vispruner(tower: TowerOutput, config: DuetConfig) -> VisionReduction:
    """Keep the patches with most class-token attention, then thin the others until the budget is met.

    Attention picks the share ``important`` of the tokens, rounded down. Each round splits the remaining list by parity
    of its order, finds for every even entry its most similar odd one, and removes the even entries with the highest
    similarity. Where the list has an odd length, its last entry takes part as an even one. Similarity is the cosine of
    tower features. A tower without a class token uses column mass.
    """
    important = int(config.entering * config.option("important"))
    return keep_patches(tower, important_and_diverse(tower, config.entering, important))


@torch.no_grad()
def important_and_diverse(tower: TowerOutput, count: int, important: int) -> Tensor:
    """Return ``count`` patches, of which the first are ``important`` ones. Shapes: [B, ``count``]."""
    order = rank_descending(class_attention(tower.signals))
    rest, wanted = order[:, important:], count - important
    unit = torch.nn.functional.normalize(tower.patches.float(), dim=-1)
    while rest.shape[1] > wanted:
        rest = _thin(rest, unit, min(_STEP, rest.shape[1] - wanted, (rest.shape[1] + 1) // 2))
    return torch.cat((order[:, :important], rest), 1)


def _thin(rest_BR: Tensor, unit_BND: Tensor, count: int) -> Tensor:
    """Remove ``count`` even entries of the list that resemble an odd one most. Shapes: [B, R] -> [B, R - count]."""
    even, odd = rest_BR[:, ::2], rest_BR[:, 1::2]
    if odd.shape[1] == 0:
        return even[:, count:]
    alike = (gather_tokens(unit_BND, even) @ gather_tokens(unit_BND, odd).transpose(1, 2)).max(-1).values
    survivors = rank_descending(alike)[:, count:]
    return torch.cat((even.gather(1, survivors), odd), 1)
