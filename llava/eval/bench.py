"""How much faster batches answer than single questions: python -m llava.eval.bench

Both are timed in turn, round by round, on the same questions; the ratio is the median of the rounds' own ratios, so
that a machine that is busy at times meets both alike. What a batch gains depends on how many questions share a
picture, which is then encoded once: 1 in most of ScienceQA, 2 in MME, 18 in POPE, 32 in GQA, 6 in the tiny world's POPE
and MME. Without --model-path the model is put together from a language
model and a vision tower with a random projector, and every answer has --new-tokens tokens, because its cost is what is
measured and not its answers.

On a CPU a batch saves little of a full-token prefill, which is limited by arithmetic; it saves the tower where pictures
are shared, and the overhead of short sequences.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from duet.errors import main_guard
from llava.eval.generate import IMAGE_TEMPLATE, Answerer
from llava.eval.runner import Item, make_batches
from llava.eval.tasks.base import SHORT_ANSWER, Question
from llava.mm_utils import get_model_name_from_path
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.reduction import ReductionArguments
from llava.tokenization import load_tokenizer

QUESTION = "Is there a {} in the image?" + SHORT_ANSWER
THINGS = ("cat", "dining table", "traffic light", "person", "cup of coffee", "tree", "red bus", "pair of skis")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default=None, help="a LLaVA checkpoint")
    parser.add_argument("--llm", default="playground/tiny/weights/llm", help="without --model-path: language model")
    parser.add_argument("--tower", default="playground/tiny/weights/clip", help="without --model-path: vision tower")
    parser.add_argument("--batch", type=int, default=8, help="the batch size that is compared with 1")
    parser.add_argument("--samples", type=int, default=24, help="questions a round")
    parser.add_argument("--per-picture", type=int, nargs="+", default=[1, 6], help="questions about one picture")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=3, help="tokens of every answer")
    parser.add_argument("--device", default="cuda", help="cuda (NVIDIA and AMD) or cpu")
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 192, 64], help="DUET presets; 0 is no reduction")
    return parser


def join_parts(llm: str, tower: str, device: str) -> tuple[Any, Any, Any]:
    """A LLaVA from a language model and a tower, with a random projector: `(tokenizer, model, image_processor)`."""
    torch.manual_seed(0)
    model: Any = LlavaLlamaForCausalLM.from_pretrained(llm)
    options = SimpleNamespace(vision_tower=tower, mm_vision_select_layer=-2, mm_projector_type="mlp2x_gelu")
    model.get_model().initialize_vision_modules(options)
    on_accelerator = device.startswith("cuda") and torch.cuda.is_available()
    model = model.to(device, torch.float16) if on_accelerator else model.float()
    return load_tokenizer(llm), model.eval(), model.get_vision_tower().image_processor


def load(args: argparse.Namespace) -> Answerer:
    """The model that is timed."""
    if args.model_path is None:
        tokenizer, model, processor = join_parts(args.llm, args.tower, args.device)
    else:
        name = get_model_name_from_path(args.model_path)
        tokenizer, model, processor, _ = load_pretrained_model(args.model_path, None, name, device=args.device)
    return Answerer(model, tokenizer, processor, IMAGE_TEMPLATE)


def make_samples(count: int, side: int, per_picture: int) -> list[tuple[str, list[Image.Image]]]:
    """Questions of slightly different lengths, so many about one picture, one after the other."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    pictures = [Image.fromarray(pixels[index].numpy()) for index in range(count)]
    return [(QUESTION.format(THINGS[index % len(THINGS)]), [pictures[index // per_picture]]) for index in range(count)]


def seconds(answerer: Answerer, samples: list, batch: int, new_tokens: int) -> float:
    """Time to answer all samples, in the batches that the runner makes."""
    begin = time.perf_counter()
    items = [
        Item(Question(str(n), n, text, (Path(str(id(pictures[0]))),)), 1, tuple(answerer.prompt_ids(text, 1)))
        for n, (text, pictures) in enumerate(samples)
    ]
    for group in make_batches(items, batch):
        asked = [samples[int(item.question.question_id)] for item in group]
        answerer.answer(asked, new_tokens, min_new_tokens=new_tokens)
    return time.perf_counter() - begin


def measure(answerer: Answerer, samples: list, batch: int, new_tokens: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds of batch 1 and of `batch`, per round, one after the other and in changing order."""
    found = []
    for size in (1, batch):
        seconds(answerer, samples[:batch], size, new_tokens)
    for number in range(rounds):
        sizes = (1, batch) if number % 2 == 0 else (batch, 1)
        times = {size: seconds(answerer, samples, size, new_tokens) for size in sizes}
        found.append((times[1], times[batch]))
    return found


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    if args.batch < 2 or args.samples < args.batch or min(args.rounds, args.new_tokens, *args.per_picture) < 1:
        raise ValueError("--batch must be at least 2, --samples at least --batch, the other numbers at least 1")
    answerer = load(args)
    machine = f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} before"
    print(f"{args.samples} questions, {args.new_tokens} tokens each, {args.rounds} rounds, {machine}")
    print(
        "visual tokens, questions per picture: ms a sample at batch 1 and at batch N (medians), how many times as fast"
    )
    side = answerer.model.get_vision_tower().config.image_size
    for tokens, per_picture in itertools.product(args.budgets, args.per_picture):
        answerer.model.set_reduction(ReductionArguments(duet_tokens=tokens).to_config())
        samples = make_samples(args.samples, side, per_picture)
        times = measure(answerer, samples, args.batch, args.new_tokens, args.rounds)
        ratios = [single / batched for single, batched in times]
        one, many = (statistics.median(column) / args.samples * 1000 for column in zip(*times, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{tokens or 'full':>5}, {per_picture}: {one:7.1f} ms, {many:7.1f} ms, {spread}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
