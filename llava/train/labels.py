"""Conversations to token ids and labels.

LLaVA finds the answers by counting the tokens of re-tokenised pieces, and drops the whole record silently when the
counts disagree. Here every text between two images is tokenised once, and a token is supervised when its characters
overlap an answer or the string that ends the answer's turn. The ids are LLaVA's, the labels cannot disagree with them,
and a record that has nothing to learn from is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llava import conversation as conversation_lib
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, Segment, SeparatorStyle
from llava.train.records import BadSampleError, Turn, check_turns, split_system

_V0_MARK = "### "
_V0_LEAD = 2  # tokens of a human turn that teach the model to stop: the mark, and the one after it


def preprocess_multimodal(
    sources: Sequence[Sequence[Turn]], data_args: Any, num_images: int = 1, conversation: Conversation | None = None
) -> list[list[Turn]]:
    """Bring the ``<image>`` marks into the form that training uses.

    With one image the mark goes to the start of its turn, and repeated marks in a turn become one, as in LLaVA. With
    several images every mark stays where it is.

    Args:
        sources: Conversations; they are not changed.
        data_args: Needs ``is_multimodal`` and ``mm_use_im_start_end``.
        num_images: Images of each conversation.
        conversation: Template; None means the default one.
    """
    template = conversation or conversation_lib.default_conversation
    if not getattr(data_args, "is_multimodal", False):
        return [list(source) for source in sources]
    mark = DEFAULT_IMAGE_TOKEN
    if getattr(data_args, "mm_use_im_start_end", False):
        mark = DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN
    if "mmtag" in template.version:
        mark = "<Image>" + mark + "</Image>"

    def rewrite(text: str) -> str:
        if num_images == 1 and DEFAULT_IMAGE_TOKEN in text:
            text = (DEFAULT_IMAGE_TOKEN + "\n" + text.replace(DEFAULT_IMAGE_TOKEN, "").strip()).strip()
        return text.replace(DEFAULT_IMAGE_TOKEN, mark)

    return [[{**turn, "value": rewrite(turn["value"])} for turn in source] for source in sources]


def encode_segments(
    segments: Sequence[Segment], tokenizer: Any, has_image: bool, lead: int = 0
) -> tuple[list[int], list[int]]:
    """Tokenise a prompt and label its supervised parts.

    Args:
        segments: The prompt in parts.
        tokenizer: A fast tokenizer (it must give character offsets).
        has_image: Whether ``<image>`` is an image slot; otherwise it is text.
        lead: First tokens of each unsupervised segment but the first that are supervised all the same.

    Returns:
        Ids and labels, both [L], with ``IMAGE_TOKEN_INDEX`` in the ids for every image.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} gives no character offsets; load it with llava.tokenization.load_tokenizer"
        )
    text = "".join(segment.text for segment in segments)
    supervised = bytearray()
    lead_starts = []
    for segment in segments:
        if lead and supervised and not segment.supervised:
            lead_starts.append(len(supervised))
        supervised += bytes([segment.supervised]) * len(segment.text)
    ids: list[int] = []
    flags: list[bool] = []
    starts: list[int] = []
    position = 0
    for index, piece in enumerate(text.split(DEFAULT_IMAGE_TOKEN) if has_image else [text]):
        encoded = tokenizer(piece, return_offsets_mapping=True, verbose=False)
        piece_ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if index:
            ids.append(IMAGE_TOKEN_INDEX)
            flags.append(False)
            starts.append(position)
            position += len(DEFAULT_IMAGE_TOKEN)
            if piece_ids and piece_ids[0] == tokenizer.bos_token_id:
                piece_ids, offsets = piece_ids[1:], offsets[1:]
        ids += piece_ids
        flags += [1 in supervised[position + start : position + end] for start, end in offsets]
        starts += [position + start for start, _ in offsets]
        position += len(piece)
    for lead_start in lead_starts:
        first = next((index for index, start in enumerate(starts) if start >= lead_start), len(starts))
        for index in range(first, min(first + lead, len(flags))):
            flags[index] = ids[index] != IMAGE_TOKEN_INDEX
    return ids, [token if flag else IGNORE_INDEX for token, flag in zip(ids, flags, strict=True)]


def _fill(template: Conversation, source: Sequence[Turn]) -> Conversation:
    """Write a record's turns into a copy of the template."""
    system, turns = split_system(source)
    check_turns(turns)
    conversation = template.copy() if system is None else template.with_system(system)
    conversation.messages = [[conversation.roles[index % 2], turn["value"]] for index, turn in enumerate(turns)]
    return conversation


def _batch(rows: Sequence[tuple[list[int], list[int]]], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Stack rows, padded on the right to the longest: input_ids and labels, both [B, L]."""
    for index, (_, labels) in enumerate(rows):
        if all(label == IGNORE_INDEX for label in labels):
            raise BadSampleError(f"conversation {index} has no supervised token", "no supervised token")
    longest = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id or 0
    ids = [ids + [pad] * (longest - len(ids)) for ids, _ in rows]
    labels = [labels + [IGNORE_INDEX] * (longest - len(labels)) for _, labels in rows]
    return {"input_ids": torch.tensor(ids, dtype=torch.long), "labels": torch.tensor(labels, dtype=torch.long)}


def _preprocess_template(
    sources: Sequence[Sequence[Turn]],
    tokenizer: Any,
    has_image: bool,
    template: Conversation | None,
    styles: tuple[SeparatorStyle, ...],
) -> dict[str, torch.Tensor]:
    template = template or conversation_lib.default_conversation
    if template.sep_style not in styles:
        expected = " or ".join(style.name for style in styles)
        raise ValueError(
            f"this function formats {expected} templates; the template in use is {template.sep_style.name}"
        )
    rows = [encode_segments(_fill(template, source).segments(), tokenizer, has_image) for source in sources]
    return _batch(rows, tokenizer)


def preprocess_v1(
    sources: Sequence[Sequence[Turn]], tokenizer: Any, has_image: bool = False, conversation: Conversation | None = None
) -> dict[str, torch.Tensor]:
    """Vicuna v1: the answers and their ``</s>`` are supervised.

    Args:
        sources: Conversations.
        tokenizer: A fast tokenizer.
        has_image: Whether ``<image>`` is an image slot.
        conversation: Template; None means the default one.

    Returns:
        ``input_ids`` and ``labels``, both [B, L].

    Raises:
        BadSampleError: If a conversation cannot be labelled.
    """
    return _preprocess_template(sources, tokenizer, has_image, conversation, (SeparatorStyle.TWO,))


def preprocess_llama_2(
    sources: Sequence[Sequence[Turn]], tokenizer: Any, has_image: bool = False, conversation: Conversation | None = None
) -> dict[str, torch.Tensor]:
    """Llama-2 and Mistral instruct: the answers and their ``</s>`` are supervised. See ``preprocess_v1``."""
    return _preprocess_template(sources, tokenizer, has_image, conversation, (SeparatorStyle.LLAMA_2,))


def preprocess_mpt(
    sources: Sequence[Sequence[Turn]], tokenizer: Any, has_image: bool = False, conversation: Conversation | None = None
) -> dict[str, torch.Tensor]:
    """ChatML: the answers and their ``<|im_end|>`` are supervised. See ``preprocess_v1``."""
    return _preprocess_template(sources, tokenizer, has_image, conversation, (SeparatorStyle.MPT,))


def check_caption(source: Sequence[Turn]) -> list[Turn]:
    """Check that a record suits the plain template: one question with an image mark, one answer. Returns the two.

    Raises:
        BadSampleError: If it does not.
    """
    _, turns = split_system(source)
    check_turns(turns)
    marks = turns[0]["value"].count(DEFAULT_IMAGE_TOKEN)
    if len(turns) != 2 or not marks:
        raise BadSampleError(
            f"the plain template takes one question with {DEFAULT_IMAGE_TOKEN} and one answer, this record has "
            f"{len(turns)} turns and {marks} marks in the first; use version v1 for conversations",
            "not a caption",
        )
    return turns


def preprocess_plain(
    sources: Sequence[Sequence[Turn]], tokenizer: Any, conversation: Conversation | None = None
) -> dict[str, Any]:
    """Stage 1: image and caption, the question is thrown away; the caption and its line end are supervised.

    Returns:
        ``input_ids`` and ``labels``, lists of [L].

    Raises:
        BadSampleError: If a conversation is not one question with an image mark and one answer.
    """
    template = conversation or conversation_lib.default_conversation
    rows = []
    for source in sources:
        turns = check_caption(source)
        marks = turns[0]["value"].count(DEFAULT_IMAGE_TOKEN)
        segments = [Segment(DEFAULT_IMAGE_TOKEN * marks), Segment(turns[1]["value"] + template.sep, supervised=True)]
        rows.append(encode_segments(segments, tokenizer, has_image=True))
    batches = [_batch([row], tokenizer) for row in rows]
    return {key: [batch[key][0] for batch in batches] for key in ("input_ids", "labels")}


def preprocess_v0(
    sources: Sequence[Sequence[Turn]], tokenizer: Any, has_image: bool = False, conversation: Conversation | None = None
) -> dict[str, Any]:
    """First-generation LLaVA: ``### Role: text`` lines after the system prompt.

    Supervised are the assistant's lines with their role, the closing mark, and the first two tokens of each human line.

    Returns:
        ``input_ids`` and ``labels``, lists of [L].
    """
    template = conversation or conversation_lib.default_conversation
    rows = []
    for source in sources:
        filled = _fill(template, source)
        segments = [Segment(f"{filled.system}\n\n")]
        for index, (role, text) in enumerate(filled.messages):
            segments.append(Segment(f"{_V0_MARK}{role}: {text}\n", supervised=index % 2 == 1))
        segments.append(Segment(_V0_MARK, supervised=True))
        rows.append(encode_segments(segments, tokenizer, has_image, lead=_V0_LEAD))
    batches = [_batch([row], tokenizer) for row in rows]
    return {key: [batch[key][0] for batch in batches] for key in ("input_ids", "labels")}


def preprocess(
    sources: Sequence[Sequence[Turn]], tokenizer: Any, has_image: bool = False, conversation: Conversation | None = None
) -> dict[str, Any]:
    """Tokenise and label conversations with the given template, or the default one.

    Returns:
        ``input_ids`` and ``labels``: for each conversation a LongTensor [L].

    Raises:
        BadSampleError: If a conversation cannot be labelled.
    """
    template = conversation or conversation_lib.default_conversation
    if template.sep_style is SeparatorStyle.PLAIN:
        return preprocess_plain(sources, tokenizer, conversation=template)
    if template.sep_style is SeparatorStyle.LLAMA_2:
        return preprocess_llama_2(sources, tokenizer, has_image, template)
    if template.sep_style is SeparatorStyle.TWO:
        return preprocess_v1(sources, tokenizer, has_image, template)
    if template.sep_style is SeparatorStyle.MPT:
        return preprocess_mpt(sources, tokenizer, has_image, template)
    return preprocess_v0(sources, tokenizer, has_image, template)
