"""LLaVA's own steps of the first generation's label masks, under the names that forks of its `train.py` import.

This package labels by character offsets instead (`llava.train.labels`); nothing here is called by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llava import conversation as conversation_lib
from llava.constants import IGNORE_INDEX

_MARK, _END = "### ", "\n"
_HUMAN_LEAD = 2  # tokens of a human turn that stay supervised: the mark, and the one after it


def _tokenize_fn(strings: Sequence[str], tokenizer: Any) -> dict[str, list]:
    """Tokenise every text on its own, cut at the tokenizer's limit.

    Returns:
        `input_ids` and `labels`, the same LongTensors [L]; `input_ids_lens` and `labels_lens`, their tokens without
        padding.
    """
    ids = [
        tokenizer(
            text, return_tensors="pt", padding="longest", max_length=tokenizer.model_max_length, truncation=True
        ).input_ids[0]
        for text in strings
    ]
    lengths = [int(row.ne(tokenizer.pad_token_id).sum()) for row in ids]
    return {"input_ids": ids, "labels": ids, "input_ids_lens": lengths, "labels_lens": lengths}


def _mask_targets(target: torch.Tensor, tokenized_lens: Sequence[int], speakers: Sequence[str]) -> None:
    """Put `IGNORE_INDEX` over the header and over the human turns of one conversation, in place.

    Args:
        target: labels [L].
        tokenized_lens: tokens of the header, then of every turn.
        speakers: who says each turn: "human" or another.
    """
    header, *turns = tokenized_lens
    target[:header] = IGNORE_INDEX
    start = header
    for length, speaker in zip(turns, speakers, strict=False):
        if speaker == "human":
            target[start + _HUMAN_LEAD : start + length] = IGNORE_INDEX
        start += length


def _add_speaker_and_signal(header: str, source: list[dict[str, str]], get_conversation: bool = True) -> str:
    """Write `### Role: text` and a line end into every turn of one conversation, in place.

    Args:
        header: what stands before the first turn.
        source: turns with `from` and `value`; the values change.
        get_conversation: whether the turns are part of what is returned.

    Returns:
        Header, turns and the mark of the turn that would follow.
    """
    roles: dict[str, str] = dict(zip(("human", "gpt"), conversation_lib.default_conversation.roles, strict=True))
    for turn in source:
        turn["value"] = f"{_MARK}{roles.get(turn['from'].lower(), 'unknown')}: {turn['value']}{_END}"
    said = "".join(turn["value"] for turn in source) if get_conversation else ""
    return header + said + _MARK
