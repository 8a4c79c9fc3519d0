"""LLaVA's records through a Hugging Face model's own chat template and processor, with labels on the answers alone.

Where the answers stand is found in the text that the template gives: by its `{% generation %}` marks where it has them,
otherwise by rendering the conversation up to each answer. A record whose answers cannot be found is an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from jinja2 import TemplateError

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.train.records import DEFAULT_VIDEO_TOKEN, BadSampleError, Record, images_of, split_system, videos_of

logger = logging.getLogger(__name__)

Message = dict[str, Any]
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_MARKS = re.compile(r"\{%-?\s*generation\b")


@dataclass
class Labelled:
    """A conversation as text tokens, before pictures take their places.

    Attributes:
        text: what the template made.
        ids: its tokens, one for each picture.
        answers: which of them are learned.
        pictures: how many pictures of each kind stand in it.
    """

    text: str
    ids: list[int]
    answers: list[bool]
    pictures: dict[str, int]


def messages_of(record: Record, end_mark: str = "") -> list[Message]:
    """Turn a record into the messages that chat templates take.

    Marks become entries of the content. A single image comes first in its turn, as in LLaVA; of several, and of videos,
    each stays where its mark is.

    Args:
        record: a record that `check_record` accepted.
        end_mark: put after every answer, for templates that end none.
    """
    system, turns = split_system(record["conversations"])
    found: list[Message] = []
    if system is not None:
        found.append({"role": "system", "content": [_text(system)]})
    single = len(images_of(record)) == 1 and not videos_of(record)
    for turn in turns:
        value, role = turn["value"], _ROLES[turn["from"]]
        if role == "assistant":
            found.append({"role": role, "content": [_text(value + end_mark)]})
            continue
        if single and DEFAULT_IMAGE_TOKEN in value:
            value = DEFAULT_IMAGE_TOKEN + value.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        found.append({"role": role, "content": _content(value)})
    return found


def _text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def _content(value: str) -> list[dict[str, str]]:
    """Split a turn at its marks; line breaks beside a mark are the template's business."""
    pieces = re.split(f"({DEFAULT_IMAGE_TOKEN}|{DEFAULT_VIDEO_TOKEN})", value)
    if len(pieces) == 1:
        return [_text(value)]
    return [
        {"type": piece.strip("<>")} if number % 2 else _text(piece.strip("\n"))
        for number, piece in enumerate(pieces)
        if piece.strip()
    ]


class Chat:
    """Makes samples of conversations.

    Args:
        processor: with a chat template.
        visual_ids: the tokens that stand for pictures in this model.
        limit: text tokens that a conversation may have.
    """

    def __init__(self, processor: Any, visual_ids: set[int], limit: int) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.visual_ids = visual_ids
        self.limit = limit
        self.template: str = processor.chat_template
        self.marked = bool(_MARKS.search(self.template))
        self.end_mark = ""
        self.end_mark = self._missing_end_mark()

    def _missing_end_mark(self) -> str:
        """What has to be added to answers so that the model learns to stop: nothing where the template does it."""
        question, answer = {"role": "user", "content": [_text("question")]}, {"role": "assistant", "content": []}
        probe = [question, answer | {"content": [_text("answer")]}]
        try:
            text = self.render(probe)
            start, end = self.spans(probe, text)[-1]
        except BadSampleError as error:
            raise ValueError(f"the chat template cannot be used: {error}") from error
        special = {token for token in (*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()) if token}
        eos = self.tokenizer.eos_token
        if eos is None or any(token in text[start:end].partition("answer")[2] for token in special):
            return ""
        logger.warning("the chat template does not end answers; %s is added to each, so that the model learns to", eos)
        return eos

    def skeleton(self) -> str:
        """What the template writes around turns."""
        return self.render([{"role": role, "content": [_text(".")]} for role in ("user", "assistant")])

    def visual_texts(self) -> list[str]:
        """The texts of the tokens that stand for pictures."""
        return [token for token in self.tokenizer.convert_ids_to_tokens(sorted(self.visual_ids)) if token]

    # ---- text

    def render(self, messages: Sequence[Message], open_turn: bool = False) -> str:
        """Return the conversation as text.

        Raises:
            BadSampleError: the template refuses it.
        """
        try:
            return self.processor.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=open_turn, chat_template=self.template
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise BadSampleError(f"the model's chat template refuses it: {error}", "chat template") from error

    def spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Return where the answers stand in the rendered text, in characters, end marks included.

        Raises:
            BadSampleError: they cannot be found.
        """
        found = self._marked_spans(messages, text) if self.marked else self._turn_spans(messages, text)
        answers = sum(message["role"] == "assistant" for message in messages)
        trimmed = [self._trim(text, start, end) for start, end in found]
        if len(found) != answers or any(start >= end for start, end in trimmed):
            raise BadSampleError(
                f"{len(found)} answers are found in the text that the chat template makes of {answers}: they cannot be "
                "labelled. Check the template's {% generation %} marks",
                "no label",
            )
        return trimmed

    def _marked_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        marked = self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.template, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        mask, offsets = list(marked["assistant_masks"]), plain["offset_mapping"]
        if len(mask) != len(offsets):
            raise BadSampleError("the tokenizer and the processor render the conversation differently", "no label")
        spans, begin = [], None
        for index, inside in enumerate([*mask, 0]):
            if inside and begin is None:
                begin = index
            elif not inside and begin is not None:
                spans.append((offsets[begin][0], offsets[index - 1][1]))
                begin = None
        return spans

    def _turn_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            head, whole = self.render(messages[:index], open_turn=True), self.render(messages[: index + 1])
            if not (whole.startswith(head) and text.startswith(whole)):
                raise BadSampleError(
                    f"the answer of message {index} cannot be found: the chat template writes earlier turns "
                    "differently when later ones follow. Give one with {% generation %} marks (--chat_template)",
                    "no label",
                )
            spans.append((len(head), len(whole)))
        return spans

    def _trim(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Leave out white space around an answer, and take in an end mark that follows at once."""
        piece = text[start:end]
        start, end = start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
        eos = self.tokenizer.eos_token
        return start, end + len(eos) if eos and text.startswith(eos, end) else end

    def label(self, messages: Sequence[Message]) -> Labelled:
        """Tokenise a conversation and mark what is learned: every token that overlaps an answer or its end mark.

        Raises:
            BadSampleError: see `render` and `spans`; or nothing is learned.
        """
        text = self.render(messages)
        spans = self.spans(messages, text)
        encoded = self.tokenizer(text, add_special_tokens=self.adds_special(text), return_offsets_mapping=True)
        answers = [
            end > begin and any(begin < stop and end > start for start, stop in spans)
            for begin, end in encoded["offset_mapping"]
        ]
        if not any(answers):
            raise BadSampleError("no token of the answers is left to learn", "no label")
        parts = [part["type"] for message in messages for part in message["content"]]
        pictures = {kind: parts.count(kind) for kind in ("image", "video")}
        return Labelled(text, list(encoded["input_ids"]), answers, pictures)

    def adds_special(self, text: str) -> bool:
        """Whether the tokenizer adds its own marks: not where the template has written the first one."""
        bos = self.tokenizer.bos_token
        return not (bos is not None and text.startswith(bos))

    def fit(self, messages: Sequence[Message]) -> Labelled:
        """Label a conversation, without whole turns at its end that exceed the limit.

        Raises:
            BadSampleError: not even the first question and answer fit.
        """
        head = [message for message in messages if message["role"] == "system"]
        turns = [message for message in messages if message["role"] != "system"]
        rounds = len(turns) // 2
        while True:
            labelled = self.label([*head, *turns[: 2 * rounds]])
            words = sum(token not in self.visual_ids for token in labelled.ids)
            if words <= self.limit:
                return labelled
            if rounds == 1:
                raise BadSampleError(
                    f"the first question and answer take {words} text tokens, the limit is {self.limit}; shorten the "
                    "record or raise --model_max_length",
                    "too long",
                )
            rounds = max(1, min(rounds - 1, rounds * self.limit // words))

    # ---- samples

    def sample(self, labelled: Labelled, images: Sequence[Any], videos: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return the model's inputs, each with a batch dimension of one: `input_ids`, `labels`, pixels and the like.

        Args:
            labelled: from `fit`.
            images: of the conversation, in order.
            videos: each a list of frames.

        Raises:
            BadSampleError: pictures and their places do not match, or the answers are not found between them.
        """
        try:
            out = self.processor(
                text=[labelled.text], images=list(images) or None, videos=list(videos) or None, return_tensors="pt",
                add_special_tokens=self.adds_special(labelled.text),
            )  # fmt: skip
        except (ValueError, IndexError, StopIteration) as error:
            raise BadSampleError(f"the model's processor refuses it: {error}", "processor") from error
        found = {name: _tensor(value) for name, value in out.items()}
        ids = found["input_ids"][0].tolist()
        answers = torch.tensor(spread(labelled.ids, labelled.answers, ids, self.visual_ids))
        found["labels"] = found["input_ids"].masked_fill(~answers, IGNORE_INDEX)
        return found


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value)


def spread(plain: Sequence[int], answers: Sequence[bool], full: Sequence[int], visual_ids: set[int]) -> list[bool]:
    """Carry marks over to the tokens in which every picture has taken its place.

    Args:
        plain: tokens with one mark for each picture.
        answers: which of them are learned.
        full: the processor's tokens; between the visual ones it may have put more (time stamps, tile marks).
        visual_ids: the tokens that stand for pictures.

    Raises:
        BadSampleError: a token that is learned is not found again.
    """
    said = [(token, answer) for token, answer in zip(plain, answers, strict=True) if token not in visual_ids]
    places = [place for place, token in enumerate(full) if token not in visual_ids]
    left, right = [token for token, _ in said], [full[place] for place in places]
    marks = [False] * len(full)
    if left == right:
        blocks: list[Any] = [(0, 0, len(left))]
    else:
        blocks = SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    for first, second, size in blocks:
        for offset in range(size):
            marks[places[second + offset]] = said[first + offset][1]
    if sum(marks) != sum(answer for _, answer in said):
        raise BadSampleError(
            "the processor writes the conversation's text with other tokens than its tokenizer: the answers cannot be "
            "labelled",
            "no label",
        )
    return marks
