"""ToMe (arXiv 2210.09461): tokens merge a little in every block of the tower, between attention and MLP."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duet.signals import TowerSignals
from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, keep_clusters
from duet.tokens import gather_tokens, rank_descending

if TYPE_CHECKING:
    from duet.config import DuetConfig


def merges_per_block(patches: int, tokens: int, blocks: int) -> list[int]:
    """Return how many tokens each block merges away, as evenly as possible, earlier blocks first.

    Raises:
        ValueError: some block would have to merge more than half of its tokens.
    """
    base, extra = divmod(patches - tokens, blocks)
    merges, left = [base + (index < extra) for index in range(blocks)], patches
    for number, count in enumerate(merges, start=1):
        if count > left // 2:
            raise ValueError(
                f"tome cannot merge {count} of {left} tokens in block {number} of {blocks}: at most half; ask for more "
                "tokens, or use tome_post"
            )
        left -= count
    return merges


class ToMe:
    """Merge in every block; attention weighs a token by how many patches it stands for.

    In each block tokens are split by parity of their order, every even one finds its most similar odd one (cosine of
    the block's keys, averaged over heads), and the best pairs become size-weighted means. The class token, which has
    number 0, never merges and is not handed on. Output is ordered by each token's first patch.

    Option ``proportional=False`` leaves attention as it is, so that any kernel serves; ``weighted=False`` forgets sizes
    from block to block, as some ports do. Source: ToMe Sec. 3, Eq. (1).
    """

    def __call__(self, tower: TowerOutput, config: DuetConfig) -> VisionReduction:
        """Never used: the work is done in ``encode``."""
        raise NotImplementedError("ToMe acts inside the tower")

    def patches_per_block(self, patches: int, blocks: int, config: DuetConfig) -> list[int]:
        """Return how many patches each block's attention sees, for counting FLOPs."""
        merges = merges_per_block(patches, config.entering, blocks)
        return [patches - sum(merges[:block]) for block in range(blocks)]

    def encode(
        self, blocks: list[Any], hidden: Tensor, class_token: bool, grid: tuple[int, int], config: DuetConfig
    ) -> VisionReduction:
        """Run the blocks. Shapes: hidden [B, M, D]; returns K tokens.

        Raises:
            ValueError: the tower's attention kernel takes no bias, or too few blocks for so many merges.
        """
        patches = math.prod(grid)
        kernel = getattr(blocks[0].self_attn.config, "_attn_implementation", "sdpa")
        proportional = config.option("proportional")
        if proportional and kernel not in ("sdpa", "eager"):
            raise ValueError(
                f"tome weighs attention by token size, which {kernel!r} cannot do; use sdpa in the tower, or the "
                "option proportional=False"
            )
        owner = torch.arange(patches, device=hidden.device).expand(len(hidden), -1)
        sizes = torch.ones(owner.shape, device=hidden.device)
        for block, count in zip(blocks, merges_per_block(patches, config.entering, len(blocks)), strict=True):
            normed = block.layer_norm1(hidden)
            metric = TowerSignals(normed.detach(), block.self_attn, class_token).key_metric()[:, int(class_token) :]
            bias = torch.nn.functional.pad(sizes.log(), (int(class_token), 0)).to(hidden.dtype)[:, None, None, :]
            hidden = hidden + block.self_attn(normed, attention_mask=bias if proportional else None)[0]
            special, tokens = hidden[:, : int(class_token)], hidden[:, int(class_token) :]
            tokens, sizes, owner = _merge(tokens, sizes, owner, metric, count, int(class_token))
            sizes = sizes if config.option("weighted") else torch.ones_like(sizes)
            hidden = torch.cat((special, tokens), 1)
            hidden = hidden + block.mlp(block.layer_norm2(hidden))
        numbers = torch.arange(config.entering, device=hidden.device)
        return keep_clusters(hidden[:, int(class_token) :], owner.unsqueeze(1) == numbers[:, None])


def _merge(
    tokens: Tensor, sizes: Tensor, owner: Tensor, metric: Tensor, count: int, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``count`` even tokens into odd ones, where the first token has the number ``first``.

    Shapes: tokens [B, T, D], sizes [B, T], owner [B, N] (each patch's token), metric [B, T, d].
    """
    left, right = slice(first, None, 2), slice(1 - first, None, 2)
    unit = torch.nn.functional.normalize(metric.float(), dim=-1)
    best = (unit[:, left] @ unit[:, right].transpose(1, 2)).max(-1)
    order = rank_descending(best.values)
    gone, stays = order[:, :count], order[:, count:].sort(dim=1).values
    target = best.indices.gather(1, gone)
    even, odd = tokens[:, left] * sizes[:, left, None], tokens[:, right] * sizes[:, right, None]
    odd = odd.scatter_add(1, target.unsqueeze(-1).expand(-1, -1, odd.shape[-1]), gather_tokens(even, gone))
    odd_sizes = sizes[:, right].scatter_add(1, target, sizes[:, left].gather(1, gone))
    merged = torch.cat((gather_tokens(tokens[:, left], stays), (odd / odd_sizes.unsqueeze(-1)).to(tokens.dtype)), 1)
    numbers = torch.arange(owner.shape[1], device=owner.device)
    place = torch.empty_like(order).scatter_(1, stays, numbers[: stays.shape[1]].expand_as(stays))
    place.scatter_(1, gone, target + stays.shape[1])
    slots = torch.empty(sizes.shape, dtype=torch.long, device=order.device)
    slots[:, left] = place
    slots[:, right] = numbers[: odd.shape[1]] + stays.shape[1]
    return merged, torch.cat((sizes[:, left].gather(1, stays), odd_sizes), 1), slots.gather(1, owner)


VISION_REDUCERS.register("tome", options={"proportional": True, "weighted": True})(ToMe())
