"""Questions about one picture share what stands in front of them: system prompt and picture run through the model once.

Exact while nothing that happens to the picture depends on the question: no drop inside the decoder, and no vision
reducer that reads the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet import tracing
from duet.stage1 import VISION_REDUCERS
from duet.versions import CACHE, cache_of
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.splice import to_left_padding


@dataclass(frozen=True)
class Shared:
    """A batch of B prompts as U different beginnings and B endings.

    Attributes:
        prefixes: U beginnings, each up to its last picture.
        pictures: the places of each beginning's pictures in the batch's list.
        owner: the beginning of each prompt.
        suffixes: B endings; none is empty.
    """

    prefixes: list[list[int]]
    pictures: list[list[int]]
    owner: list[int]
    suffixes: list[list[int]]


def find_shared(ids: Sequence[Sequence[int]], pixels: Any) -> Shared | None:
    """Find the beginnings that prompts have in common.

    Args:
        ids: B prompts.
        pixels: their pictures in the order of the marks; one that is shared is one object (`llava.eval.generate.pack`).

    Returns:
        None where no two prompts share a picture, or where a prompt has none or ends with one.
    """
    if not isinstance(pixels, list) or len({id(picture) for picture in pixels}) == len(pixels):
        return None
    places: dict[tuple, int] = {}
    shared, start = Shared([], [], [], []), 0
    for row in ids:
        marks = [place for place, token in enumerate(row) if token == IMAGE_TOKEN_INDEX]
        if not marks or marks[-1] + 1 == len(row):
            return None
        own = list(range(start, start + len(marks)))
        start += len(marks)
        prefix = list(row[: marks[-1] + 1])
        key = (tuple(prefix), tuple(id(pixels[place]) for place in own))
        if key not in places:
            places[key] = len(places)
            shared.prefixes.append(prefix)
            shared.pictures.append(own)
        shared.owner.append(places[key])
        shared.suffixes.append(list(row[marks[-1] + 1 :]))
    return shared if len(places) < len(ids) else None


def depends_on_question(model: Any) -> bool:
    """Whether what is left of a picture depends on the text behind it."""
    config = model.reduction
    if config is None:
        return False
    reads = config.stage1 != "none" and getattr(VISION_REDUCERS.get(config.stage1), "reads_question", False)
    return bool(config.schedule) or reads


def run_prefixes(
    model: Any, shared: Shared, images: list[Tensor], sizes: Sequence[tuple[int, int]], pad: int
) -> dict[str, Any]:
    """Run every beginning once.

    Returns:
        What `generate` needs to go on with all B prompts: `inputs` [B, P + T] (the first P columns stand for the
        cache), `attention_mask` and the cache.
    """
    ids, mask = left_pad(shared.prefixes, pad, model.device)
    places = [place for own in shared.pictures for place in own]
    prepared = model.prepare_inputs_labels_for_multimodal(
        ids, None, mask, None, None, [images[place] for place in places], [sizes[place] for place in places]
    )
    mask, (embeds, visual, positions) = to_left_padding(prepared[2], prepared[4], prepared.visual_mask, prepared[1])
    out = model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=(mask.long().cumsum(1) - 1).clamp(min=0) if positions is None else positions,
        next_position=prepared.next_position,
        counts=prepared.counts.left(),
        visual_mask=visual,
        use_cache=True,
        logits_to_keep=1,
    )
    owner = torch.tensor(shared.owner, device=model.device)
    cache = cache_of(out)
    cache.batch_select_indices(owner)
    tracing.share_last_pass(shared.owner, [len(suffix) for suffix in shared.suffixes])
    ends, end_mask = left_pad(shared.suffixes, pad, model.device)
    held = mask[owner].to(end_mask.dtype)
    return {
        "inputs": torch.cat((torch.full_like(held, pad), ends), dim=1),
        "attention_mask": torch.cat((held, end_mask), dim=1),
        CACHE: cache,
    }


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids of B rows and their mask, both [B, T], padding in front."""
    length = max(map(len, rows))
    padded = [[pad] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)
