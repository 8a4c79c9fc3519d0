"""Conversation templates: how a list of messages becomes one prompt string.

The strings are what LLaVA checkpoints were trained on, so they are kept to the byte. ``Conversation.segments`` is the
one place that formats messages: the prompt is its concatenation, and training takes the answers' spans from it.
"""

from __future__ import annotations

import base64
import builtins
import dataclasses
from enum import Enum, auto
from io import BytesIO
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN


class SeparatorStyle(Enum):
    """How roles, messages and separators are put together."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a prompt; ``supervised`` marks an answer together with the string that ends its turn."""

    text: str
    supervised: bool = False


def _text_of(message: Any) -> str | None:
    """A message is a text, None for a turn that is still open, or ``(text, picture, picture mode)``."""
    return message[0] if isinstance(message, tuple) else message


@dataclasses.dataclass
class Conversation:
    """A prompt template with the messages that were said so far.

    ``messages`` holds ``[role, message]`` pairs; ``offset`` is how many of the first ones are fixed examples.
    """

    system: str
    roles: Any
    messages: Any
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def get_prompt(self) -> str:
        """Return the whole prompt; a last message of None leaves that role's turn open."""
        return "".join(segment.text for segment in self.segments())

    def segments(self) -> list[Segment]:
        """Return the prompt in parts, with the answers (odd messages) marked as supervised.

        Raises:
            ValueError: If the separator style is unknown or a Llama-2 prompt does not start with a user's message.
        """
        messages = [(role, _text_of(message)) for role, message in self._messages_with_image_first()]
        if self.sep_style is SeparatorStyle.LLAMA_2:
            parts = self._llama_2_segments(messages)
        elif self.sep_style is SeparatorStyle.PLAIN:
            parts = self._plain_segments(messages)
        elif self.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO, SeparatorStyle.MPT):
            parts = self._role_segments(messages)
        else:
            raise ValueError(f"unknown separator style {self.sep_style!r}; use a member of SeparatorStyle")
        return [part for part in parts if part.text]

    def _separator(self, index: int) -> str:
        """The string that ends message ``index``."""
        if self.sep_style in (SeparatorStyle.TWO, SeparatorStyle.PLAIN) and index % 2 == 1:
            if self.sep2 is None:
                raise ValueError("this template has no separator for answers (sep2), so it holds one message only")
            return self.sep2
        return self.sep

    def _role_segments(self, messages: list[tuple[str, str | None]]) -> list[Segment]:
        colon, space = ("", "") if self.sep_style is SeparatorStyle.MPT else (":", " ")
        parts = [Segment(self.system + self.sep)]
        for index, (role, text) in enumerate(messages):
            parts.append(Segment(role + colon))
            if text:
                parts.append(Segment(space + text + self._separator(index), supervised=index % 2 == 1))
        return parts

    def _plain_segments(self, messages: list[tuple[str, str | None]]) -> list[Segment]:
        parts = [Segment(self.system)]
        for index, (_, text) in enumerate(messages):
            if text:
                parts.append(Segment(text + self._separator(index), supervised=index % 2 == 1))
        return parts

    def _llama_2_segments(self, messages: list[tuple[str, str | None]]) -> list[Segment]:
        parts: list[Segment] = []
        for index, (role, text) in enumerate(messages):
            if index == 0 and (not text or role != self.roles[0]):
                raise ValueError(f"a Llama-2 prompt starts with a message of {self.roles[0]!r}, not of {role!r}")
            if not text:
                continue
            if index % 2 == 0:
                system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if index == 0 and self.system else ""
                # The tokenizer adds the first <s> itself.
                start = self.sep if index else ""
                parts.append(Segment(f"{start}[INST] {system}{text} [/INST]"))
            else:
                parts.append(Segment(f" {text} {self.sep2}", supervised=True))
        return parts

    def _messages_with_image_first(self) -> list[Any]:
        """Put the image mark in front of the first message when a picture came with it."""
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return list(self.messages)
        role, message = self.messages[0]
        text = message[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" not in self.version:
            return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *self.messages[1:]]
        tag = (self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>")
        return [tag, (self.roles[1], "Received."), (role, text), *self.messages[1:]]

    def append_message(self, role: str, message: Any) -> None:
        """Add a message; None opens the role's turn, ``(text, picture, mode)`` carries a picture."""
        self.messages.append([role, message])

    def with_system(self, text: str) -> Conversation:
        """Return a copy whose system prompt is ``text``, inside the marks that this template puts around it."""
        mark = "<|im_start|>system\n" if self.sep_style is SeparatorStyle.MPT else ""
        return dataclasses.replace(self.copy(), system=mark + text)

    def process_image(
        self,
        image: Image.Image,
        image_process_mode: str,
        return_pil: bool = False,
        image_format: str = "PNG",
        max_len: int = 1344,
        min_len: int = 672,
    ) -> Image.Image | str:
        """Bring a picture of a chat to a size that can be sent.

        Args:
            image: The picture.
            image_process_mode: "Pad" (to a square), "Default" or "Crop" (as it is), "Resize" (to 336x336).
            return_pil: Return the picture itself instead of a base64 string.
            image_format: File format of the base64 string.
            max_len: A longer side than this, in pixels, is scaled down.
            min_len: Upper bound of the shorter side, in pixels, when scaling down.

        Raises:
            ValueError: If the mode is unknown.
        """
        from llava.large_pictures import pad_and_resize
        from llava.mm_utils import CLIP_MEAN_COLOUR, expand2square

        if image_process_mode == "Pad" and max(image.size) > max_len:
            side = min(max_len, min_len)
            image = pad_and_resize(image, CLIP_MEAN_COLOUR, (side, side), Image.Resampling.BICUBIC)
        elif image_process_mode == "Pad":
            image = expand2square(image, CLIP_MEAN_COLOUR)
        elif image_process_mode == "Resize":
            image = image.resize((336, 336))
        elif image_process_mode not in ("Default", "Crop"):
            raise ValueError(f"unknown image mode {image_process_mode!r}; use Pad, Default, Crop or Resize")
        if max(image.size) > max_len:
            aspect = max(image.size) / min(image.size)
            short = max(1, int(min(max_len / aspect, min_len, min(image.size))))
            long = min(int(short * aspect), max_len)
            width, height = image.size
            image = image.resize((short, long) if height > width else (long, short))
        if return_pil:
            return image
        buffer = BytesIO()
        image.save(buffer, format=image_format)
        return base64.b64encode(buffer.getvalue()).decode()

    def get_images(self, return_pil: bool = False) -> list[Any]:
        """Return the pictures of the user's messages, in order, as base64 PNG strings or PIL images."""
        pictures = []
        for index, (_, message) in enumerate(self.messages[self.offset :]):
            if index % 2 == 0 and isinstance(message, tuple):
                _, image, mode = message
                pictures.append(self.process_image(image, mode, return_pil=return_pil))
        return pictures

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """Return ``[user, assistant]`` pairs for a chat widget, with pictures as inline HTML."""
        pairs: list[list[str | None]] = []
        for index, (_, message) in enumerate(self.messages[self.offset :]):
            if index % 2:
                pairs[-1][-1] = message
            elif isinstance(message, tuple):
                text, image, _ = message
                code = self.process_image(image, "Default", return_pil=False, image_format="JPEG")
                tag = f'<img src="data:image/jpeg;base64,{code}" alt="user upload image" />'
                pairs.append([tag + text.replace(DEFAULT_IMAGE_TOKEN, "").strip(), None])
            else:
                pairs.append([message, None])
        return pairs

    def copy(self) -> Conversation:
        """Return an independent copy with message lists of its own."""
        return dataclasses.replace(self, messages=[[role, message] for role, message in self.messages])

    def dict(self) -> builtins.dict[str, Any]:
        """Return a JSON-ready description, without pictures."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, _text_of(message)] for role, message in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }


_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
# The missing space after "language." is part of what the checkpoints saw.
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_SEED_QUESTION = "What is the difference between renewable and non-renewable energy sources?"
_SEED_ANSWER = (
    "Renewable sources such as sunlight, wind and flowing water refill themselves as fast as we use them. "
    "Non-renewable sources such as coal, oil and gas took millions of years to form, so what we burn is gone. "
    "Renewable plants also emit little while they run, but their output changes with the weather.\n"
)


def _vicuna(system: str, version: str = "v1") -> Conversation:
    return Conversation(
        system=system,
        roles=("USER", "ASSISTANT"),
        messages=(),
        offset=0,
        sep_style=SeparatorStyle.TWO,
        sep=" ",
        sep2="</s>",
        version=version,
    )


def _human(system: str, version: str = "Unknown", seed: tuple = ()) -> Conversation:
    return Conversation(
        system=system,
        roles=("Human", "Assistant"),
        messages=seed,
        offset=len(seed),
        sep_style=SeparatorStyle.SINGLE,
        sep="###",
        version=version,
    )


def _llama(system: str, sep: str = "<s>") -> Conversation:
    return Conversation(
        system=system,
        roles=("USER", "ASSISTANT"),
        messages=(),
        offset=0,
        sep_style=SeparatorStyle.LLAMA_2,
        sep=sep,
        sep2="</s>",
        version="llama_v2",
    )


def _chatml(system: str) -> Conversation:
    return Conversation(
        system=system,
        roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
        messages=(),
        offset=0,
        sep_style=SeparatorStyle.MPT,
        sep="<|im_end|>",
        version="mpt",
    )


conv_vicuna_v0 = _human(_CURIOUS_HUMAN, seed=(("Human", _SEED_QUESTION), ("Assistant", _SEED_ANSWER)))
conv_vicuna_v1 = _vicuna(_CURIOUS_USER)
conv_llama_2 = _llama(_LLAMA_2)
conv_llava_llama_2 = _llama(_LLAVA_LLAMA_2)
conv_mistral_instruct = _llama("", sep="")
conv_mpt = _chatml(_MPT_SYSTEM)
conv_chatml_direct = _chatml("<|im_start|>system\nAnswer the questions.")
conv_llava_plain = Conversation(
    system="", roles=("", ""), messages=(), offset=0, sep_style=SeparatorStyle.PLAIN, sep="\n"
)
conv_llava_v0 = _human(_CURIOUS_HUMAN)
conv_llava_v0_mmtag = _human(_MMTAG, version="v0_mmtag")
conv_llava_v1 = _vicuna(_CURIOUS_HUMAN)
conv_llava_v1_mmtag = _vicuna(_MMTAG, version="v1_mmtag")

conv_templates = {
    "default": conv_vicuna_v0,
    "v0": conv_vicuna_v0,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llama_2": conv_llama_2,
    "mistral_instruct": conv_mistral_instruct,
    "chatml_direct": conv_chatml_direct,
    "mistral_direct": conv_chatml_direct,
    "plain": conv_llava_plain,
    "v0_plain": conv_llava_plain,
    "llava_v0": conv_llava_v0,
    "v0_mmtag": conv_llava_v0_mmtag,
    "llava_v1": conv_llava_v1,
    "v1_mmtag": conv_llava_v1_mmtag,
    "llava_llama_2": conv_llava_llama_2,
    "mpt": conv_mpt,
}

default_conversation = conv_vicuna_v1


def set_default_conversation(name: str) -> Conversation:
    """Make template ``name`` the default one and return it; an unknown name gives ``vicuna_v1``, as in LLaVA."""
    global default_conversation
    default_conversation = conv_templates.get(name, conv_vicuna_v1)
    return default_conversation
