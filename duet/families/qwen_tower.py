"""Vision towers that pack pictures of any size into one sequence (Qwen2-VL and its successors), and stage 1 on them.

A merger joins ``m x m`` patches of such a tower into one unit, which is one token of the language model. Stage 1 acts
on units: signals are averaged over the patches of a unit, and what is kept stays at its place, so that the order is
raster order and rotary positions are those of the units.

Shapes: P patches of a call, U units of a call, F frames of one picture, N units of a frame, K kept, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duet.config import DuetConfig
from duet.signals import TowerSignals, attention_rows, mean_attention, rotate
from duet.stage1 import DOMINANT, VISION_REDUCERS, TowerOutput, VisionReduction
from duet.stage1.average_pool import pooled_grid
from duet.tokens import gather_tokens

if TYPE_CHECKING:
    from duet.question import Question

Grid = tuple[int, int, int]
"""Frames, rows and columns of a picture, in patches."""

_PATCHES_AT_ONCE = 8192  # of the frames that stage 1 looks at together; bounds memory in long videos
_NEED_NEXT_BLOCK = ("prumerge",)


@dataclass(frozen=True)
class BlockRun:
    """What ``run_blocks`` returns: the last states, the input of the ranked block, and tapped states; each [P, D]."""

    last: Tensor
    ranked_input: Tensor
    tapped: list[Tensor]


def run_blocks(
    blocks: Any,
    hidden_PD: Tensor,
    rotary: tuple[Tensor, Tensor],
    spans: Sequence[tuple[Tensor, int | None]],
    ranked: int,
    taps: Sequence[int] = (),
) -> BlockRun:
    """Run the blocks of a packed tower.

    Args:
        blocks: each is called with hidden states, ``cu_seqlens``, ``max_seqlen`` and ``position_embeddings``.
        hidden_PD: embedded patches, [P, D].
        rotary: (cos, sin), each [P, d].
        spans: for each block, where its attention spans start and end, and the longest one if the kernel needs it.
        ranked: index of the block whose attention ranks.
        taps: indices of blocks whose outputs are wanted, too.
    """
    ranked_input, tapped = hidden_PD, []
    for index, (block, (bounds, longest)) in enumerate(zip(blocks, spans, strict=True)):
        if index == ranked:
            ranked_input = hidden_PD
        hidden_PD = block(hidden_PD, cu_seqlens=bounds, max_seqlen=longest, position_embeddings=rotary)
        if index in taps:
            tapped.append(hidden_PD)
    return BlockRun(hidden_PD, ranked_input.detach(), tapped)


@dataclass(frozen=True)
class PackedFeatures:
    """All pictures of a call, in raster order of units.

    Attributes:
        levels: [U, D] each: the tokens of the language model, then what is added to them after its first layers.
        ranked_input: [P, D] input of the ranked block, detached.
        block: that block, with ``norm1`` and ``attn``.
        rotary: (cos, sin) of the patches, each [P, d].
        pixels: [P, ..] what the tower saw; choices at random depend on it.
    """

    levels: list[Tensor]
    ranked_input: Tensor
    block: Any
    rotary: tuple[Tensor, Tensor]
    pixels: Tensor

    def part(self, start: int, stop: int, unit: int) -> PackedFeatures:
        """Return the patches ``start`` to ``stop - 1``, which are whole units of ``unit`` patches."""
        units = slice(start // unit, stop // unit)
        return replace(
            self,
            levels=[level[units] for level in self.levels],
            ranked_input=self.ranked_input[start:stop],
            rotary=(self.rotary[0][start:stop], self.rotary[1][start:stop]),
            pixels=self.pixels[start:stop],
        )


class UnitSignals(TowerSignals):
    """Signals of a packed block for frames of equal size, averaged over the patches of each unit.

    Queries and keys are rotated. A frame looks at itself only, as in the tower.

    Args:
        block: tower block with ``norm1`` and ``attn`` (``qkv``, ``num_heads``, ``scaling``).
        hidden_FPD: input of the block, [F, P, D], patches of a unit side by side.
        rotary: (cos, sin), each [F, P, d].
        unit: patches of a unit.
    """

    def __init__(self, block: Any, hidden_FPD: Tensor, rotary: tuple[Tensor, Tensor], unit: int) -> None:
        super().__init__(hidden_FPD, block.attn, class_token=False)
        self._block = block
        self._rotary = rotary
        self._unit = unit

    @cached_property
    def _rotated(self) -> tuple[Tensor, Tensor]:
        """Scaled queries, and keys, [F, H, P, d] in fp32."""
        with torch.no_grad():
            joint = self._attention.qkv(self._block.norm1(self._hidden)).unflatten(-1, (3, self._heads, -1))
            queries, keys, _ = joint.transpose(1, 3).float().unbind(2)
            cos, sin = (table.float() for table in self._rotary)
            return rotate(queries, cos, sin) * self._attention.scaling, rotate(keys, cos, sin)

    def _per_unit(self, values: Tensor, dim: int) -> Tensor:
        return values.unflatten(dim, (-1, self._unit)).mean(dim + 1)

    def column_mass(self) -> Tensor:
        """Return the attention that each unit receives from all patches of its frame. Shapes: [F, N].

        Averaged over heads, queries and the patches of the unit. Source: DUET-VLM Algorithm 1 line 2.
        """
        return self._per_unit(mean_attention(*self._rotated), 1)

    def rows(self, patch_BR: Tensor) -> Tensor:
        """Return the attention of chosen units to all units, averaged over heads and patches. Shapes: [F, R, N].

        Source: Algorithm 1 line 6.
        """
        queries, keys = self._rotated
        wanted = (patch_BR.unsqueeze(-1) * self._unit + torch.arange(self._unit, device=keys.device)).flatten(1)
        picked = queries.gather(2, wanted[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[-1]))
        return self._per_unit(self._per_unit(attention_rows(picked, keys), 2), 1)

    def key_metric(self) -> Tensor:
        """Return the rotated keys of the units averaged over heads. Shapes: [F, N, d]."""
        return self._per_unit(self._rotated[1].mean(1), 1)

    def joint_keys(self) -> Tensor:
        """Return the rotated keys of the units with all heads side by side. Shapes: [F, N, D]."""
        return self._per_unit(self._rotated[1].transpose(1, 2).flatten(2), 1)


def check_reducer(config: DuetConfig, model_type: str) -> None:
    """Raise ValueError if the vision reducer needs what a packed tower does not have; list those that work."""
    if config.stage1 == "none" or _works(config.stage1):
        return
    known = ", ".join(name for name in VISION_REDUCERS.names() if _works(name))
    raise ValueError(
        f"stage1={config.stage1!r} does not work with model_type {model_type!r}, whose tower packs pictures of any "
        f"size and has no class token; these do: {known}, none"
    )


def _works(name: str) -> bool:
    reducer = VISION_REDUCERS.get(name)
    return not (hasattr(reducer, "resize") or hasattr(reducer, "encode") or name in _NEED_NEXT_BLOCK)


@dataclass(frozen=True)
class Picture:
    """One image or video after stage 1.

    Attributes:
        levels: [K, D] each, in raster order.
        index: [K] which of the picture's placeholders each token takes, ascending.
        frames: what became of the units of its frames.
    """

    levels: list[Tensor]
    index: Tensor
    frames: list[VisionReduction]


def reduce_pictures(
    packed: PackedFeatures, grids: list[Grid], merge: int, config: DuetConfig, question: Question | None = None
) -> list[Picture]:
    """Reduce every picture by itself, frame by frame: ``k1 + k2`` tokens of each frame that has more units than that.

    Args:
        packed: what the tower made of them.
        grids: frames, rows and columns of each picture, in patches.
        merge: patches per side of a unit.
        config: counts per frame, or shares of it.
        question: what is asked about each picture, for reducers that listen.

    Source: METHODS 2.8 and 6 (the released code for Qwen2.5-VL); Algorithm 1 for ``variant="paper"``.
    """
    pictures, start = [], 0
    for number, (frames, rows, columns) in enumerate(grids):
        stop = start + frames * rows * columns
        part = packed.part(start, stop, merge**2)
        asked = None
        if question is not None:
            asked = question.select(torch.full((frames,), number, device=part.ranked_input.device))
        pictures.append(_reduce_picture(part, frames, (rows // merge, columns // merge), merge**2, config, asked))
        start = stop
    return pictures


def _reduce_picture(
    packed: PackedFeatures, frames: int, grid: tuple[int, int], unit: int, config: DuetConfig, question: Question | None
) -> Picture:
    count, width = math.prod(grid), packed.levels[0].shape[-1]
    features = torch.cat(packed.levels, dim=-1).unflatten(0, (frames, count))
    budget = frame_budget(config, grid)
    if budget is None:
        whole = replace(VisionReduction.identity(features, False, grid), grid=grid)
        return Picture(packed.levels, torch.arange(frames * count, device=features.device), [whole])
    hidden, cos, sin, pixels = (
        x.unflatten(0, (frames, -1)) for x in (packed.ranked_input, *packed.rotary, packed.pixels)
    )
    step = max(1, _PATCHES_AT_ONCE // (count * unit))
    reductions = []
    for first in range(0, frames, step):
        some = torch.arange(first, min(first + step, frames), device=features.device)
        tower = TowerOutput(
            features=features[some],
            signals=UnitSignals(packed.block, hidden[some], (cos[some], sin[some]), unit),
            class_token=False,
            grid=grid,
            pixels=pixels[some],
            project=lambda levels: levels[..., :width],
            question=None if question is None else question.select(some),
        )
        reductions.append(_in_raster_order(VISION_REDUCERS.get(budget.stage1)(tower, budget), grid))
    tokens = [one for reduction in reductions for one in reduction.per_image(reduction.tokens)]
    sources = [one for reduction in reductions for one in reduction.per_image(reduction.source)]
    index = torch.cat([source + frame * count for frame, source in enumerate(sources)])
    return Picture(list(torch.cat(tokens).split(width, dim=-1)), index, reductions)


def frame_budget(config: DuetConfig, grid: tuple[int, int]) -> DuetConfig | None:
    """Return the configuration with the counts for one frame of ``grid`` units; None where it keeps all of them.

    A budget of as many tokens as there are units, or of more, changes nothing, whatever the method. Pooling makes
    the largest grid of cells within the budget.
    """
    count = math.prod(grid)
    if config.stage1 == "none" or count == 1:
        return None
    if config.adaptive:
        return config
    config = config.for_patches(count)
    if config.entering >= count:
        return None
    if config.stage1 == "average_pool":
        return replace(config, dominant=_largest_pool(config.entering, grid), contextual=0)
    return config


def _largest_pool(tokens: int, grid: tuple[int, int]) -> int:
    while True:
        try:
            return math.prod(pooled_grid(tokens, grid))
        except ValueError:
            tokens -= 1


def _in_raster_order(reduction: VisionReduction, grid: tuple[int, int]) -> VisionReduction:
    """Return the reduction with its tokens in the order of their units; padding stays behind them.

    ``members`` has a row for every token then, empty for one that is no average.
    """
    source = reduction.source
    if reduction.counts is not None:
        padding = torch.arange(source.shape[1], device=source.device) >= reduction.counts.unsqueeze(1)
        source = source.masked_fill(padding, math.prod(grid))
    order = source.argsort(dim=1, stable=True)
    kind = reduction.kind.expand_as(source)
    members = reduction.members
    missing = source.shape[1] - members.shape[1]
    members = torch.nn.functional.pad(members, (0, 0, missing, 0), value=-1) if members.numel() else members
    return replace(
        reduction,
        tokens=gather_tokens(reduction.tokens, order),
        source=source.gather(1, order),
        kind=kind.gather(1, order),
        members=gather_tokens(members, order) if members.numel() else members,
        grid=grid,
    )


def is_whole(reduction: VisionReduction) -> bool:
    """Return whether stage 1 left the frames as they were."""
    units = math.prod(reduction.grid)
    return reduction.tokens.shape[1] == units and bool((reduction.kind == DOMINANT).all())
