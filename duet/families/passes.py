"""Stage 1 on pictures that a tower sees in several passes (tiles, frames), or whose tokens stand for several patches.

Shapes: T tower passes, M tower tokens, N patches of a pass, U units of a view (one unit becomes one token), W patches
of a unit, R rows, K kept, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duet import tracing
from duet.config import DuetConfig
from duet.over_time import merge_over_time
from duet.signals import TowerSignals
from duet.stage1 import NEWLINE, VISION_REDUCERS, TowerOutput, VisionReduction, runs_tower_itself
from duet.vision import encode_vision, run_tower

if TYPE_CHECKING:
    from duet.question import Question

_PASSES_AT_ONCE = 16  # only reduced tokens outlive a step, so memory hardly depends on how long a video is


@dataclass(frozen=True, eq=False)
class View:
    """What of a tower pass becomes tokens, in raster order.

    Attributes:
        units: [U, W] patches of each unit.
        weights: [U, W] share of each patch in its unit; None where a unit is one patch.
        grid: (rows, columns) of units.
    """

    units: Tensor
    weights: Tensor | None
    grid: tuple[int, int]

    @classmethod
    def rectangle(cls, grid: tuple[int, int], rows: range, columns: range) -> View:
        """Return the view of a part of the patch grid, every patch a unit of its own."""
        numbers = torch.arange(grid[0] * grid[1]).view(grid)[rows.start : rows.stop, columns.start : columns.stop]
        return cls(numbers.reshape(-1, 1), None, (len(rows), len(columns)))

    @classmethod
    def pooled(cls, units: Tensor, grid: tuple[int, int]) -> View:
        """Return the view whose units average W patches each. Shapes: units [U, W]."""
        return cls(units, torch.full(units.shape, 1 / units.shape[1]), grid)

    @classmethod
    def weighted(cls, weights_UN: Tensor, grid: tuple[int, int]) -> View:
        """Return the view whose units are weighted means of patches."""
        width = int((weights_UN > 0).sum(1).max())
        weights, units = weights_UN.topk(width, dim=1)
        return cls(units, weights, grid)

    def pool(self, values: Tensor, dim: int) -> Tensor:
        """Average values of patches over the units. Shapes: N entries in ``dim`` become U."""
        units = self.units.to(values.device)
        dim %= values.dim()
        picked = values.index_select(dim, units.flatten()).unflatten(dim, tuple(units.shape))
        if self.weights is not None:
            picked = picked * self.weights.to(values).view(*units.shape, *[1] * (values.dim() - 1 - dim))
        return picked.sum(dim + 1)


class UnitSignals:
    """The signals of a tower block for the units of a view; the same methods as ``TowerSignals``.

    Args:
        signals: for patches.
        view: which patches make a unit.
        class_token: whether the tower's class token, if any, takes part.
    """

    def __init__(self, signals: TowerSignals, view: View, class_token: bool) -> None:
        self._signals = signals
        self._view = view
        self.class_token = class_token

    def class_row(self) -> Tensor:
        """Return the class token's attention to a patch of each unit, per head. Shapes: [T, H, U]."""
        return self._view.pool(self._signals.class_row(), -1)

    def column_mass(self, readers: int = 0) -> Tensor:
        """Return what a patch of each unit receives from all patches of the pass, or so many. Shapes: [T, U]."""
        return self._view.pool(self._signals.column_mass(readers), -1)

    def rows(self, unit_TR: Tensor) -> Iterator[Tensor]:
        """Yield the attention rows of chosen units over all units, averaged over heads. Shapes: [T, r, U] each."""
        view, width, first = self._view, self._view.units.shape[1], 0
        for rows in self._signals.rows(view.units.to(unit_TR.device)[unit_TR].flatten(1), width):
            rows = rows.unflatten(1, (-1, width))
            if view.weights is not None:
                rows = rows * view.weights.to(rows)[unit_TR[:, first : first + rows.shape[1]]].unsqueeze(-1)
            first += rows.shape[1]
            yield view.pool(rows.sum(2), -1)

    def joint_class_row(self) -> Tensor:
        """Return the class token's attention with all heads taken as one. Shapes: [T, U]."""
        return self._view.pool(self._signals.joint_class_row(), -1)

    def joint_keys(self) -> Tensor:
        """Return the keys of the units with all heads side by side. Shapes: [T, U, D]."""
        return self._view.pool(self._signals.joint_keys(), 1)

    def key_metric(self) -> Tensor:
        """Return the keys of the class token, if any, and the units, averaged over heads. Shapes: [T, 1 + U, d]."""
        keys, first = self._signals.key_metric(), int(self._signals.class_token)
        return torch.cat((keys[:, : int(self.class_token)], self._view.pool(keys[:, first:], 1)), dim=1)


@dataclass(frozen=True)
class _UnitOutput(TowerOutput):
    """What a vision reducer gets of passes that are seen through a view."""

    patchwise: TowerOutput | None = None
    view: View | None = None

    def next_signals(self) -> Any:
        """Return the signals of the block that would run next."""
        assert self.patchwise is not None and self.view is not None
        return UnitSignals(self.patchwise.next_signals(), self.view, self.class_token)

    def first_signals(self) -> Any:
        """Return the signals of the tower's first block."""
        assert self.patchwise is not None and self.view is not None
        return UnitSignals(self.patchwise.first_signals(), self.view, self.class_token)


def feature_choice(model: Any, inputs: Mapping[str, Any]) -> tuple[int | Sequence[int], bool]:
    """Return the layer whose features are used, and whether the class token is left out."""
    layer, strategy = inputs.get("vision_feature_layer"), inputs.get("vision_feature_select_strategy")
    layer = model.config.vision_feature_layer if layer is None else layer
    return layer, (strategy or model.config.vision_feature_select_strategy) == "default"


def plan(config: DuetConfig, units: Sequence[int], has_class: bool) -> list[DuetConfig | None]:
    """Return what each pass of one picture keeps; None where it has no more units than that, and so keeps all.

    Args:
        config: counts (or shares) per pass, or per picture (``config.per``): then its passes share them evenly, the
            first ones taking what is left over.
        units: how many each pass has; one with none (it shows padding only) takes no part.
        has_class: whether the tower has a class token that may count as one of them.

    Raises:
        ValueError: fewer tokens for a picture than it has passes, or a method that cannot share them.
    """
    class_token = int(has_class and config.counts_class_token)
    taking_part = [number for number, size in enumerate(units) if size]
    plans: list[DuetConfig | None] = [None] * len(units)
    shared = config.per == "picture" and config.stage1 != "none" and not config.in_shares and not config.adaptive
    if shared and config.dominant < len(taking_part):
        raise ValueError(
            f"dominant = {config.dominant} tokens of a picture cannot be shared by its {len(taking_part)} tower passes "
            "(tiles or frames); ask for at least one each, or for fewer frames"
        )
    if shared and runs_tower_itself(config.stage1):
        raise ValueError(f"stage1={config.stage1!r} keeps equally many tokens of every tower pass; use per='pass'")
    for rank, number in enumerate(taking_part):
        counts = config.for_patches(units[number])
        if shared:
            dominant, contextual = (
                total // len(taking_part) + (rank < total % len(taking_part))
                for total in (int(config.dominant), int(config.contextual))
            )
            counts = replace(config, per="pass", dominant=dominant, contextual=contextual)
        if not _keeps_all(counts, units[number], class_token):
            plans[number] = counts
    return plans


def _keeps_all(config: DuetConfig, units: int, class_token: int) -> bool:
    if config.stage1 == "none" or config.keeps_every_patch(units):
        return True
    return not config.adaptive and units + class_token <= config.entering


def reduce_passes(
    tower: TowerOutput,
    views: Sequence[View],
    plans: Sequence[DuetConfig | None],
    features: Tensor | None = None,
) -> list[VisionReduction]:
    """Reduce every pass as its plan says.

    Args:
        tower: all passes.
        views: what of each pass becomes tokens; equal ones should be one object, so that they are reduced together.
        plans: from ``plan``.
        features: [T, U, D] of the units, where they are not patches.

    Returns:
        One result per pass, with one image each; ``source`` and ``members`` name units.
    """
    groups: dict[tuple[View, DuetConfig | None], list[int]] = {}
    for number, key in enumerate(zip(views, plans, strict=True)):
        groups.setdefault(key, []).append(number)
    results: list[VisionReduction] = [None] * len(views)  # type: ignore[list-item]
    for (view, plan), numbers in groups.items():
        every = len(numbers) == len(views)
        some = tower if every else tower.select(torch.tensor(numbers))
        part = _through(view, some, features if features is None or every else features[numbers])
        if plan is None:
            reduction = VisionReduction.identity(part.patches, False, view.grid)
        else:
            reduction = replace(VISION_REDUCERS.get(plan.stage1)(part, plan), grid=view.grid)
        for number, single in zip(numbers, singles(reduction), strict=True):
            results[number] = single
    return results


def _through(view: View, tower: TowerOutput, features: Tensor | None) -> TowerOutput:
    """Return the passes as they look through a view."""
    if features is None and view.grid == tower.grid and view.weights is None:
        return tower
    has_class = tower.class_token and features is None
    if features is None:
        features = torch.cat((tower.features[:, : int(has_class)], view.pool(tower.patches, 1)), dim=1)
    signals: Any = UnitSignals(tower.signals, view, has_class)
    return _UnitOutput(
        features, signals, has_class, view.grid, tower.pixels, tower.next_block, tower.project, None, tower.question,
        tower.first, patchwise=tower, view=view,
    )  # fmt: skip


def singles(reduction: VisionReduction) -> list[VisionReduction]:
    """Return the images of a reduction one by one, without padding."""
    tokens, source = reduction.per_image(reduction.tokens), reduction.per_image(reduction.source)
    kind = reduction.per_image(reduction.kind.expand_as(reduction.source))
    return [
        replace(reduction, tokens=t[None], source=s[None], kind=k, members=m[None], counts=None)
        for t, s, k, m in zip(tokens, source, kind, reduction.members_per_image(), strict=True)
    ]


@dataclass(frozen=True)
class Frames:
    """How the frames of a video become tokens.

    Attributes:
        tower: the vision tower.
        select_layer: where its features are taken.
        class_token: whether the tower has a class token.
        view: what of a frame becomes tokens.
        embed: tower features [T, M, D] of frames to those of units, [T, U, D']; None where units are patches.
        finish: reduced tokens [.., D'] to the language model's width.
        newline: [D], what the model puts after a video that stage 1 leaves whole; None for nothing.
    """

    tower: Any
    select_layer: int | Sequence[int]
    class_token: bool
    view: View
    embed: Callable[[Tensor], Tensor] | None
    finish: Callable[[Tensor], Tensor]
    newline: Tensor | None = None

    def run(self, pixels_TCHW: Tensor) -> tuple[TowerOutput, Tensor | None]:
        """Return what the tower gives for some frames, and the features of units where they are not patches."""
        output = run_tower(self.tower, pixels_TCHW, self.select_layer)
        return output, None if self.embed is None else self.embed(output.features)


def encode_frames(how: Frames, videos_VFCHW: Tensor, config: DuetConfig, question: Question | None) -> list[Tensor]:
    """Return the tokens of each video, [K, D], frame after frame.

    Frames that are reduced go through the tower a few at a time, and are then merged over time where
    ``config.across_frames`` says so. Without either a class token stays with its frame, and the newline with its video.

    Raises:
        ValueError: a vision reducer that works inside the tower where tokens are made, or merged, after it.
    """
    videos, frames = videos_VFCHW.shape[:2]
    pixels = videos_VFCHW.flatten(0, 1)
    plans = plan(config, [len(how.view.units)] * frames, how.class_token)
    merges = config.across_frames is not None and frames > 1
    if not any(plans) and not merges:
        return _left_whole(how, pixels, frames)
    if config.stage1 != "none" and runs_tower_itself(config.stage1):
        return _encode_whole_frames(how, pixels, config, frames)
    if question is not None:
        question = question.select(torch.arange(videos).repeat_interleave(frames))
    reduced: list[VisionReduction] = []
    for start in range(0, len(pixels), _PASSES_AT_ONCE):
        numbers = torch.arange(start, min(start + _PASSES_AT_ONCE, len(pixels)))
        asked = None if question is None else question.select(numbers)
        chosen = [plans[number % frames] for number in numbers.tolist()]
        reduced.extend(_reduce_frames(how, pixels[start : start + len(numbers)], chosen, asked))
    each = [reduced[start : start + frames] for start in range(0, len(reduced), frames)]
    if config.across_frames is not None:
        each = [[merge_over_time(video, config.across_frames)] for video in each]
    for reduction in (one for video in each for one in video):
        tracing.record_vision(reduction)
    tokens = [torch.cat([one.tokens[0] for one in video]) for video in each]
    return list(how.finish(torch.cat(tokens)).split([len(video) for video in tokens]))


def _reduce_frames(
    how: Frames, pixels_TCHW: Tensor, plans: Sequence[DuetConfig | None], question: Question | None
) -> list[VisionReduction]:
    """Return what stage 1 leaves of some frames; all that the tower made of them is free again then."""
    output, features = how.run(pixels_TCHW)
    output = replace(output, project=how.finish, question=question)
    return reduce_passes(output, [how.view] * len(plans), plans, features)


def _encode_whole_frames(how: Frames, pixels_TCHW: Tensor, config: DuetConfig, frames: int) -> list[Tensor]:
    """Return the tokens of videos for a vision reducer that changes tower passes."""
    if how.embed is not None:
        raise ValueError(
            f"stage1={config.stage1!r} changes pictures or tower blocks, but here one token stands for several patches "
            "after the tower; choose another stage1"
        )
    if config.across_frames is not None:
        raise ValueError(
            f"stage1={config.stage1!r} changes pictures or tower blocks, so frames have no places in common that "
            "across_frames could compare; choose another stage1, or leave across_frames out"
        )
    tokens = []
    for pixels in pixels_TCHW.split(_PASSES_AT_ONCE):
        reduction = encode_vision(how.tower, pixels, select_layer=how.select_layer, config=config, project=how.finish)
        tokens.extend(reduction.per_image(reduction.tokens))
    counts = [sum(len(t) for t in tokens[i : i + frames]) for i in range(0, len(tokens), frames)]
    return list(how.finish(torch.cat(tokens)).split(counts))


def _left_whole(how: Frames, pixels_TCHW: Tensor, frames: int) -> list[Tensor]:
    """Return the tokens that the model itself makes of videos with so many frames each."""
    output, features = how.run(pixels_TCHW)
    features = output.features if features is None else features
    videos = how.finish(features).unflatten(0, (-1, frames)).flatten(1, 2)
    if how.newline is not None:
        videos = torch.cat((videos, how.newline.to(videos).expand(len(videos), 1, -1)), dim=1)
    if tracing.is_active():
        has_class = features.shape[1] > len(how.view.units)
        for number, frame in enumerate(singles(VisionReduction.identity(features, has_class, how.view.grid)), start=1):
            ends = how.newline is not None and number % frames == 0
            tracing.record_vision(_then_newline(frame) if ends else frame)
    return list(videos)


def _then_newline(frame: VisionReduction) -> VisionReduction:
    source = torch.nn.functional.pad(frame.source, (0, 1), value=-1)
    return replace(frame, source=source, kind=torch.nn.functional.pad(frame.kind, (0, 1), value=NEWLINE))
