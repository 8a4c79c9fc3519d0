"""Ask a model one question about one or more pictures.

python -m llava.eval.run_llava --model-path MODEL --image-file picture.jpg --query "What is this?"
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

from duet.errors import main_guard
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
)
from llava.context import drop_oldest, room_for_prompt, visual_tokens
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pictures import add_arguments as add_picture_arguments
from llava.pictures import read_picture
from llava.reduction import ReductionArguments

logger = logging.get_logger(__name__)

# Part of a model's lower-case name -> its conversation template; the first hit wins. Source: LLaVA's rule.
_TEMPLATE_OF_NAME = (
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)


def image_parser(args: Any) -> list[str]:
    """Split `args.image_file` at `args.sep` (default a comma)."""
    return [part.strip() for part in args.image_file.split(getattr(args, "sep", None) or ",")]


def load_image(image_file: str, orientation: str = "exif") -> Image.Image:
    """Open a picture from a path or an http(s) address as RGB; see `llava.pictures.read_picture`.

    Raises:
        ValueError: It does not exist or is no picture; the message names it.
    """
    return read_picture(image_file, orientation)


def load_images(image_files: list[str], orientation: str = "exif") -> list[Image.Image]:
    """Open several pictures; see `load_image`."""
    return [load_image(image_file, orientation) for image_file in image_files]


def choose_template(model_name: str, config: Any, wanted: str | None = None) -> str:
    """Choose the conversation template.

    Args:
        model_name: The model's name, the last resort.
        config: The model's config; `conv_version` in it is what the model was trained with.
        wanted: The user's choice, which wins.

    Raises:
        ValueError: `wanted` is unknown.
    """
    name = model_name.lower()
    inferred = next((template for part, template in _TEMPLATE_OF_NAME if part in name), "llava_v0")
    stored = getattr(config, "conv_version", None)
    inferred = stored if stored in conv_templates else inferred
    if wanted is None:
        return inferred
    if wanted not in conv_templates:
        raise ValueError(f"unknown conversation template {wanted!r}; known: {', '.join(sorted(conv_templates))}")
    if wanted != inferred:
        logger.warning("the model suggests the template %r, but %r was asked for and is used", inferred, wanted)
    return wanted


def image_mark(config: Any) -> str:
    """The text that stands for one picture in a prompt of this model."""
    if getattr(config, "mm_use_im_start_end", False):
        return DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    return DEFAULT_IMAGE_TOKEN


def place_images(query: str, count: int, config: Any) -> str:
    """Put `count` image marks into a question: at its placeholders, where it already has marks, or in front."""
    mark = image_mark(config)
    if IMAGE_PLACEHOLDER in query:
        return query.replace(IMAGE_PLACEHOLDER, mark)
    if DEFAULT_IMAGE_TOKEN in query:
        return query.replace(DEFAULT_IMAGE_TOKEN, mark)
    return (mark + "\n") * count + query


def stopping_criteria(conversation: Conversation, tokenizer: Any, input_ids: torch.Tensor) -> list[Any]:
    """Stop at the template's separator where that is not the tokenizer's end-of-text."""
    two = conversation.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)
    stop = conversation.sep2 if two else conversation.sep
    if not stop or stop == tokenizer.eos_token:
        return []
    return [KeywordsStoppingCriteria([stop], tokenizer, input_ids)]


def generation_options(temperature: float, top_p: float | None, num_beams: int, max_new_tokens: int) -> dict[str, Any]:
    """Arguments for `generate`; a temperature of 0 is greedy."""
    options: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "use_cache": True}
    options["do_sample"] = temperature > 0
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p}
    return options


def answer(model, tokenizer, conversation: Conversation, pixels, sizes, streamer=None, **options) -> str:
    """Generate the open turn of a conversation.

    Where it is longer than the context, its oldest questions are left out of it, with their answers; that is said once.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        conversation: Ends with an open turn; changed where turns are left out.
        pixels: What `process_images` gave.
        sizes: (width, height) of the pictures.
        streamer: Gets tokens as they come.
        **options: See `generation_options`.

    Raises:
        PromptTooLong: Not even the newest question fits; the conversation is as before.
    """
    room = room_for_prompt(model.config, options.get("max_new_tokens", 0))
    if drop_oldest(conversation, tokenizer, visual_tokens(model, sizes), room, image_mark(model.config)):
        logger.warning_once("the talk is longer than the context: its oldest questions are left out")
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt").unsqueeze(0)
    ids = ids.to(model.device)
    with torch.inference_mode():
        output = model.generate(
            ids,
            images=pixels,
            image_sizes=sizes,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            stopping_criteria=stopping_criteria(conversation, tokenizer, ids),
            streamer=streamer,
            **options,
        )
    text = tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
    stop = conversation.sep if conversation.sep_style is SeparatorStyle.SINGLE else None
    return text.removesuffix(stop).strip() if stop else text


def move_pixels(pixels: Any, model) -> Any:
    """Bring processed pictures to the model's device and dtype."""
    if isinstance(pixels, list):
        return [image.to(model.device, model.dtype) for image in pixels]
    return pixels.to(model.device, model.dtype)


def eval_model(args: Any) -> str:
    """Load a model, ask it one question, print and return the answer.

    Args:
        args: Attributes as the command line's: `model_path`, `model_base`, `query`, `image_file`, and optionally
            `model_name`, `conv_mode`, `sep`, `temperature`, `top_p`, `num_beams`, `max_new_tokens`, `device`,
            `load_8bit`, `load_4bit`, `image_orientation`, and the DUET flags.

    Raises:
        ValueError: A picture cannot be opened, the model cannot take pictures, or the question is too long.
    """
    images = load_images(image_parser(args), getattr(args, "image_orientation", "exif"))
    model_name = getattr(args, "model_name", None) or get_model_name_from_path(args.model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        model_name,
        load_8bit=getattr(args, "load_8bit", False),
        load_4bit=getattr(args, "load_4bit", False),
        device=getattr(args, "device", None) or "cuda",
        duet_config=ReductionArguments.from_namespace(args),
    )
    if image_processor is None:
        raise ValueError(f"{args.model_path} is a plain language model; it cannot look at pictures")
    conversation = conv_templates[choose_template(model_name, model.config, getattr(args, "conv_mode", None))].copy()
    conversation.append_message(conversation.roles[0], place_images(args.query, len(images), model.config))
    conversation.append_message(conversation.roles[1], None)
    pixels = move_pixels(process_images(images, image_processor, model.config), model)
    options = generation_options(
        getattr(args, "temperature", 0) or 0,
        getattr(args, "top_p", None),
        getattr(args, "num_beams", 1) or 1,
        getattr(args, "max_new_tokens", 512) or 512,
    )
    text = answer(model, tokenizer, conversation, pixels, [image.size for image in images], **options)
    print(text)
    return text


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every inference command has."""
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--model-base", default=None, help="base model of a LoRA or projector folder")
    parser.add_argument("--image-file", required=True, help="path or address of a picture; several separated by --sep")
    parser.add_argument("--sep", default=",", help="separator of several pictures")
    parser.add_argument("--conv-mode", default=None, help="conversation template (default: the model's own)")
    parser.add_argument("--device", default="cuda", help="cuda (NVIDIA and AMD) or cpu")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy")
    parser.add_argument("--top_p", "--top-p", type=float, default=None)
    parser.add_argument("--num_beams", "--num-beams", type=int, default=1)
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=512)
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--load-4bit", action="store_true")
    add_picture_arguments(parser)
    ReductionArguments.add_arguments(parser)


def with_defaults(parser: argparse.ArgumentParser, args: Any) -> argparse.Namespace:
    """Complete what a client passes to a function of LLaVA's that takes parsed flags.

    Args:
        parser: Knows all flags.
        args: Any object with some of them as attributes; it stays as it is.

    Raises:
        ValueError: One without a default is missing.
    """
    given = argparse.Namespace()
    for action in parser._actions:
        if action.dest in ("help", argparse.SUPPRESS):
            continue
        if action.required and getattr(args, action.dest, None) is None:
            raise ValueError(f"args.{action.dest} is missing: {action.help or 'it has no default'}")
        setattr(given, action.dest, getattr(args, action.dest, action.default))
    return given


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.run_llava", description="Ask about pictures.")
    add_model_arguments(parser)
    parser.add_argument("--query", required=True, help="the question; <image-placeholder> marks where a picture goes")
    args = parser.parse_args(argv)
    eval_model(args)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
