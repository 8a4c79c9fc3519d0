"""Prompts that fit a model's context: the newest question stays, the oldest turns go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.mm_utils import tokenizer_image_token
from llava.model.anyres import Tiling, TokenCounter

Size = tuple[int, int]


class PromptTooLong(ValueError):
    """A question does not fit the context, even alone."""


def room_for_prompt(config: Any, max_new_tokens: int) -> int | None:
    """Return how many tokens, visual ones included, a prompt may have.

    A prompt is cut by the model beyond `tokenizer_model_max_length`, and an answer has to fit the positions that the
    model knows. Limits of answers are generous (1,024 tokens in LLaVA's scripts) and answers short, so at most a
    sixteenth of the positions is kept free for one.

    Args:
        config: the model's config.
        max_new_tokens: length limit of the answer.

    Returns:
        None where the model names no limit.
    """
    prompt = getattr(config, "tokenizer_model_max_length", None)
    positions = getattr(config, "max_position_embeddings", None)
    limits = [int(prompt)] if prompt else []
    limits += [int(positions) - min(max_new_tokens, int(positions) // 16)] if positions else []
    return min(limits, default=None)


def visual_tokens(model: Any, sizes: Sequence[Size]) -> list[int]:
    """Return how many tokens each picture of (width, height) has when it enters the language model, at most."""
    tower, reduction = model.get_vision_tower(), model.reduction
    if getattr(model.config, "image_aspect_ratio", None) == "anyres":
        count = TokenCounter(Tiling.of(model.config, tower.config), reduction)
        return [count(size) for size in sizes]
    patches = tower.num_patches + int(getattr(tower, "select_feature", "patch") == "cls_patch")
    return [patches if reduction is None else reduction.entering_tokens(patches)] * len(sizes)


def prompt_length(ids: Sequence[int], visual: Sequence[int]) -> int:
    """Tokens of a prompt after every image slot became as many as its picture has."""
    slots = sum(token == IMAGE_TOKEN_INDEX for token in ids)
    return len(ids) - slots + sum(visual[:slots])


def check_prompt(ids: Sequence[int], visual: Sequence[int], room: int | None) -> None:
    """Refuse a prompt that does not fit.

    Args:
        ids: of the prompt, with image slots.
        visual: see `visual_tokens`.
        room: see `room_for_prompt`.

    Raises:
        PromptTooLong: says both lengths.
    """
    length = prompt_length(ids, visual)
    if room is not None and length > room:
        raise PromptTooLong(
            f"the question takes {length} tokens with its pictures ({sum(visual)} visual ones), the context has room "
            f"for {room}: shorten it, ask for a shorter answer, or show fewer pictures"
        )


def drop_oldest(
    conversation: Conversation, tokenizer: Any, visual: Sequence[int], room: int | None, mark: str = DEFAULT_IMAGE_TOKEN
) -> int:
    """Leave out a talk's oldest questions and their answers until the rest fits.

    Pictures stay: the marks of a question that goes move to the front of the next one.

    Args:
        conversation: texts only, and its last turn is open; changed in place.
        tokenizer: the model's.
        visual: see `visual_tokens`.
        room: see `room_for_prompt`.
        mark: what stands for one picture in this model's prompts.

    Returns:
        How many questions went.

    Raises:
        PromptTooLong: not even the newest question fits; the conversation is as before.
    """
    before, first, dropped = conversation.messages, conversation.offset, 0
    while True:
        ids = tokenizer_image_token(conversation.get_prompt(), tokenizer)
        if room is None or prompt_length(ids, visual) <= room:
            return dropped
        messages = conversation.messages
        if len(messages) - first <= 2:
            conversation.messages = before
            check_prompt(ids, visual, room)
        role, question = messages[first + 2]
        pictures = messages[first][1].count(DEFAULT_IMAGE_TOKEN)
        kept = [role, (mark + "\n") * pictures + question]
        conversation.messages = [*messages[:first], kept, *messages[first + 3 :]]
        dropped += 1
