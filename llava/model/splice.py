"""Put image features where the prompt says `<image>`: the data flow of LLaVA's splice, one small function a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from duet.tokens import Counts, on_device
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class Knowledge:
    """What is known of spliced embeddings; goes wherever their tensor goes. See `SplicedInputs`.

    Attributes:
        visual_mask: [B, L] bool.
        next_position: [B] or None.
        labels: [B, L] or None; they say which positions are answers, also to callers that compute their own loss.
    """

    visual_mask: Tensor
    next_position: Tensor | None = None
    labels: Tensor | None = None


def remember(embeds: Tensor, knowledge: Knowledge) -> None:
    """Let a tensor of embeddings [B, L, D] bring along what is known of it. Copies and parts of it know nothing."""
    embeds._llava_knowledge = knowledge  # type: ignore[attr-defined]


def knowledge_of(embeds: Tensor | None) -> Knowledge | None:
    """Return what a tensor of embeddings brings along, or None."""
    return getattr(embeds, "_llava_knowledge", None)


class SplicedInputs(tuple):
    """The 6-tuple that LLaVA's splice returns, with the visual positions as an extra attribute.

    The tensor of embeddings brings them along, too, for callers that hand on nothing else.

    Attributes:
        visual_mask: [B, L] bool, True where a position came from a picture; None when nothing was spliced.
        next_position: [B] the position of the token that follows each row, where it is not one after the last.
        counts: How many tokens and visual tokens each row has.
    """

    visual_mask: Tensor | None
    next_position: Tensor | None
    counts: Counts | None

    def __new__(
        cls,
        values,
        visual_mask: Tensor | None = None,
        next_position: Tensor | None = None,
        counts: Counts | None = None,
    ):
        """Make the tuple and hang the rest on it."""
        spliced = super().__new__(cls, values)
        spliced.visual_mask = visual_mask
        spliced.next_position = next_position
        spliced.counts = counts
        embeds, labels = values[4:6]
        if embeds is not None and visual_mask is not None:
            remember(embeds, Knowledge(visual_mask, next_position, labels))
        return spliced


class Row(NamedTuple):
    """One sample after splicing, without padding. Labels and marks are on the host, the rest on the model's device."""

    embeds: Tensor  # [L, D]
    labels: Tensor  # [L]
    visual: Tensor  # [L] bool
    positions: Tensor  # [L]
    end: int  # the position that follows


class Places(NamedTuple):
    """Where the tokens of the pictures were before something was taken out of them."""

    tokens: list[Tensor]  # of each picture, [K]
    length: int  # tokens of an unreduced picture


class Batch(NamedTuple):
    """Samples padded to one length."""

    embeds: Tensor  # [B, L, D]
    labels: Tensor  # [B, L]
    visual: Tensor  # [B, L] bool
    mask: Tensor  # [B, L] bool
    positions: Tensor  # [B, L]
    ends: Tensor  # [B], the position that follows each sample
    counts: Counts


def image_slots(input_ids: Tensor) -> list[int]:
    """Count the image slots of every row of `input_ids` [B, T]."""
    return (input_ids == IMAGE_TOKEN_INDEX).sum(dim=1).tolist()


def assign_features(slots: list[int], num_features: int) -> list[list[int]]:
    """Say which picture goes to which row.

    Args:
        slots: image slots of every row.
        num_features: how many pictures were encoded.

    Returns:
        For every row the indices of the pictures that it consumes. A text-only row consumes the placeholder picture
        that a training batch carries for it, if there is one.

    Raises:
        ValueError: The numbers of pictures and slots disagree; the message names the rows.
    """
    wanted = sum(slots)
    text_rows = slots.count(0)
    if num_features not in (wanted, wanted + text_rows):
        raise ValueError(_mismatch(slots, num_features, wanted, text_rows))
    placeholders = num_features != wanted
    rows, start = [], 0
    for count in slots:
        used = max(count, 1) if placeholders else count
        rows.append(list(range(start, start + used)))
        start += used
    return rows


def _mismatch(slots: list[int], given: int, wanted: int, text_rows: int) -> str:
    listed = ", ".join(f"row {row}: {count}" for row, count in enumerate(slots))
    expected = (
        f"{wanted}" if not text_rows else f"{wanted}, or {wanted + text_rows} with one placeholder per text-only row"
    )
    short = ""
    if given < wanted:
        seen = 0
        for row, count in enumerate(slots):
            seen += count
            if seen > given:
                short = f" The pictures run out in row {row}."
                break
    return (
        f"{given} picture(s) were given but the prompts' <image> marks need {expected} ({listed})."
        f"{short} Give as many pictures as there are <image> marks, in the same order."
    )


def embed_text(rows: list[Tensor], embed: nn.Module, device: torch.device) -> list[Tensor]:
    """Embed the text tokens of all rows in one call.

    One call, because under ZeRO-3 every rank must call every module equally often, whatever its batch is.

    Args:
        rows: token ids [T_i] of each sample, image slots included.
        embed: the embedding table.
        device: where it takes ids.

    Returns:
        For each row [T_i - slots_i, D].
    """
    texts = [ids[ids != IMAGE_TOKEN_INDEX] for ids in rows]
    joined = torch.cat(texts).to(device, non_blocking=True)
    return list(embed(joined).split([len(text) for text in texts]))


def splice_row(ids: Tensor, labels: Tensor, features: list[Tensor], text: Tensor, places: Places | None = None) -> Row:
    """Replace every image slot of one sample by its features.

    Args:
        ids: [T] token ids with `IMAGE_TOKEN_INDEX` in the slots, on the host.
        labels: [T], on the host.
        features: one [K, D] per slot. A row without slots may bring one placeholder, of which it takes nothing, so
            that the projector stays in the graph of a text-only batch.
        text: [T - slots, D], the embedded text tokens.
        places: count positions as if no picture had been reduced; None counts what is there.

    Shapes: L = T - slots + sum of K.
    """
    slots = (ids == IMAGE_TOKEN_INDEX).nonzero(as_tuple=True)[0].tolist()
    features = [feature.to(device=text.device, dtype=text.dtype) for feature in features]
    if not slots:
        embeds = torch.cat([text, *(feature[:0] for feature in features)])
        nothing = torch.zeros(len(embeds), dtype=torch.bool)
        return Row(embeds, labels, nothing, torch.arange(len(embeds), device=text.device), len(embeds))
    lengths = [stop - start for start, stop in zip([-1, *slots], [*slots, len(ids)], strict=True)]
    pieces = text.split([length - 1 for length in lengths])
    label_pieces = [labels[start + 1 : stop] for start, stop in zip([-1, *slots], [*slots, len(ids)], strict=True)]
    embeds, new_labels, visual, positions, start = [], [], [], [], 0
    for index, piece in enumerate(pieces):
        embeds.append(piece)
        positions.append(torch.arange(start, start + len(piece), device=text.device))
        start += len(piece)
        new_labels.append(label_pieces[index])
        visual.append(torch.zeros(len(piece), dtype=torch.bool))
        if index < len(features):
            count = len(features[index])
            embeds.append(features[index])
            new_labels.append(torch.full((count,), IGNORE_INDEX, dtype=labels.dtype))
            visual.append(torch.ones(count, dtype=torch.bool))
            taken = torch.arange(count, device=text.device) if places is None else places.tokens[index].to(text.device)
            positions.append(taken + start)
            start += count if places is None else places.length
    return Row(torch.cat(embeds), torch.cat(new_labels), torch.cat(visual), torch.cat(positions), start)


def truncate(rows: list[Row], limit: int | None) -> list[Row]:
    """Cut rows that are longer than `limit` positions; None keeps them."""
    if limit is None:
        return rows
    return [
        Row(row.embeds[:limit], row.labels[:limit], row.visual[:limit], row.positions[:limit], row.end) for row in rows
    ]


def pad(rows: list[Row], side: str) -> Batch:
    """Pad rows to the longest on `side` ("left" or "right"), with masks and positions to match."""
    lengths = [len(row.labels) for row in rows]
    length, device = max(lengths), rows[0].embeds.device
    padded = []
    for row in rows:
        gap = length - len(row.labels)
        sides = (gap, 0) if side == "left" else (0, gap)
        # Padding by concatenation keeps the graph of the embeddings.
        padded.append(
            (
                nn.functional.pad(row.embeds, (0, 0, *sides)),
                nn.functional.pad(row.labels, sides, value=IGNORE_INDEX),
                nn.functional.pad(row.visual, sides),
                nn.functional.pad(torch.ones_like(row.visual), sides),
                nn.functional.pad(row.positions, sides),
            )
        )
    embeds, labels, visual, mask, positions = (
        torch.stack(field).to(device, non_blocking=True) for field in zip(*padded, strict=True)
    )
    counts = Counts(lengths, [int(row.visual.sum()) for row in rows], side == "left" and min(lengths) < length)
    return Batch(embeds, labels, visual, mask, positions, on_device([row.end for row in rows], device), counts)


def to_left_padding(mask: Tensor, *tensors: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """Move every row's valid positions to the right end, in order.

    Generation continues at the end of a row, so padding must be in front whatever side training pads on.

    Args:
        mask: [B, L], nonzero where a position is valid.
        *tensors: [B, L, ...] to be moved alike; None stays None.

    Returns:
        The mask and the tensors, rearranged.
    """
    order = torch.argsort(mask.to(torch.int8), dim=1, stable=True)
    moved: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is None:
            moved.append(None)
            continue
        index = order.to(tensor.device).view(*order.shape, *[1] * (tensor.dim() - 2)).expand_as(tensor)
        moved.append(tensor.gather(1, index))
    return mask.gather(1, order), moved
