"""A batch of prompts, whose placeholders shrink to the tokens that stage 1 made. Shared by all families.

Shapes: B batch, L sequence as the processor made it (one placeholder per unreduced token), I images (or videos) of one
kind over the whole batch in the order in which their placeholders stand, K tokens of one image, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duet.tokens import IGNORE_INDEX, Counts, compact_positions, compaction_index, gather_tokens, on_device

if TYPE_CHECKING:
    from duet.question import Question


@dataclass(frozen=True)
class Prompt:
    """What enters the decoder.

    Attributes:
        inputs_embeds: [B, L, D], or ids [B, L] that ``embed`` turns into those when placeholders have shrunk: a long
            video has very many.
        attention_mask: [B, L], or None when nothing is padding.
        position_ids: [B, L], or [A, B, L] for multi-axis positions; None numbers the tokens of each sample from 0.
        visual_mask: [B, L] bool, the positions that hold visual tokens; None before they are inserted.
        labels: [B, L] or None.
        answer_mask: [B, L] bool, positions that must not rank; None where labels say so.
        next_position: [B], the rotary position of the token that follows each sample; None is one after its largest.
        additions: [B, L, D] each, what the outputs of the decoder's first layers get added; zero where nothing is.
        embed: ids to embeddings, while ``inputs_embeds`` holds ids.
        counts: how many tokens and visual tokens each sample has, where somebody has looked.
        origin: [B, L] which position of the processor's prompt each one was, -1 for padding; None while all are there.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    visual_mask: Tensor | None = None
    labels: Tensor | None = None
    answer_mask: Tensor | None = None
    next_position: Tensor | None = None
    additions: Sequence[Tensor] = ()
    embed: Callable[[Tensor], Tensor] | None = None
    counts: Counts | None = None
    origin: Tensor | None = None

    def embedded(self) -> Prompt:
        """Return the prompt with embeddings."""
        return self if self.embed is None else replace(self, inputs_embeds=self.embed(self.inputs_embeds), embed=None)


@dataclass(frozen=True)
class Encoded:
    """The visual tokens of all images of one kind, one image after the other.

    Attributes:
        tokens: [sum of K, D].
        counts: K of each image.
        offsets: [sum of K] which of its image's placeholders each token takes, ascending within an image; None takes
            the first ones. It matters only where positions were given for the placeholders.
        additions: [sum of K, D] each, what is added to the tokens after the decoder's first layers (DeepStack).
        places: [sum of K] which of its image's placeholders each token stands for, in any order; where given, positions
            are counted as if nothing had been taken out (``positions="patch"``).
        extra: what a family wants to hand on to the decoder besides.
    """

    tokens: Tensor
    counts: list[int]
    offsets: Tensor | None = None
    additions: Sequence[Tensor] = ()
    places: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def join(cls, images: Sequence[Tensor], **extra: Any) -> Encoded:
        """Return images with K tokens each, [K, D], one after the other."""
        return cls(torch.cat(list(images)), [len(tokens) for tokens in images], extra=extra)


@dataclass(frozen=True)
class Pictures:
    """The images (or the videos) of a batch, before they are encoded.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        token_id: the placeholder in the prompt.
        expected: placeholders of each image.
        rows: the inputs that hold these images -> how many leading rows of the tensor each image has; None means one.
        encode: runs the vision tower, stage 1 and the projector. Its argument is what is asked about each image
            (``duet.question``), None where the vision reducer does not listen.
    """

    kind: str
    token_id: int
    expected: list[int]
    rows: Mapping[str, Sequence[int] | None]
    encode: Callable[[Question | None], Encoded]


def videos_of(model: Any, videos: Tensor, tokens: int, encode: Callable[[Question | None], Encoded]) -> Pictures:
    """Return the videos of a batch, [V, F, 3, height, width], with as many placeholders each as ``tokens`` says."""
    return Pictures(
        kind="video",
        token_id=model.config.video_token_id,
        expected=[tokens] * len(videos),
        rows={"pixel_values_videos": None},
        encode=encode,
    )


def placeholders(model: Any, ids_or_embeds: Tensor, token_id: int) -> Tensor:
    """Return where placeholders stand, [B, L] bool."""
    if ids_or_embeds.dim() == 2:
        return ids_or_embeds == token_id
    wanted = model.get_input_embeddings()(torch.tensor(token_id, device=ids_or_embeds.device))
    return (ids_or_embeds == wanted).all(-1)


def look(marks: Sequence[Tensor], attention_mask: Tensor | None) -> tuple[list[list[int]], Counts | None]:
    """Count the placeholders of each kind of picture and the tokens of each sample; the one look at a prompt.

    It comes before the towers run, so nothing that they do is waited for. A mask that is not [B, L] says nothing about
    tokens; then the second result is None. Shapes: marks [B, L] each.

    Raises:
        ValueError: the mask hides placeholders.
    """
    sums = [mark.sum(1) for mark in marks]
    if attention_mask is not None and attention_mask.shape != marks[0].shape:
        return torch.stack(sums).tolist(), None
    valid = None if attention_mask is None else attention_mask.bool()
    any_mark = torch.stack(list(marks)).any(0)
    hidden = (torch.zeros_like(any_mark) if valid is None else any_mark & ~valid).sum(1)
    unseen, *found = torch.stack([hidden, *sums, *Counts.sums(valid)]).tolist()
    by_kind, rest = found[: len(marks)], found[len(marks) :]
    if any(unseen):
        raise ValueError(
            f"attention_mask is 0 at {_listed(unseen)} image or video placeholder tokens of the samples; every "
            "placeholder is filled with a visual token, so the mask must be 1 there"
        )
    visual = [sum(counts) for counts in zip(*by_kind, strict=True)]
    return by_kind, Counts.of(visual, rest, any_mark.shape[1])


def owners(counts: Sequence[int], pictures: Pictures) -> list[int]:
    """Return the sample that each of I images belongs to.

    Args:
        counts: placeholders in each sample.
        pictures: what was given.

    Raises:
        ValueError: a sample does not hold all placeholders of its images.
    """
    found, image = [], 0
    for row, given in enumerate(counts):
        count = given
        while count > 0 and image < len(pictures.expected):
            count -= pictures.expected[image]
            found.append(row)
            image += 1
        if count != 0:
            break
    else:
        if image == len(pictures.expected):
            return found
    sizes = sorted(set(pictures.expected))
    needs = f"{sizes[0]} of them" if len(sizes) == 1 else f"{_listed(pictures.expected)} of them, in that order, each"
    raise ValueError(
        f"{len(pictures.expected)} {pictures.kind}(s) were given, but the samples hold {_listed(counts)} "
        f"{pictures.kind} placeholder tokens; every {pictures.kind} needs {needs} in one sample (the processor writes "
        "them), before DUET shrinks them"
    )


def first_places(marks: Tensor, pictures: Pictures) -> list[int]:
    """Return where the first placeholder of each image stands in the flattened batch. Shapes: marks [B, L]."""
    starts = torch.tensor([0, *accumulate(pictures.expected)][:-1])
    return marks.flatten().nonzero()[:, 0].cpu()[starts].tolist()


def shrunk_counts(
    before: Counts | None, kinds: Sequence[tuple[Pictures, Tensor, Encoded]], owners: Sequence[list[int]]
) -> Counts | None:
    """Return the numbers of a batch after its placeholders have shrunk, by arithmetic; None where they are not known.

    Args:
        before: as ``look`` found them.
        kinds: as for ``insert``.
        owners: of each kind, the sample that each picture belongs to.
    """
    if before is None:
        return None
    tokens, visual = list(before.tokens), list(before.visual)
    for (pictures, _, encoded), rows in zip(kinds, owners, strict=True):
        for row, expected, count in zip(rows, pictures.expected, encoded.counts, strict=True):
            tokens[row] += count - expected
            visual[row] += count - expected
    return replace(before, tokens=tokens, visual=visual)


def insert(prompt: Prompt, kinds: Sequence[tuple[Pictures, Tensor, Encoded]], prompt_length: int | None) -> Prompt:
    """Shrink the placeholders of every image to its tokens, everything else in lockstep, and fill the tokens in.

    Args:
        prompt: as the processor made it; its counts are those that will be there in the end.
        kinds: per kind of picture: what was expected, the marks [B, L] of its placeholders, and its tokens.
        prompt_length: positions from this one on are answers and never rank; None where labels say so.

    Raises:
        ValueError: more tokens than placeholders.
    """
    batch, length = prompt.inputs_embeds.shape[:2]
    device = prompt.inputs_embeds.device
    if prompt_length is not None and prompt_length < length:
        answers = (torch.arange(length, device=device) >= prompt_length).expand(batch, -1)
        prompt = replace(prompt, answer_mask=answers)
    marks = [mark for _, mark, _ in kinds]
    placed = any(encoded.places is not None for _, _, encoded in kinds)
    if placed:
        prompt = _counted_whole(prompt)
    numbers = [None if kind[2].places is None else _numbers(prompt.position_ids, *kind) for kind in kinds]
    if any(encoded.counts != pictures.expected for pictures, _, encoded in kinds):
        kept = [_kept(pictures, mark, encoded) for pictures, mark, encoded in kinds]
        prompt, marks = _shrink(prompt, marks, kept, keep_positions=placed)
    for mark, places in zip(marks, numbers, strict=True):
        if places is not None:
            positions: Any = prompt.position_ids
            prompt = replace(prompt, position_ids=positions.masked_scatter(mark, places))
    prompt = prompt.embedded()
    embeds = prompt.inputs_embeds
    additions = [torch.zeros_like(embeds) for _ in kinds[0][2].additions]
    for mark, (_, _, encoded) in zip(marks, kinds, strict=True):
        embeds = _fill(embeds, mark, encoded.tokens)
        additions = [_fill(x, mark, tokens) for x, tokens in zip(additions, encoded.additions, strict=True)]
    return replace(prompt, inputs_embeds=embeds, additions=additions, visual_mask=torch.stack(marks).any(0))


def _fill(x_BLD: Tensor, mark_BL: Tensor, tokens_KD: Tensor) -> Tensor:
    return x_BLD.masked_scatter(mark_BL.unsqueeze(-1), tokens_KD.to(x_BLD.device, x_BLD.dtype))


def _kept(pictures: Pictures, marks: Tensor, encoded: Encoded) -> Tensor:
    """Mark the placeholders that stay, as many of every image as it has tokens. Shapes: [B, L] -> [B, L]."""
    for count, expected in zip(encoded.counts, pictures.expected, strict=True):
        if count > expected:
            raise ValueError(
                f"stage 1 gives {count} tokens per {pictures.kind}, but a prompt has only {expected} placeholders for "
                "each; lower dominant or contextual"
            )
    total = sum(encoded.counts)
    starts = [0, *accumulate(pictures.expected)][:-1]
    if encoded.offsets is None:  # the first placeholders of each image
        before = [0, *accumulate(encoded.counts)][:-1]
        starts = [start - skipped for start, skipped in zip(starts, before, strict=True)]
        offsets = torch.arange(total, device=marks.device)
    else:
        offsets = encoded.offsets.to(marks.device)
    counts = torch.tensor(encoded.counts, device=marks.device)
    first = torch.tensor(starts, device=marks.device).repeat_interleave(counts, output_size=total)
    keep = torch.zeros(sum(pictures.expected), dtype=torch.bool, device=marks.device)
    keep[first + offsets] = True
    return torch.zeros_like(marks).masked_scatter(marks, keep)


def _counted_whole(prompt: Prompt) -> Prompt:
    """Return the prompt with positions that count all placeholders. Shapes: [B, L], and [B] for the next token."""
    batch, length = prompt.inputs_embeds.shape[:2]
    device = prompt.inputs_embeds.device
    mask = prompt.attention_mask
    valid = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask.bool()
    positions = compact_positions(valid, batch, length, device)
    return replace(prompt, position_ids=positions, next_position=valid.sum(1))


def _numbers(positions: Any, pictures: Pictures, marks: Tensor, encoded: Encoded) -> Tensor:
    """Return the position of each token of ``encoded.places``. Shapes: positions, marks [B, L]; returns [sum of K]."""
    starts = positions[marks][on_device([0, *accumulate(pictures.expected)][:-1], marks.device)]
    places: Any = encoded.places
    return starts.repeat_interleave(on_device(encoded.counts, marks.device), output_size=len(places)) + places


def _shrink(
    prompt: Prompt, marks: list[Tensor], kept: list[Tensor], keep_positions: bool
) -> tuple[Prompt, list[Tensor]]:
    """Drop the placeholders that are not kept and close the gaps."""
    mask, counts = prompt.attention_mask, prompt.counts
    if counts is None:
        shape = None if mask is None else tuple(mask.shape)
        raise ValueError(f"attention_mask must be [batch, length] with DUET, got shape {shape}")
    valid = torch.ones_like(marks[0]) if mask is None else mask.bool()
    keep = (~torch.stack(marks).any(0) | torch.stack(kept).any(0)) & valid
    index = compaction_index(keep, max(counts.tokens), counts.left_padded)
    new_valid = keep.gather(1, index)
    labels = None if prompt.labels is None else prompt.labels.gather(1, index).masked_fill(~new_valid, IGNORE_INDEX)
    answers = None if prompt.answer_mask is None else prompt.answer_mask.gather(1, index) & new_valid
    positions = prompt.position_ids
    if positions is not None and positions.dim() == 3:  # several axes say where a token is
        positions = positions.gather(2, index.expand(len(positions), -1, -1))
    elif positions is not None:  # one axis counts tokens, so it starts again
        positions = positions.gather(1, index) if keep_positions else None
    shrunk = replace(
        prompt,
        inputs_embeds=gather_tokens(prompt.inputs_embeds, index),
        attention_mask=new_valid,
        position_ids=positions,
        labels=labels,
        answer_mask=answers,
        origin=index.masked_fill(~new_valid, -1),
    )
    return shrunk, [mark.gather(1, index) & new_valid for mark in kept]


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"[{shown}{', ...' if len(numbers) > 8 else ''}]"
