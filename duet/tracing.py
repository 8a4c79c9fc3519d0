"""What happened to every patch, and how many tokens every layer saw.

``with duet.trace() as t`` records what runs inside the block, in this thread or task only; no model stores it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from duet.attachment import base_model, handle

if TYPE_CHECKING:
    from duet.stage1 import VisionReduction
    from duet.tokens import TokenState


T = TypeVar("T")


@dataclass
class ImageRecord:
    """The fate of one image's patches.

    Attributes:
        grid: (rows, columns) of patches.
        source: patch index of each token that stage 1 handed on, -1 for the class token.
        kind: ``"class"``, ``"dominant"`` or ``"contextual"`` for each of them.
        members: for each of the last tokens, the contextual ones, the patches that it averages; or for every token, and
            none for one that is no average, where they stand in another order (``patches_of`` knows both).
        kept_after: decoder layers that have run -> indices of the tokens (into ``source``) that were still there.
        merged_after: decoder layers that have run -> token -> the token that it was averaged into there, which may be
            itself. A number beyond this image's tokens is a token of another image of the sample.
    """

    grid: tuple[int, int]
    source: list[int]
    kind: list[str]
    members: list[list[int]]
    kept_after: dict[int, list[int]] = field(default_factory=dict)
    merged_after: dict[int, dict[int, int]] = field(default_factory=dict)

    def fate(self) -> list[str]:
        """Return one line per patch: kept, merged into which token, or dropped, and at which stage."""
        lines = [["dropped in stage 1"] for _ in range(self.grid[0] * self.grid[1])]
        for token in range(len(self.source)):
            averaged = self.averaged(token)
            for member in self.patches_of(token):
                word = f"merged into token {token}" if averaged else f"kept as token {token}"
                note = self._later_note(token)
                lines[member] = [*(entry for entry in lines[member] if entry != "dropped in stage 1"), word + note]
        return ["; ".join(entries) for entries in lines]

    def averaged(self, token: int) -> list[int]:
        """Return the patches that a token averages; none if it is no average of patches."""
        row = token - (len(self.source) - len(self.members))
        return self.members[row] if row >= 0 else []

    def patches_of(self, token: int) -> list[int]:
        """Return the patches that a token stands for: those that it averages, or its own; none of the class token."""
        return self.averaged(token) or [patch for patch in self.source[token : token + 1] if patch >= 0]

    def recycled(self, layer: int) -> dict[int, list[int]]:
        """Return this image's tokens that are averages after ``layer`` layers, each with this image's tokens in it."""
        groups: dict[int, list[int]] = {}
        merged: set[int] = set()
        for token in range(len(self.source)):
            place = token
            for stage in sorted(stage for stage in self.kept_after if stage <= layer):
                into = self.merged_after.get(stage, {}).get(place)
                if into is not None:
                    place = into
                    merged.add(into)
                if place not in self.kept_after[stage]:
                    break
            else:
                groups.setdefault(place, []).append(token)
        return {place: tokens for place, tokens in groups.items() if place in merged}

    def _later_note(self, token: int) -> str:
        """Say what the decoder did to a token, following it into the tokens that it was merged into."""
        note = ""
        for layer in sorted(self.kept_after):
            into = self.merged_after.get(layer, {}).get(token)
            if into is not None and not 0 <= into < len(self.source):
                return note + f", merged into a token of another image after layer {layer}"
            if into is not None:
                note += f", merged into token {into} after layer {layer}"
                token = into
            elif token not in self.kept_after[layer]:
                return note + f", dropped after layer {layer}"
        return note


@dataclass
class LayerCount:
    """Visual and all tokens that decoder layers ``start`` to ``stop - 1`` saw, per sample of one forward pass."""

    start: int
    stop: int
    visual: list[int]
    tokens: list[int]
    padded_length: int


@dataclass
class Trace:
    """What was recorded, in the order in which it ran.

    Attributes:
        images: one record per image, filled when ``images=True``.
        passes: per decoder pass (prefill or training forward), the counts of each segment of layers.
        tower_passes: images, tiles and frames that stage 1 got.
        whole_passes: those that it left as they were, because the budget holds all that they have.
        model: the only model that is recorded; None records every one.
    """

    record_images: bool
    images: list[ImageRecord] = field(default_factory=list)
    passes: list[list[LayerCount]] = field(default_factory=list)
    tower_passes: int = 0
    whole_passes: int = 0
    model: object = None
    _claimed: int = 0

    def claim(self, visual_BL: Tensor) -> list[tuple[ImageRecord, int]]:
        """Return the images recorded since the last pass, each with its first index among the visual positions.

        Images that cannot be told apart (tiles that were merged, say) are left without entries for the decoder.
        """
        images, self._claimed = self.images[self._claimed :], len(self.images)
        images = [image for image in images if image.source]
        counts = visual_BL.sum(1).tolist() if images else []
        for placeholders in (0, 1):
            placed = _deal(images, counts, placeholders)
            if placed is not None:
                return placed
        return []

    def reorder(self, tokens: list[int], order: list[int]) -> None:
        """Sort the images recorded since the last pass; see ``reorder_pictures``."""
        waiting, groups = iter(self.images[self._claimed :]), []
        for wanted in tokens:
            group: list[ImageRecord] = []
            while sum(len(image.source) for image in group) < wanted:
                image = next(waiting, None)
                if image is None:
                    return
                group.append(image)
            groups.append(group)
        if next(waiting, None) is None:
            self.images[self._claimed :] = [image for number in order for image in groups[number]]

    def average_tokens(self) -> float:
        """Return the visual tokens per layer, averaged over layers and over the samples that had an image.

        Raises:
            ValueError: no sample with an image was recorded.
        """
        sums = [
            self._sample_average(segments, row) for segments in self.passes for row in range(len(segments[0].visual))
        ]
        with_image = [value for value in sums if value is not None]
        if not with_image:
            raise ValueError("no sample with an image was recorded, so there is no average of visual tokens")
        return sum(with_image) / len(with_image)

    @staticmethod
    def _sample_average(segments: list[LayerCount], row: int) -> float | None:
        if segments[0].visual[row] == 0:
            return None
        return sum(s.visual[row] * (s.stop - s.start) for s in segments) / segments[-1].stop


def _deal(images: list[ImageRecord], counts: list[int], placeholders: int) -> list[tuple[ImageRecord, int]] | None:
    """Deal images out to rows with so many visual positions; None where their tokens do not fill the rows exactly.

    A row without visual positions takes ``placeholders`` images, which have no position.
    """
    placed, number, start, end = [], 0, 0, 0
    for count in counts:
        number += 0 if count else placeholders
        end += count
        while start < end and number < len(images):
            placed.append((images[number], start))
            start += len(images[number].source)
            number += 1
        if start != end:
            return None
    return placed if number == len(images) else None


_ACTIVE: ContextVar[tuple[Trace, ...]] = ContextVar("duet_trace", default=())
_RUNNING: ContextVar[object] = ContextVar("duet_running", default=None)


@contextmanager
def trace(model: nn.Module | None = None, *, images: bool = True) -> Iterator[Trace]:
    """Record what stage 1 and stage 2 do inside the block.

    Args:
        model: record this model only (the model inside of a PEFT or another wrapper); None records everything that runs
            in this thread.
        images: record the fate of every patch; False records counts only, which costs nothing on a GPU.

    Raises:
        ValueError: ``model`` is no model.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(f"trace(model) records one model, and {model!r} is none; trace() records all that run")
    record = Trace(record_images=images, model=None if model is None else base_model(model))
    token = _ACTIVE.set((*_ACTIVE.get(), record))
    try:
        yield record
    finally:
        _ACTIVE.reset(token)


def recorded(method: Callable[..., T]) -> Callable[..., T]:
    """Let traces of one model know whose work a method of it, or of a part that DUET changed, does."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> T:
        if torch.compiler.is_compiling() or not _ACTIVE.get():
            return method(self, *args, **kwargs)
        attached = handle(self)
        token = _RUNNING.set(self if attached is None else attached.model)
        try:
            return method(self, *args, **kwargs)
        finally:
            _RUNNING.reset(token)

    return run


def _active() -> list[Trace]:
    model = _RUNNING.get()
    return [active for active in _ACTIVE.get() if active.model is None or active.model is model]


def is_active() -> bool:
    """Return whether anything records; nothing does inside a compiled graph, which outlives the trace."""
    return not torch.compiler.is_compiling() and bool(_active())


def wants_images() -> bool:
    """Return whether anything records the fate of every patch."""
    return any(active.record_images for active in _active())


def record_vision(reduction: VisionReduction) -> None:
    """Add one record per image of a stage-1 result to every active trace that wants images."""
    from duet.stage1 import KIND_NAMES

    whole = reduction.is_whole
    for active in _active():
        active.tower_passes += len(reduction.source) * reduction.passes
        active.whole_passes += len(reduction.source) * reduction.passes * int(whole)
        if not active.record_images:
            continue
        kinds = reduction.kind.expand_as(reduction.source)
        sources, kinds = ([row.tolist() for row in reduction.per_image(values)] for values in (reduction.source, kinds))
        clusters = [rows.tolist() for rows in reduction.members_per_image()] or [[] for _ in sources]
        for source, kind, members in zip(sources, kinds, clusters, strict=True):
            groups = [[patch for patch in group if patch >= 0] for group in members]
            active.images.append(ImageRecord(reduction.grid, source, [KIND_NAMES[k] for k in kind], groups))


def reorder_pictures(tokens: list[int], order: list[int]) -> None:
    """Put the images recorded since the last decoder pass into the order in which they stand in the prompts.

    Args:
        tokens: how many each picture (one image, or the frames of a video) handed on, as they were recorded.
        order: the numbers of the pictures in the order of their places.
    """
    for active in _active():
        active.reorder(tokens, order)


def record_pass(segments: list[LayerCount]) -> None:
    """Add the counts of one decoder pass to every active trace."""
    for active in _active():
        active.passes.append(segments)


def share_last_pass(rows: list[int], added: list[int]) -> None:
    """Replace the last pass of every active trace by one of samples that share its rows.

    Args:
        rows: the row of each sample.
        added: tokens of each sample that run after what its row holds; none of them is visual.
    """
    for active in _active():
        if not active.passes:
            continue
        active.passes[-1] = [
            LayerCount(
                segment.start,
                segment.stop,
                [segment.visual[row] for row in rows],
                [segment.tokens[row] + more for row, more in zip(rows, added, strict=True)],
                segment.padded_length + max(added),
            )
            for segment in active.passes[-1]
        ]


class DropRecorder:
    """Maps what stage 2 keeps back to images, for the traces that are active when a decoder pass starts.

    The images of a batch stand in the order of their visual positions; a text-only sample may bring one placeholder
    image that has no position (training batches do).

    Args:
        visual_BL: [B, L] visual positions that enter the first layer.
    """

    def __init__(self, visual_BL: Tensor) -> None:
        traces = [active for active in _active() if active.record_images]
        self._images = [image for active in traces for image in active.claim(visual_BL)]
        self._visual = visual_BL.cpu() if self._images else None

    def record_merges(self, layer: int, state: TokenState, merged_into: Tensor | None) -> None:
        """Store which tokens were averaged into which, before the state is gathered. Shapes: merged_into [B, L]."""
        if self._visual is None or merged_into is None:
            return
        origin, into = state.origin.cpu(), merged_into.cpu()
        number = (self._visual.flatten().cumsum(0) - 1).view(self._visual.shape)
        rows, columns = (into >= 0).nonzero(as_tuple=True)
        tokens = number[rows, origin[rows, columns]].tolist()
        targets = number[rows, origin[rows, into[rows, columns]]].tolist()
        for image, start in self._images:
            mine = {
                token - start: target - start
                for token, target in zip(tokens, targets, strict=True)
                if start <= token < start + len(image.source)
            }
            image.merged_after[layer] = mine

    def record(self, layer: int, state: TokenState) -> None:
        """Store which tokens of each image are still there after ``layer`` layers."""
        if self._visual is None:
            return
        rows, columns = state.visual.cpu().nonzero(as_tuple=True)
        alive = self._visual.new_zeros(self._visual.shape)
        alive[rows, state.origin.cpu()[rows, columns]] = True
        flags = alive[self._visual].tolist()
        for image, start in self._images:
            mine = flags[start : start + len(image.source)]
            image.kept_after[layer] = [index for index, flag in enumerate(mine) if flag]
