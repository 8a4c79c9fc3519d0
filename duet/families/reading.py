"""Reading the pictures of a batch: encode them, and put their tokens in the place of their placeholders.

Shapes: B batch, L sequence, I images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from duet import tracing
from duet.cache import DuetCache
from duet.families.prompt import (
    Encoded,
    Prompt,
    first_places,
    insert,
    look,
    owners,
    placeholders,
    shrunk_counts,
)
from duet.queries import answers_from_labels
from duet.question import Question, asked, is_read, read_question


def read_pictures(
    model: Any, prompt: Prompt, ids_or_embeds: Tensor, inputs: dict, cache: Any, prompt_length: int | None
) -> tuple[Prompt, dict[str, Encoded]]:
    """Encode the images of a batch and put their tokens in the place of their placeholders."""
    family = model._duet.family
    prompt = family.place(model, ids_or_embeds, prompt, inputs, cache)
    found = [(p, placeholders(model, ids_or_embeds, p.token_id)) for p in family.pictures(model, inputs)]
    if found and isinstance(cache, DuetCache) and cache.segments:
        raise ValueError(
            "a reduced cache cannot take new pictures, because nothing is ranked after the prefill; pass the whole "
            "conversation without a cache"
        )
    if prompt_length is not None:
        for _, marks in found:
            marks[:, prompt_length:] = False  # an answer may name a placeholder, but brings no picture
    if not found:
        return prompt.embedded(), {}
    question = _question(model, prompt, ids_or_embeds, [marks for _, marks in found], prompt_length)
    by_kind, counts = look([marks for _, marks in found], prompt.attention_mask)
    rows = [owners(held, pictures) for held, (pictures, _) in zip(by_kind, found, strict=True)]
    kinds = []
    for (pictures, marks), owner in zip(found, rows, strict=True):
        asked_of = None if question is None else question.select(torch.tensor(owner))
        kinds.append((pictures, marks, pictures.encode(asked_of)))
    prompt = replace(prompt, counts=shrunk_counts(counts, kinds, rows))
    if len(kinds) > 1 and tracing.is_active():
        places = [place for pictures, marks, _ in kinds for place in first_places(marks, pictures)]
        sizes = [count for _, _, encoded in kinds for count in encoded.counts]
        tracing.reorder_pictures(sizes, sorted(range(len(places)), key=places.__getitem__))
    return insert(prompt, kinds, prompt_length), {pictures.kind: encoded for pictures, _, encoded in kinds}


def _question(
    model: Any, prompt: Prompt, ids_or_embeds: Tensor, marks: list[Tensor], prompt_length: int | None
) -> Question | None:
    """Return what each sample asks, or None where the vision reducer does not listen."""
    if not marks or not is_read(model._duet.config):
        return None
    answers = answers_from_labels(prompt.labels)
    if prompt_length is not None:
        answers = (torch.arange(ids_or_embeds.shape[1], device=marks[0].device) >= prompt_length).expand_as(marks[0])
    text = asked(prompt.attention_mask, torch.stack(marks).any(0), answers)
    ids = ids_or_embeds if ids_or_embeds.dim() == 2 else None
    return read_question(ids, prompt.embedded().inputs_embeds, text, model._duet.text_encoder)


def repeat_pictures(model: Any, ids_or_embeds: Tensor, inputs: Mapping[str, Any], times: int) -> dict[str, Tensor]:
    """Repeat the pictures of each sample as a group, as beams and sampled sequences of that sample need them."""
    family = model._duet.family
    given = {name: inputs[name] for name in family.inputs if inputs.get(name) is not None}
    repeated = {}
    for pictures in family.pictures(model, given):
        held = placeholders(model, ids_or_embeds, pictures.token_id).sum(1).tolist()
        owner = torch.tensor(owners(held, pictures))
        for name, rows in pictures.rows.items():
            if name not in given:
                continue
            row_owner = owner if rows is None else owner.repeat_interleave(torch.tensor(rows))
            value = given[name]
            row_owner = row_owner.to(value.device)
            groups = [value[row_owner == sample] for sample in row_owner.unique()]
            repeated[name] = torch.cat([g.repeat(times, *[1] * (g.dim() - 1)) for g in groups])
    return repeated
