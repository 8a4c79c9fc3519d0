"""Greedy answers to batches of questions about pictures; an answer does not depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.context import check_prompt, room_for_prompt, visual_tokens
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.eval.prefix import depends_on_question, find_shared, left_pad, run_prefixes
from llava.eval.run_llava import choose_template, generation_options, image_mark, move_pixels
from llava.mm_utils import process_images, tokenizer_image_token
from llava.sanity import Watch

# The paper's protocols: LLaVA's scripts for pictures, Video-LLaVA's for videos.
IMAGE_TEMPLATE, VIDEO_TEMPLATE = "vicuna_v1", "llava_v1"


def template_for(model_name: str, config: Any, wanted: str | None = None, video: bool = False) -> str:
    """Choose the conversation template of an evaluation.

    Args:
        model_name: the model's name.
        config: its config; a template stored there is what the model was trained with.
        wanted: the user's choice, which wins.
        video: whether the benchmark is about videos.

    Raises:
        ValueError: `wanted` is unknown.
    """
    if wanted is not None:
        return choose_template(model_name, config, wanted)
    inferred = choose_template(model_name, config)
    if getattr(config, "conv_version", None) == inferred or inferred not in ("llava_v0", "llava_v1"):
        return inferred
    return VIDEO_TEMPLATE if video else IMAGE_TEMPLATE


def mark_images(text: str, count: int, config: Any) -> str:
    """The user's turn: one image mark per picture without separators, a newline, the text.

    A text that has marks itself keeps them where they are.

    Raises:
        ValueError: it has another number of marks than there are pictures.
    """
    mark, own = image_mark(config), text.count(DEFAULT_IMAGE_TOKEN)
    if own and own != count:
        raise ValueError(
            f"the text has {own} {DEFAULT_IMAGE_TOKEN} mark(s) but {count} picture(s) came with it: {text!r}"
        )
    if own:
        return text.replace(DEFAULT_IMAGE_TOKEN, mark)
    return f"{mark * count}\n{text}" if count else text


def preprocess(pictures: Sequence[Image.Image], image_processor: Any, config: Any) -> list[Tensor]:
    """Pixels of every picture, [3, H, W] or [T, 3, H, W] with tiles; an object that occurs twice is processed once."""
    done: dict[int, Tensor] = {}
    for picture in pictures:
        if id(picture) not in done:
            done[id(picture)] = process_images([picture], image_processor, config)[0]
    return [done[id(picture)] for picture in pictures]


def pack(pixels: Sequence[Tensor]) -> Tensor | list[Tensor] | None:
    """What the model takes: one tensor where all shapes agree, else a list; None without pictures.

    Tensors that occur several times stay one object in a list, which the model encodes once.
    """
    if not pixels:
        return None
    alike = len({tensor.shape for tensor in pixels}) == 1 and len({id(tensor) for tensor in pixels}) == len(pixels)
    return torch.stack(list(pixels)) if alike else list(pixels)


def _move(pixels: Tensor | list[Tensor] | None, model: Any) -> Tensor | list[Tensor] | None:
    """Bring pictures to the model's device and number type, each object once."""
    if pixels is None or isinstance(pixels, Tensor):
        return None if pixels is None else move_pixels(pixels, model)
    moved = {id(tensor): tensor.to(model.device, model.dtype) for tensor in pixels}
    return [moved[id(tensor)] for tensor in pixels]


def stop_string(conversation: Conversation, tokenizer: Any) -> str | None:
    """What ends an answer in this template, where it is not the tokenizer's end of text."""
    two = conversation.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)
    stop = conversation.sep2 if two else conversation.sep
    return stop if stop and stop != tokenizer.eos_token else None


class Answerer:
    """Answers batches of questions with one model.

    Args:
        model: a LLaVA model.
        tokenizer: its tokenizer.
        image_processor: its image processor.
        conv_mode: name of the conversation template.

    Attributes:
        non_finite: which of the last batch's answers come from logits that are NaN.

    Raises:
        ValueError: the model cannot look at pictures, or the template is unknown.
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, conv_mode: str):
        if image_processor is None:
            raise ValueError("this is a plain language model; it cannot look at pictures")
        if conv_mode not in conv_templates:
            raise ValueError(f"unknown conversation template {conv_mode!r}; known: {', '.join(sorted(conv_templates))}")
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.conv_mode = conv_mode
        self.non_finite: list[bool] = []
        self._stop = stop_string(conv_templates[conv_mode], tokenizer)
        pad = tokenizer.pad_token_id
        self._pad = tokenizer.eos_token_id if pad is None else pad

    def prompt_ids(self, text: str, pictures: int) -> list[int]:
        """Token ids of the prompt to a question with that many pictures, `IMAGE_TOKEN_INDEX` for each of them."""
        conversation = conv_templates[self.conv_mode].copy()
        conversation.append_message(conversation.roles[0], mark_images(text, pictures, self.model.config))
        conversation.append_message(conversation.roles[1], None)
        return tokenizer_image_token(conversation.get_prompt(), self.tokenizer)

    def answer(
        self, batch: Sequence[tuple[str, Sequence[Image.Image]]], max_new_tokens: int, **options: Any
    ) -> list[str]:
        """Answer questions, each a text and its pictures (none or several); text-only ones may be among them.

        Args:
            batch: the questions.
            max_new_tokens: length limit of an answer.
            **options: see `generate`.
        """
        ids = [self.prompt_ids(text, len(pictures)) for text, pictures in batch]
        pictures = [picture for _, own in batch for picture in own]
        pixels = pack(preprocess(pictures, self.image_processor, self.model.config))
        return self.generate(ids, pixels, [picture.size for picture in pictures], max_new_tokens, **options)

    def check(self, ids: Sequence[int], sizes: Sequence[tuple[int, int]], max_new_tokens: int) -> None:
        """Refuse a question that does not fit the context; the model would cut its end.

        Args:
            ids: its prompt.
            sizes: (width, height) of its pictures.
            max_new_tokens: length limit of the answer.

        Raises:
            PromptTooLong: says both lengths.
        """
        check_prompt(ids, visual_tokens(self.model, sizes), room_for_prompt(self.model.config, max_new_tokens))

    @torch.inference_mode()
    def generate(
        self,
        ids: Sequence[Sequence[int]],
        pixels: Tensor | list[Tensor] | None,
        sizes: Sequence[tuple[int, int]],
        max_new_tokens: int,
        **options: Any,
    ) -> list[str]:
        """Answer prompts that are already token ids; `non_finite` then says which answers come from NaN logits.

        Args:
            ids: B prompts of any lengths.
            pixels: all pictures of the batch in the order of their marks; see `pack`.
            sizes: their (width, height).
            max_new_tokens: length limit of an answer.
            **options: for the model's `generate`, on top of greedy decoding.

        Raises:
            PromptTooLong: see `check`.
        """
        self.non_finite = []
        if not ids:
            return []
        places = iter(sizes)
        for row in ids:
            self.check(row, list(islice(places, sum(token == IMAGE_TOKEN_INDEX for token in row))), max_new_tokens)
        watch = Watch()
        stopping: dict[str, Any] = {"logits_processor": LogitsProcessorList([watch])}
        stopping |= {"stop_strings": [self._stop], "tokenizer": self.tokenizer} if self._stop else {}
        output = self.model.generate(
            **self._prompt(ids, _move(pixels, self.model), list(sizes)),
            pad_token_id=self._pad,
            **(generation_options(0, None, 1, max_new_tokens) | stopping | options),
        )
        self.non_finite = watch.rows(len(ids))
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [(text.split(self._stop)[0] if self._stop else text).strip() for text in texts]

    def _prompt(self, ids: Sequence[Sequence[int]], images: Any, sizes: list[tuple[int, int]]) -> dict[str, Any]:
        """What the model's `generate` starts from; a beginning that prompts share has run already."""
        shared = None if depends_on_question(self.model) else find_shared(ids, images)
        if shared is not None:
            return run_prefixes(self.model, shared, images, sizes, self._pad)
        padded, mask = left_pad(ids, self._pad, self.model.device)
        return {"inputs": padded, "attention_mask": mask, "images": images, "image_sizes": sizes}
