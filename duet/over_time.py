"""Stage 1 across the frames of a video: what repeats earlier frames at the same place is merged over time.

Memory and time are linear in the number of frames, and how many tokens stay is known before any value is.
Shapes: F frames, N patches of a frame, M tokens of all frames, K tokens that stay, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from duet import tracing
from duet.stage1 import CLASS_TOKEN, CONTEXTUAL, VisionReduction
from duet.tokens import rank_descending

_ENTRIES_AT_ONCE = 2**20  # of the tables that compare tokens with places; bounds memory


def merge_over_time(frames: Sequence[VisionReduction], keep: int | float) -> VisionReduction:
    """Merge tokens that repeat what earlier frames show at their place, until so many of the video are left.

    A token's forerunner is the last token at the place nearest to its own of all that earlier frames gave tokens to.
    Both are as alike as their cosine (at least 0), divided by one plus their distance in patches, so that something
    that moves stays new where it arrives. The ``K`` tokens that are least like their forerunners stay, at their places
    in the order of time, those of the first frame among them. Every other one is averaged, with equal weight, into
    the token that its forerunner stayed as or went into. Class tokens have a place of their own.

    Args:
        frames: one result per frame, in the order of time, each of one image.
        keep: how many tokens stay, as a count or as a share; the first frame keeps its own under any share.

    Returns:
        The video as one image, frame below frame: a patch is ``frame * N + patch``. A token that averages is
        contextual; ``members`` (a row for every token, empty for one that stayed as it was) are listed while a trace
        wants images.

    Raises:
        ValueError: the count is below what the first frame has.
    """
    sizes = [frame.source.shape[1] for frame in frames]
    count = tokens_left(keep, sizes)
    rows, columns = frames[0].grid
    tokens = torch.cat([frame.tokens[0] for frame in frames])
    place = torch.cat([frame.source[0] for frame in frames])
    kind = torch.cat([frame.kind.flatten() for frame in frames])
    number = torch.tensor(sizes, device=place.device)
    frame = torch.arange(len(sizes), device=place.device).repeat_interleave(number, output_size=len(place))

    before, distance = forerunners(frame, place, len(frames), (rows, columns))
    kept = _least_alike(_alike(tokens, before, distance), count)
    slot = _slots(kept, before, len(frames))
    order = torch.sort(slot, stable=True).indices
    ends = torch.searchsorted(slot[order], torch.arange(count + 1, device=slot.device))
    lengths = ends.diff()
    merged = torch.segment_reduce(tokens[order].float(), "mean", lengths=lengths, axis=0, unsafe=True)

    kind = torch.where((lengths > 1) & (kind[kept] != CLASS_TOKEN), CONTEXTUAL, kind[kept])
    source = torch.where(place[kept] < 0, -1, place[kept] + frame[kept] * (rows * columns))
    members = source.new_empty(1, 0, 0)
    if tracing.wants_images():
        members = _members(frames, slot.tolist(), count).to(source.device)
    return VisionReduction(
        merged.to(tokens.dtype)[None], source[None], kind, members, (rows * len(frames), columns), passes=len(frames)
    )


def tokens_left(keep: int | float, sizes: Sequence[int]) -> int:
    """Return how many tokens of a video stay whose frames have so many each.

    Raises:
        ValueError: the count is below what the first frame has.
    """
    first, total = next(filter(None, sizes), 0), sum(sizes)
    if isinstance(keep, float):
        return max(first, round(keep * total))
    if keep < first:
        raise ValueError(
            f"across_frames = {keep} tokens cannot hold the first frame of a video, of which stage 1 leaves {first}; "
            "raise it, or lower dominant or contextual"
        )
    return min(keep, total)


@torch.no_grad()
def forerunners(frame_M: Tensor, place_M: Tensor, frames: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return for each token the last one at the nearest place that an earlier frame gave a token to.

    Args:
        frame_M: the frame of each token.
        place_M: its patch, -1 for a class token.
        frames: how many there are.
        grid: rows and columns of patches.

    Returns:
        Forerunners [M], -1 where no earlier frame has a token, and distances [M] in patches (the larger of rows and
        columns). Ties go to the lower patch.
    """
    places = grid[0] * grid[1] + 1  # the last one is the class token's, far from all others
    patch = torch.arange(places, device=place_M.device)
    row, column = patch // grid[1], patch % grid[1]
    row[-1] = -sum(grid)
    place = place_M.remainder(places)
    number = torch.arange(len(place), device=place.device)
    last = number.new_full((frames * places,), -1).scatter_reduce(0, frame_M * places + place, number, "amax")
    last = functional.pad(last.view(frames, places)[:-1].cummax(0).values, (0, 0, 1, 0), value=-1)

    found, distances = [], []
    for some in _parts(len(place), places):
        here, seen = place[some, None], last[frame_M[some]]
        distance = torch.maximum((row[here] - row).abs(), (column[here] - column).abs())
        key = (distance * places + patch).masked_fill(seen < 0, torch.iinfo(patch.dtype).max)
        nearest = key.argmin(1, keepdim=True)  # keys of places with a token differ
        found.append(seen.gather(1, nearest).squeeze(1))
        distances.append(distance.gather(1, nearest).squeeze(1))
    return torch.cat(found), torch.cat(distances)


@torch.no_grad()
def _alike(tokens: Tensor, before_M: Tensor, distance_M: Tensor) -> Tensor:
    """Return how much each token is like its forerunner, from 0 to 1; -1 without one. Shapes: [M, D] -> [M] fp32."""
    cosines = [
        functional.cosine_similarity(tokens[some].float(), tokens[before_M[some]].float(), dim=-1)
        for some in _parts(*tokens.shape)
    ]
    return (torch.cat(cosines).clamp(min=0) / (1 + distance_M)).masked_fill(before_M < 0, -1.0)


def _least_alike(alike_M: Tensor, count: int) -> Tensor:
    """Return the ``count`` tokens that are least like their forerunners, in their order. Shapes: [M] -> [K]."""
    return rank_descending(-alike_M)[:count].sort().values


def _slots(kept_K: Tensor, before_M: Tensor, frames: int) -> Tensor:
    """Return which of the kept tokens each token is part of, following forerunners. Shapes: [M]."""
    into = before_M.clone()
    into[kept_K] = kept_K
    for _ in range(max(1, frames - 1).bit_length()):  # each round doubles how far back a token has been followed
        into = into[into]
    return torch.searchsorted(kept_K, into)


def _parts(count: int, width: int) -> Iterator[slice]:
    step = max(1, _ENTRIES_AT_ONCE // width)
    return (slice(start, start + step) for start in range(0, count, step))


def _members(frames: Sequence[VisionReduction], slots: list[int], count: int) -> Tensor:
    """Return the patches of the video that each token averages, padded with -1; none for one that is a patch itself.

    Shapes: [1, K, W].
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    parts, number = [0] * count, 0
    for at, frame in enumerate(frames):
        first = at * frame.grid[0] * frame.grid[1]
        for patch, cluster in zip(frame.source[0].tolist(), frame.members_of_tokens()[0].tolist(), strict=True):
            averaged = [member for member in cluster if member >= 0]
            groups[slots[number]] += [first + member for member in averaged or [patch] if member >= 0]
            parts[slots[number]] += max(1, len(averaged))
            number += 1
    groups = [group if averaged > 1 else [] for group, averaged in zip(groups, parts, strict=True)]
    width = max(map(len, groups))
    return torch.tensor([[group + [-1] * (width - len(group)) for group in groups]], dtype=torch.long)
