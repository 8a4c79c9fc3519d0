"""Vision reducers: tower features in, fewer tokens out. One file in this package is one method.

A reducer is a callable ``reduce(tower, config) -> VisionReduction`` registered by name with
``@VISION_REDUCERS.register("name")``. It hands on ``config.entering`` tokens per image and looks at no other image. One
with a method ``resize(pixel_values, config, patch_size)`` changes the pictures before the tower sees them; one with a
method ``encode(blocks, hidden, class_token, grid, config)`` runs the tower's blocks itself.

Attributes of a reducer that say more, all False unless set:
    adaptive: it finds the number of tokens by itself, image by image, and sets ``VisionReduction.counts``.
    shares_tiles: it may share a budget between the passes of one picture, by ``TowerOutput.tiles``.
    reads_question: it gets ``TowerOutput.question``.
    reads_next_block: it calls ``TowerOutput.next_signals``.
    reads_projection: it calls ``TowerOutput.project``, so its choice changes while a projector learns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duet.registry import Registry
from duet.signals import TowerSignals
from duet.tokens import compaction_index, gather_tokens, on_device

if TYPE_CHECKING:
    from duet.config import DuetConfig
    from duet.question import Question

CLASS_TOKEN, DOMINANT, CONTEXTUAL, NEWLINE = 0, 1, 2, 3
KIND_NAMES = ("class", "dominant", "contextual", "newline")


@dataclass(frozen=True)
class TowerOutput:
    """What a reducer gets: the features of one tower block and the signals of that block.

    Attributes:
        features: [B, M, D], the class token first when there is one.
        signals: attention signals of the block that made the features.
        class_token: whether token 0 is a class token.
        grid: (rows, columns) of patches.
        pixels: [B, 3, height, width], what the tower saw.
        next_block: the block that would run next, None after the last one.
        project: the model's projector, [.., D] to the language model's width; None where the caller has none.
        tiles: (rows, columns) of tiles of each picture. A picture takes one pass as a whole, then one for each tile,
            row by row; (0, 0) is a picture without tiles. None: every pass is a picture of its own.
        question: what is asked about each pass; None where the caller has no question.
        first: the tower's first block and its input [B, M, D].
    """

    features: Tensor
    signals: TowerSignals
    class_token: bool
    grid: tuple[int, int]
    pixels: Tensor
    next_block: Any = None
    project: Callable[[Tensor], Tensor] | None = None
    tiles: Sequence[tuple[int, int]] | None = None
    question: Question | None = None
    first: tuple[Any, Tensor] | None = None

    @property
    def patches(self) -> Tensor:
        """Patch features, [B, N, D]."""
        return self.features[:, 1:] if self.class_token else self.features

    def embedded(self) -> Tensor:
        """Return projected patches (tower features where no projector is known), [B, N, W] in fp32."""
        return (self.patches if self.project is None else self.project(self.patches)).float()

    def select(self, index_B: Tensor) -> TowerOutput:
        """Return the passes with the given numbers, every one a picture of its own."""
        index = index_B.to(self.features.device)
        return replace(
            self,
            features=self.features[index],
            signals=self.signals.select(index),
            pixels=self.pixels[index],
            tiles=None,
            question=None if self.question is None else self.question.select(index),
            first=None if self.first is None else (self.first[0], self.first[1][index]),
        )

    def next_signals(self) -> TowerSignals:
        """Return the signals of the block that would run next.

        Raises:
            ValueError: the features come from the last block.
        """
        if self.next_block is None:
            raise ValueError("this method reads the tower block after the features; select an earlier vision layer")
        return block_signals(self.next_block, self.features, self.class_token)

    def first_signals(self) -> TowerSignals:
        """Return the signals of the tower's first block."""
        assert self.first is not None, "the tower's first block was not handed over"
        return block_signals(*self.first, self.class_token)

    def image_numbers(self) -> Tensor:
        """Return a number per image that its pixels' bits alone decide, for choices at random. Shapes: [B] int64."""
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.pixels.element_size()]
        flat = self.pixels.detach().contiguous().view(bits).flatten(1).long()
        return (flat * (torch.arange(flat.shape[1], device=flat.device) % 8191 + 1)).sum(1)


@torch.no_grad()
def block_signals(block: Any, hidden: Tensor, class_token: bool) -> TowerSignals:
    """Return the signals of a tower block from its input [B, M, D]; detached, since nothing learns to rank."""
    return TowerSignals(block.layer_norm1(hidden.detach()), block.self_attn, class_token)


@dataclass(frozen=True)
class VisionReduction:
    """What a reducer returns, with the fate of every patch.

    Attributes:
        tokens: [B, K, D].
        source: [B, K] patch index of each token (for a contextual token its centre), -1 for the class token.
        kind: [K] (or [B, K] where images differ) one of CLASS_TOKEN, DOMINANT, CONTEXTUAL.
        members: [B, C, W] patches that each of an image's last C (contextual) tokens averages, padded with -1; or
            [B, K, W] of every token, empty for one that is no average, where those stand in another order.
        grid: (rows, columns) of patches.
        counts: [B] tokens of each image, which stand in front of padding; None where every image has all K.
        passes: tower passes that each image stands for; a video that was merged over time stands for all its frames.
    """

    tokens: Tensor
    source: Tensor
    kind: Tensor
    members: Tensor
    grid: tuple[int, int] = (0, 0)
    counts: Tensor | None = None
    passes: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether every patch was handed on as it was. Known without looking at a device."""
        patches = self.grid[0] * self.grid[1]
        return self.counts is None and not self.members.numel() and self.source.shape[1] >= patches > 0

    def per_image(self, values_BKX: Tensor) -> list[Tensor]:
        """Return each image's rows of a tensor that is laid out as ``tokens``, without padding."""
        if self.counts is None:
            return list(values_BKX)
        return [row[:count] for row, count in zip(values_BKX, self.counts.tolist(), strict=True)]

    def members_of_tokens(self) -> Tensor:
        """Return the patches that every token averages, padded with -1; none of one that is no average.

        Shapes: returns [B, K, W].
        """
        tokens, rows, width = self.source.shape[1], *self.members.shape[1:]
        if rows in (0, tokens):
            return self.members if rows else self.source.new_full((len(self.source), tokens, width), -1)
        ends = torch.full_like(self.source[:, 0], tokens) if self.counts is None else self.counts
        row = torch.arange(tokens, device=ends.device) - (ends - rows).unsqueeze(1)
        found = gather_tokens(self.members, row.clamp(0, rows - 1))
        return found.masked_fill(((row < 0) | (row >= rows)).unsqueeze(2), -1)

    def members_per_image(self) -> list[Tensor]:
        """Return each image's ``members``, [C, W], of its last tokens or of all of them, without padding."""
        of_all = self.members.shape[1] == self.source.shape[1]
        return self.per_image(self.members) if of_all else list(self.members)

    def places(self, patches: int, class_token: bool) -> list[Tensor]:
        """Return which of an unreduced picture's tokens each token stands for, [K] of each image.

        Args:
            patches: of the unreduced picture.
            class_token: whether the class token comes first there. A token that belongs to no patch stands for the
                first token.

        Raises:
            ValueError: the reducer looked at a smaller picture, whose patches are others.
        """
        if self.grid[0] * self.grid[1] != patches:
            raise ValueError(
                f"positions='patch' needs all {patches} patches of a picture, but this vision reducer looked at "
                f"{self.grid[0]} x {self.grid[1]}; take positions='auto'"
            )
        return self.per_image((self.source + int(class_token)).clamp(min=0))

    @classmethod
    def identity(cls, features: Tensor, class_token: bool, grid: tuple[int, int]) -> VisionReduction:
        """Return the reduction that keeps all M tokens of ``features`` [B, M, D]."""
        batch, count, _ = features.shape
        device = features.device
        source = torch.arange(count, device=device).expand(batch, -1) - int(class_token)
        kind = torch.full((count,), DOMINANT, device=device)
        if class_token:
            kind[0] = CLASS_TOKEN
        return cls(features, source, kind, source.new_empty(batch, 0, 0), grid)


def class_attention(signals: TowerSignals) -> Tensor:
    """Return how much the class token attends to each patch, summed over heads. Shapes: [B, N].

    A tower without a class token is ranked by column mass, as DUET-VLM's released code does for Qwen2.5-VL.
    """
    return signals.class_row().sum(1) if signals.class_token else signals.column_mass()


def kinds(device: torch.device, dominant: int, contextual: int, class_token: int = 0) -> Tensor:
    """Return the kinds of so many tokens: the class token first, then dominant, then contextual ones. Shapes: [K]."""
    values = [CLASS_TOKEN] * class_token + [DOMINANT] * dominant + [CONTEXTUAL] * contextual
    return on_device(values, device)


def keep_patches(tower: TowerOutput, index_BK: Tensor) -> VisionReduction:
    """Return the reduction that keeps the given patches [B, K], in raster order, and nothing of the others."""
    index = index_BK.sort(dim=1).values
    kind = torch.full((index.shape[1],), DOMINANT, device=index.device)
    return VisionReduction(gather_tokens(tower.patches, index), index, kind, index.new_empty(len(index), 0, 0))


def keep_marked(tower: TowerOutput, keep_BN: Tensor) -> VisionReduction:
    """Return the reduction that keeps the marked patches of each image, in raster order; padded tokens are zero.

    Shapes: keep [B, N] bool; K is the largest number of marks of an image.
    """
    counts = keep_BN.sum(1)
    index = compaction_index(keep_BN, int(counts.max()), left_padded=False)
    real = keep_BN.gather(1, index)
    tokens = gather_tokens(tower.patches, index) * real.unsqueeze(-1)
    kind = torch.full((index.shape[1],), DOMINANT, device=index.device)
    return VisionReduction(tokens, index.where(real, -1), kind, index.new_empty(len(index), 0, 0), counts=counts)


def keep_clusters(tokens_BKD: Tensor, belongs_BKN: Tensor) -> VisionReduction:
    """Return the reduction whose tokens stand for clusters, ordered by each cluster's first patch.

    Shapes: tokens [B, K, D]; belongs [B, K, N] bool, the patches of each token.
    """
    _, tokens, patches = belongs_BKN.shape
    width = patches - tokens + 1  # of the largest cluster that there can be; the real one would have to be waited for
    members = belongs_BKN.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :width]
    members = members.masked_fill(~belongs_BKN.gather(2, members), patches)
    order = members[..., 0].argsort(dim=1)
    members = gather_tokens(members, order)
    kind = torch.full((order.shape[1],), CONTEXTUAL, device=order.device)
    return VisionReduction(
        gather_tokens(tokens_BKD, order), members[..., 0], kind, members.masked_fill(members == patches, -1)
    )


def in_raster_order(reduction: VisionReduction) -> VisionReduction:
    """Return the same tokens in the order of their sources; padding stays behind them.

    ``members`` has a row for every token then, empty for one that is no average.
    """
    source, members = reduction.source, reduction.members
    if reduction.counts is not None:
        padding = torch.arange(source.shape[1], device=source.device) >= reduction.counts.unsqueeze(1)
        source = source.masked_fill(padding, torch.iinfo(source.dtype).max)
    order = source.argsort(dim=1, stable=True)
    if members.numel():
        members = gather_tokens(reduction.members_of_tokens(), order)
    return replace(
        reduction,
        tokens=gather_tokens(reduction.tokens, order),
        source=reduction.source.gather(1, order),
        kind=reduction.kind.expand_as(source).gather(1, order),
        members=members,
    )


VisionReducer = Callable[[TowerOutput, "DuetConfig"], VisionReduction]
VISION_REDUCERS: Registry[VisionReducer] = Registry("vision reducer", "duet.stage1")


def runs_tower_itself(name: str) -> bool:
    """Return whether a vision reducer changes pictures or tower blocks, so that it cannot start from features."""
    reducer = VISION_REDUCERS.get(name)
    return hasattr(reducer, "resize") or hasattr(reducer, "encode")
