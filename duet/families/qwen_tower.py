"""Vision towers that pack pictures of any size into one sequence (Qwen2-VL and its successors), and stage 1 on them.

A merger joins ``m x m`` patches of such a tower into one unit, which is one token of the language model. Stage 1 acts
on units: signals are averaged over the patches of a unit, and what is kept stays at its place, so that the order is
raster order and rotary positions are those of the units.

Shapes: P patches of a call, U units of a call, F frames of one picture, N units of a frame, K kept, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duet import kernels
from duet.config import DuetConfig
from duet.families.passes import UnitSignals, View, plan, singles
from duet.grids import pooled_grid
from duet.over_time import merge_over_time
from duet.signals import TowerSignals, attention_rows, kept, rotate, spread
from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, in_raster_order, runs_tower_itself

if TYPE_CHECKING:
    from duet.question import Question

Grid = tuple[int, int, int]
"""Frames, rows and columns of a picture, in patches."""

_PATCHES_AT_ONCE = 8192  # of the frames that tower and stage 1 look at together; bounds memory in long videos


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


class PackedSignals(TowerSignals):
    """Signals of a packed block for the patches of frames of equal size; queries and keys are rotated.

    A frame looks at itself only, as in the tower.

    Args:
        block: tower block with ``norm1`` and ``attn`` (``qkv``, ``num_heads``, ``scaling``).
        hidden_FPD: input of the block, [F, P, D].
        rotary: (cos, sin), each [F, P, d].
        device: where the signals are wanted; a tower may be spread over several.
    """

    def __init__(self, block: Any, hidden_FPD: Tensor, rotary: tuple[Tensor, Tensor], device: torch.device) -> None:
        super().__init__(hidden_FPD, block.attn, class_token=False)
        self._block = block
        self._rotary = rotary
        self._device = device

    @kept
    def _rotated(self) -> tuple[Tensor, Tensor]:
        """Scaled queries, and keys, [F, H, P, d] in fp32."""
        with torch.no_grad():
            weights = next(self._block.parameters()).device
            hidden = self._hidden if weights.type == "meta" else self._hidden.to(weights)  # hooks move offloaded parts
            joint = self._attention.qkv(self._block.norm1(hidden)).unflatten(-1, (3, self._heads, -1))
            queries, keys, _ = joint.to(self._device).transpose(1, 3).float().unbind(2)
            cos, sin = (table.to(self._device).float() for table in self._rotary)
            return rotate(queries, cos, sin) * self._attention.scaling, rotate(keys, cos, sin)

    def column_mass(self, readers: int = 0) -> Tensor:
        """Return the attention that each patch receives from all patches of its frame, or so many. Shapes: [F, P].

        Averaged over heads and queries. Source: DUET-VLM Algorithm 1 line 2.
        """
        queries, keys = self._rotated
        return kernels.column_mass(queries[:, :, spread(readers, keys.shape[2], keys.device)], keys, scale=1.0)

    def rows(self, patch_BR: Tensor, multiple: int = 1) -> Iterator[Tensor]:
        """Yield the attention rows of chosen patches, averaged over heads. Shapes: [F, R] -> [F, r, P] each.

        Source: Algorithm 1 line 6.
        """
        queries, keys = self._rotated
        index = patch_BR[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[-1])
        yield from attention_rows(queries.gather(2, index), keys, multiple)

    def key_metric(self) -> Tensor:
        """Return the keys averaged over heads. Shapes: [F, P, d]."""
        return self._rotated[1].mean(1)

    def joint_keys(self) -> Tensor:
        """Return the keys with all heads side by side. Shapes: [F, P, D]."""
        return self._rotated[1].transpose(1, 2).flatten(2)


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
    return not (runs_tower_itself(name) or getattr(VISION_REDUCERS.get(name), "reads_next_block", False))


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


def encode_pictures(
    run: Callable[[Tensor, Tensor], PackedFeatures],
    pixels: Tensor,
    grid: Tensor,
    merge: int,
    config: DuetConfig,
    question: Question | None = None,
) -> list[Picture]:
    """Run the tower and reduce what it gives, so many frames at once that memory hardly depends on how many there are.

    Frames do not see each other in the tower. Pictures that stay whole take one call, as without DUET.

    Args:
        run: the tower and its mergers, from pixels [P, ..] and grid [pictures, 3].
        pixels: [P, ..] patches of all pictures.
        grid: [pictures, 3] frames, rows and columns of each, in patches.
        merge: patches per side of a unit.
        config: counts per frame (or per picture, which its frames share), or shares.
        question: what is asked about each picture, for reducers that listen.
    """
    grids: list[Grid] = [(int(t), int(h), int(w)) for t, h, w in grid.tolist()]
    plans = [_plans(grid, merge, config) for grid in grids]
    pieces = [(number, 0, grid[0]) for number, grid in enumerate(grids)]
    steps = [pieces]
    if any(map(any, plans)) or (config.across_frames is not None and any(frames > 1 for frames, _, _ in grids)):
        steps = list(_steps(grids, _PATCHES_AT_ONCE))
    parts: list[list[Picture]] = [[] for _ in grids]
    first = 0
    for step in steps:
        some = [(stop - start, *grids[number][1:]) for number, start, stop in step]
        end = first + sum(map(math.prod, some))
        asked = None if question is None else question.select(torch.tensor([number for number, _, _ in step]))
        chosen = [plans[number][start:stop] for number, start, stop in step]
        # The tower's states are no variables here: they are free again before the next step.
        reduced = reduce_pictures(run(pixels[first:end], grid.new_tensor(some)), some, merge, config, asked, chosen)
        for (number, start, _), part in zip(step, reduced, strict=True):
            skipped = start * grids[number][1] * grids[number][2] // merge**2
            parts[number].append(replace(part, index=part.index + skipped))
        first = end
    pictures = [_joined(some) for some in parts]
    if config.across_frames is None:
        return pictures
    return [
        _merged_over_time(picture, config.across_frames) if frames > 1 else picture
        for picture, (frames, _, _) in zip(pictures, grids, strict=True)
    ]


def _steps(grids: list[Grid], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Return pieces (picture, first frame, end) that go through the tower together: at most so many patches."""
    step, room = [], most
    for number, (frames, rows, columns) in enumerate(grids):
        start = 0
        while start < frames:
            count = min(frames - start, room // (rows * columns))
            if count == 0 and step:
                yield step
                step, room = [], most
                continue
            count = max(1, count)
            step.append((number, start, start + count))
            start, room = start + count, room - count * rows * columns
    yield step


def _joined(parts: list[Picture]) -> Picture:
    """Return a picture whose frames were reduced in several steps."""
    if len(parts) == 1:
        return parts[0]
    levels = [torch.cat(level) for level in zip(*(part.levels for part in parts), strict=True)]
    return Picture(levels, torch.cat([part.index for part in parts]), [one for part in parts for one in part.frames])


def _merged_over_time(picture: Picture, keep: int | float) -> Picture:
    """Return a picture of which tokens that repeat earlier frames were merged into those."""
    whole = merge_over_time([one for frames in picture.frames for one in singles(frames)], keep)
    width = picture.levels[0].shape[-1]
    return Picture(list(whole.tokens[0].split(width, dim=-1)), whole.source[0], [whole])


def reduce_pictures(
    packed: PackedFeatures,
    grids: list[Grid],
    merge: int,
    config: DuetConfig,
    question: Question | None = None,
    plans: Sequence[list[DuetConfig | None]] | None = None,
) -> list[Picture]:
    """Reduce every picture by itself, frame by frame: ``k1 + k2`` tokens of each frame that has more units than that.

    Args:
        packed: what the tower made of them.
        grids: frames, rows and columns of each picture, in patches.
        merge: patches per side of a unit.
        config: counts per frame (or per picture, which its frames share), or shares.
        question: what is asked about each picture, for reducers that listen.
        plans: what each frame keeps, where ``grids`` are parts of pictures; None plans whole ones.

    Source: METHODS 2.8 and 6 (the released code for Qwen2.5-VL); Algorithm 1 for ``variant="paper"``.
    """
    pictures, start = [], 0
    plans = [_plans(grid, merge, config) for grid in grids] if plans is None else plans
    for number, (frames, rows, columns) in enumerate(grids):
        stop = start + frames * rows * columns
        part = packed.part(start, stop, merge**2)
        asked = None
        if question is not None:
            asked = question.select(torch.full((frames,), number, device=part.ranked_input.device))
        pictures.append(_reduce_picture(part, (rows // merge, columns // merge), merge**2, plans[number], asked))
        start = stop
    return pictures


def _plans(grid: Grid, merge: int, config: DuetConfig) -> list[DuetConfig | None]:
    """Return what each frame of a picture keeps."""
    units = (grid[1] // merge, grid[2] // merge)
    return [_fit_pool(one, units) for one in plan(config, [math.prod(units)] * grid[0], has_class=False)]


def _reduce_picture(
    packed: PackedFeatures,
    grid: tuple[int, int],
    unit: int,
    plans: list[DuetConfig | None],
    question: Question | None,
) -> Picture:
    frames, count, width = len(plans), math.prod(grid), packed.levels[0].shape[-1]
    features = torch.cat(packed.levels, dim=-1).unflatten(0, (frames, count))
    if not any(plans):
        whole = replace(VisionReduction.identity(features, False, grid), grid=grid)
        return Picture(packed.levels, torch.arange(frames * count, device=features.device), [whole])
    parts = PackedFrames(packed, frames, count, unit)
    reductions = []
    for some, budget in _runs(plans, max(1, _PATCHES_AT_ONCE // (count * unit))):
        if budget is None:
            reductions.append(replace(VisionReduction.identity(features[some], False, grid), grid=grid))
            continue
        tower = TowerOutput(
            features=features[some],
            signals=parts.signals(some, grid),  # type: ignore[arg-type]
            class_token=False,
            grid=grid,
            pixels=parts.pixels[some],
            project=lambda levels: levels[..., :width],
            question=None if question is None else question.select(torch.arange(some.start, some.stop)),
        )
        reductions.append(replace(in_raster_order(VISION_REDUCERS.get(budget.stage1)(tower, budget)), grid=grid))
    tokens = [one for reduction in reductions for one in reduction.per_image(reduction.tokens)]
    sources = [one for reduction in reductions for one in reduction.per_image(reduction.source)]
    index = torch.cat([source + frame * count for frame, source in enumerate(sources)])
    return Picture(list(torch.cat(tokens).split(width, dim=-1)), index, reductions)


class PackedFrames:
    """The frames of one picture, for the signals that stage 1 may ask of them.

    Args:
        packed: the picture's part of what the tower made.
        frames, count: how many frames it has, and how many units of ``unit`` patches each.
    """

    def __init__(self, packed: PackedFeatures, frames: int, count: int, unit: int) -> None:
        self._block = packed.block
        self._device = packed.levels[0].device
        self._hidden, self._cos, self._sin, self.pixels = (
            x.unflatten(0, (frames, -1)) for x in (packed.ranked_input, *packed.rotary, packed.pixels)
        )
        self._units = torch.arange(count * unit).view(count, unit)

    def signals(self, some: slice, grid: tuple[int, int]) -> UnitSignals:
        """Return the signals of some frames, averaged over the patches of each unit."""
        rotary = (self._cos[some], self._sin[some])
        signals = PackedSignals(self._block, self._hidden[some], rotary, self._device)
        return UnitSignals(signals, View.pooled(self._units, grid), class_token=False)


def _runs(plans: list[DuetConfig | None], most: int) -> Iterator[tuple[slice, DuetConfig | None]]:
    """Return frames that follow each other and have the same plan, at most ``most`` at once."""
    start = 0
    for stop in range(1, len(plans) + 1):
        if stop == len(plans) or stop - start == most or plans[stop] != plans[start]:
            yield slice(start, stop), plans[start]
            start = stop


def _fit_pool(config: DuetConfig | None, grid: tuple[int, int]) -> DuetConfig | None:
    """Return the plan of a frame; pooling makes the largest grid of cells within the budget."""
    if config is None or config.stage1 != "average_pool":
        return config
    return replace(config, dominant=_largest_pool(config.entering, grid), contextual=0)


def _largest_pool(tokens: int, grid: tuple[int, int]) -> int:
    while True:
        try:
            return math.prod(pooled_grid(tokens, grid))
        except ValueError:
            tokens -= 1
