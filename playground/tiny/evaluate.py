"""Evaluates LLaVA checkpoints on the tiny world's held-out questions.

    python -m playground.tiny.evaluate --model-path OUTPUT --data playground/tiny/data/heldout.json --name duet-192 \\
        --out results.json --overlays 4 [DUET flags]

Runs are collected in the JSON file by name and seed; the Markdown table next to it compares all of them. Exit status:
0; 1 for a wrong request; 3 if what came out is no result: NaN, empty or identical answers, or every kind at or below
chance after training. It is written and marked then, and the reason is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

import duet
from duet.errors import main_guard
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.eval.files import require_inside
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pictures import read_picture
from llava.reduction import ReductionArguments
from llava.sanity import (
    BROKEN,
    SHORT_RUN,
    BrokenResult,
    Group,
    Watch,
    about_answers,
    about_chance,
    refuse,
    require_finite_weights,
)
from llava.train.checkpoints import RUN_MARKER
from playground.tiny.questions import CHANCE, KINDS
from playground.tiny.report import write_table

TEMPLATE = "vicuna_v1"
MAX_NEW_TOKENS = 12
REQUIRED = ("id", "image", "kind", "question", "answer")


@dataclass(frozen=True)
class Question:
    """One held-out question with its prompt's token ids."""

    name: str
    image: str
    kind: str
    answer: str
    ids: tuple[int, ...]


def load_records(
    path: str, required: Sequence[str] = REQUIRED, kinds: Sequence[str] = KINDS, writer: str = "playground.tiny.build"
) -> list[dict[str, Any]]:
    """Read a held-out file.

    Args:
        path: of the file.
        required: fields of every record.
        kinds: of questions.
        writer: the module that writes such files.

    Raises:
        ValueError: the file is no list of records, or a record lacks a field or has an unknown kind; names it.
    """
    with open(path, encoding="utf-8") as file:
        try:
            records = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a non-empty list of records, as `{writer}` writes it")
    for number, record in enumerate(records):
        missing = [key for key in required if key not in record]
        if missing:
            raise ValueError(f"{path}, record {number}: {', '.join(missing)} missing; expected {', '.join(required)}")
        if record["kind"] not in kinds:
            raise ValueError(f"{path}, record {record['id']}: kind {record['kind']!r}, expected one of {kinds}")
    return records


def make_question(record: dict, tokenizer) -> Question:
    """The record's prompt in LLaVA's vicuna_v1 template."""
    conversation = conv_templates[TEMPLATE].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{record['question']}")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer)
    return Question(record["id"], record["image"], record["kind"], record["answer"], tuple(ids))


def batches(questions: list[Question], size: int) -> Iterator[list[Question]]:
    """Batches of prompts of equal length, so that no row is padded."""
    ordered = sorted(questions, key=lambda q: len(q.ids))
    for _, group in groupby(ordered, key=lambda q: len(q.ids)):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


class Pixels:
    """Preprocessed images by name; each file is read once."""

    def __init__(self, folder: str, processor, config):
        self.folder, self.processor, self.config = folder, processor, config
        self.found: dict[str, torch.Tensor] = {}

    def picture(self, name: str) -> Image.Image:
        """The image file as RGB.

        Raises:
            ValueError: it cannot be opened, or lies outside of the folder; names it.
        """
        path = require_inside(Path(self.folder) / name, Path(self.folder), "the held-out questions")
        return read_picture(str(path))

    def __call__(self, names: list[str]) -> torch.Tensor:
        """Pixels [B, 3, H, W] of some images."""
        for name in names:
            if name not in self.found:
                self.found[name] = process_images([self.picture(name)], self.processor, self.config)[0]
        return torch.stack([self.found[name] for name in names])


def peak_memory() -> float:
    """Highest memory use of this process so far in MiB: of the accelerator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.inference_mode()
def predict(model, tokenizer, pixels: Pixels, group: list[Question], watch: LogitsProcessor | None = None) -> list[str]:
    """Greedy answers to a batch of questions of equal length; `watch` looks at the logits."""
    ids = torch.tensor([q.ids for q in group], device=model.device)
    images = pixels([q.image for q in group]).to(model.device, model.dtype)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        ids,
        images=images,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        use_cache=True,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([] if watch is None else [watch]),
    )
    return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


def layer_means(trace: duet.Trace, depth: int) -> list[float]:
    """Visual tokens that each decoder layer saw in the prefills, averaged over samples."""
    total, count = [0.0] * depth, 0
    for segments in trace.passes:
        rows = len(segments[0].visual)
        if not any(segments[0].visual):
            continue
        count += rows
        for segment in segments:
            for layer in range(segment.start, segment.stop):
                total[layer] += sum(segment.visual)
    return [round(value / max(count, 1), 2) for value in total]


def evaluate(model, tokenizer, processor, records: list[dict], folder: str, batch: int) -> dict:
    """Answer every record and count.

    Returns:
        accuracy per kind and their mean, counts, tokens per layer and their average, seconds per question, peak memory,
        how many answers come from logits that are NaN, and every prediction.
    """
    questions = [make_question(record, tokenizer) for record in records]
    pixels = Pixels(folder, processor, model.config)
    pixels(sorted({q.image for q in questions}))
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    predictions: dict[str, str] = {}
    non_finite = 0
    begin = time.perf_counter()
    with duet.trace(images=False) as trace, tqdm(total=len(questions), unit="question", desc="evaluate") as bar:
        for group in batches(questions, batch):
            watch = Watch()
            texts = predict(model, tokenizer, pixels, group, watch)
            non_finite += sum(watch.rows(len(group)))
            for question, text in zip(group, texts, strict=True):
                right[question.kind].append(text == question.answer)
                predictions[question.name] = text
            bar.update(len(group))
    seconds = time.perf_counter() - begin
    accuracy = {kind: sum(marks) / len(marks) for kind, marks in right.items() if marks}
    layers = layer_means(trace, model.config.num_hidden_layers)
    return {
        "accuracy": accuracy,
        "mean": sum(accuracy.values()) / len(accuracy),
        "questions": {kind: len(marks) for kind, marks in right.items()},
        "tokens_per_layer": layers,
        "average_tokens": sum(layers) / len(layers),
        "seconds_per_question": seconds / len(questions),
        "peak_memory_mib": peak_memory(),
        "non_finite": non_finite,
        "predictions": predictions,
    }


def look_at(run: dict[str, Any], chance: Mapping[str, float], trained: bool) -> list[str]:
    """Return what says that a run is no result; see `llava.sanity`.

    Args:
        run: what `evaluate` returned.
        chance: share of right answers that guessing gives, by kind.
        trained: a training of some length made the model, so that chance is an error.
    """
    found = about_answers(list(run["predictions"].values()), run["mean"], run.get("non_finite", 0))
    if trained:
        counts, accuracy = run["questions"], run["accuracy"]
        found += about_chance(
            {kind: Group(share * counts[kind], counts[kind], chance[kind]) for kind, share in accuracy.items()}
        )
    return found


def was_trained(model_path: str, log: dict[str, Any] | None) -> bool:
    """Whether a training of some length ended with this model.

    Args:
        model_path: its folder, where a training that ended leaves a marker.
        log: what --train-log holds, or None.
    """
    marker = Path(model_path) / RUN_MARKER
    if log is None and marker.is_file():
        log = json.loads(marker.read_text(encoding="utf-8"))
    steps = None if log is None else log.get("step")
    return isinstance(steps, int) and steps >= SHORT_RUN


def draw_overlays(model, tokenizer, processor, records: list[dict], folder: str, count: int, out: Path) -> list[Path]:
    """Write what happened to the patches of the first `count` images, one PNG each."""
    from duet.draw import save_overlays

    pixels = Pixels(folder, processor, model.config)
    first = {record["image"]: record for record in reversed(records)}
    chosen = [first[name] for name in sorted(first)[:count]]
    with duet.trace() as trace:
        for record in chosen:
            predict(model, tokenizer, pixels, [make_question(record, tokenizer)])
    if len(trace.images) != len(chosen):
        return []
    return save_overlays([pixels.picture(r["image"]) for r in chosen], trace.images, out)


def collect(path: Path, run: dict) -> list[dict]:
    """Add a run to the results file, replacing one of the same name and seed; returns all runs."""
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    runs = [old for old in runs if (old["name"], old["seed"]) != (run["name"], run["seed"])] + [run]
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(runs, indent=1), encoding="utf-8")
    os.replace(part, path)
    return runs


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--model-base", default=None)
    parser.add_argument("--data", default="playground/tiny/data/heldout.json")
    parser.add_argument("--image-folder", help="default: the folder of --data")
    parser.add_argument("--name", help="row of the table; default: the last part of --model-path")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training run, to average rows of one name")
    parser.add_argument("--no-reduction", action="store_true", help="ignore the reduction that the checkpoint names")
    parser.add_argument("--out", default="results.json")
    parser.add_argument("--limit", type=int, help="use only this many questions")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--overlays", type=int, default=0, help="pictures of what was kept")
    parser.add_argument("--train-log", help="JSON file with seconds_per_step and peak_memory_mib of the training")
    ReductionArguments.add_arguments(parser)
    return parser.parse_args()


@main_guard(statuses={BrokenResult: BROKEN})
def main() -> None:
    """Command line entry."""
    args = parse_arguments()
    records = load_records(args.data)[: args.limit]
    folder = args.image_folder or os.path.dirname(args.data)
    wanted = "none" if args.no_reduction else ReductionArguments.from_namespace(args)
    tokenizer, model, processor, _ = load_pretrained_model(
        args.model_path, args.model_base, get_model_name_from_path(args.model_path), duet_config=wanted
    )
    require_finite_weights(model, args.model_path)
    run = evaluate(model, tokenizer, processor, records, folder, args.batch)
    run |= {"name": args.name or get_model_name_from_path(args.model_path), "seed": args.seed}
    run["reduction"] = getattr(model.config, "duet", None)
    log = json.loads(Path(args.train_log).read_text(encoding="utf-8")) if args.train_log else None
    run["broken"] = look_at(run, CHANCE, was_trained(args.model_path, log))
    if log is not None:
        run["training"] = log
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    table = write_table(collect(out, run), out.with_suffix(".md"))
    if args.overlays:
        target = out.parent / f"overlays-{run['name']}"
        paths = draw_overlays(model, tokenizer, processor, records, folder, args.overlays, target)
        print(f"{len(paths)} overlays in {target}")
    print(table)
    refuse({run["name"]: run["broken"]})


if __name__ == "__main__":
    raise SystemExit(main())
