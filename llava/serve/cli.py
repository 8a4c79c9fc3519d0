"""Talk with a model about pictures in the terminal; answers stream.

    python -m llava.serve.cli --model-path MODEL --image-file picture.jpg

Questions are read line by line; an empty line or the end of the input ends the talk. With a pipe as input nothing but
the answers is written to the standard output. A talk that outgrows the context loses its oldest questions, never its
pictures.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

from transformers import TextStreamer

from duet.errors import main_guard
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.context import PromptTooLong
from llava.conversation import conv_templates
from llava.eval.run_llava import (
    add_model_arguments,
    answer,
    choose_template,
    generation_options,
    image_parser,
    load_image,
    load_images,
    move_pixels,
    place_images,
)
from llava.mm_utils import get_model_name_from_path, process_images
from llava.model.builder import load_pretrained_model
from llava.reduction import ReductionArguments

__all__ = ["chat", "load_image", "main"]


def questions(role: str) -> Iterator[str]:
    """Yield questions from the standard input until an empty line or its end; a terminal is shown the role."""
    while True:
        if sys.stdin.isatty():
            print(f"{role}: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


def describe_reduction(model) -> str:
    """Say in one line what reaches the language model."""
    patches, depth = model.get_vision_tower().num_patches, model.config.num_hidden_layers
    reduction = model.reduction
    unit = "tile" if getattr(model.config, "image_aspect_ratio", None) == "anyres" else "picture"
    if reduction is None:
        return f"no token reduction: {patches} visual tokens per {unit} in every layer"
    if reduction.per == "picture" and unit == "tile":
        return f"DUET: {reduction.dominant} + {reduction.contextual} visual tokens per picture, shared by its tiles"
    if reduction.adaptive:
        return f"DUET: {patches} patches -> as many visual tokens per picture as it needs ({reduction.stage1})"
    return (
        f"DUET: {patches} patches -> {reduction.entering_tokens(patches)} visual tokens per {unit}, "
        f"{reduction.average_tokens(patches, depth):g} on average over {depth} layers"
    )


def chat(args: argparse.Namespace) -> None:
    """Load the model and talk until the input ends.

    Raises:
        ValueError: A picture cannot be opened, the model cannot take pictures, or a question from a pipe is too long.
    """
    model_name = get_model_name_from_path(args.model_path)
    images = load_images(image_parser(args), args.image_orientation)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        model_name,
        args.load_8bit,
        args.load_4bit,
        device=args.device,
        duet_config=ReductionArguments.from_namespace(args),
    )
    if image_processor is None:
        raise ValueError(f"{args.model_path} is a plain language model; it cannot look at pictures")
    print(describe_reduction(model), file=sys.stderr)
    conversation = conv_templates[choose_template(model_name, model.config, args.conv_mode)].copy()
    pixels = move_pixels(process_images(images, image_processor, model.config), model)
    options = generation_options(args.temperature, args.top_p, args.num_beams, args.max_new_tokens)
    # Beam search cannot stream: it knows its answer only at the end.
    streams = args.num_beams == 1
    user, assistant = conversation.roles
    first = True
    for question in questions(user or "USER"):
        # A typed mark would ask for a picture that is not there.
        question = question.replace(DEFAULT_IMAGE_TOKEN, "")
        conversation.append_message(user, place_images(question, len(images), model.config) if first else question)
        conversation.append_message(assistant, None)
        if sys.stdin.isatty():
            print(f"{assistant}: ", end="", flush=True)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
        try:
            text = answer(model, tokenizer, conversation, pixels, [i.size for i in images], streamer, **options)
        except PromptTooLong as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)
            del conversation.messages[-2:]
            continue
        first = False
        if not streams:
            print(text)
        if args.debug:
            print({"prompt": conversation.get_prompt(), "outputs": text}, file=sys.stderr)
        # The stored turn is what the next prompt repeats.
        conversation.messages[-1][-1] = text


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llava.serve.cli", description="Talk about pictures.")
    add_model_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="also show prompts on the standard error")
    return parser


@main_guard
def _run(argv: list[str] | None) -> None:
    try:
        chat(make_parser().parse_args(argv))
    except KeyboardInterrupt:
        print(file=sys.stderr)


def main(args: argparse.Namespace | list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        args: The words of a command line (default: the program's own), or parsed arguments as LLaVA's `main` takes
            them; then the defaults stand for what they lack, and errors are raised.
    """
    if args is None or isinstance(args, list | tuple):
        return _run(args)
    needed = ["--model-path", str(args.model_path), "--image-file", str(args.image_file)]
    chat(make_parser().parse_args(needed, argparse.Namespace(**vars(args))))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
