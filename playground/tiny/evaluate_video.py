"""Evaluates a tiny Video-LLaVA on the held-out clips, kind by kind.

    python -m playground.tiny.evaluate_video --model-path OUTPUT --data playground/tiny/data/video/heldout.json \\
        --name duet-960 --out results.json [DUET flags]

Without DUET flags the checkpoint's own reduction holds; `--duet_tokens 0` is none. Runs are collected in the JSON file
by name and seed; the Markdown table next to it compares all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AutoConfig, LogitsProcessor, LogitsProcessorList, VideoLlavaForConditionalGeneration

import duet
from duet import DuetConfig
from duet.cells import markdown_cell
from duet.errors import main_guard
from llava.eval.files import require_inside
from llava.eval.video import read_frames
from llava.reduction import ReductionArguments
from llava.sanity import BROKEN, BrokenResult, Watch, refuse, require_finite_weights
from llava.train.hf_chat import Chat, messages_of
from llava.train.hf_model import visual_ids
from llava.train.hf_processor import load_processor
from playground.tiny.evaluate import collect, layer_means, look_at, peak_memory, was_trained
from playground.tiny.evaluate import load_records as read_heldout
from playground.tiny.video_questions import CHANCE, KINDS, UNORDERED

FRAMES = 8
MAX_NEW_TOKENS = 10
REQUIRED = ("id", "video", "kind", "question", "answer", "conversations")
load_records = partial(read_heldout, required=REQUIRED, kinds=KINDS, writer="playground.tiny.build_video")


def load(path: str, base: str | None, reduction: ReductionArguments) -> tuple[Any, Chat]:
    """Load a model with its reduction, and what writes its prompts.

    Args:
        path: a trained model, or an adapter.
        base: the model that an adapter belongs to.
        reduction: flags; with none the checkpoint's reduction holds.
    """
    config = AutoConfig.from_pretrained(path)
    model: Any = VideoLlavaForConditionalGeneration.from_pretrained(base or path, dtype=torch.float32).eval()
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path).eval()
    wanted = reduction.to_config(DuetConfig.from_model_config(config), "video-llava-7b")
    duet.attach(model, wanted or DuetConfig.none())
    return model, Chat(load_processor(path, config), visual_ids(config), 4096)


def prompt(chat: Chat, record: dict[str, Any], folder: Path, seen: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A question's inputs without its answer; the frames of a clip are read once."""
    messages = messages_of(record)[:1]
    text = chat.render(messages, open_turn=True)
    if record["video"] not in seen:
        seen.clear()
        path = require_inside(folder / record["video"], folder, f"record {record['id']}")
        seen[record["video"]] = read_frames(path, FRAMES)
    return chat.processor(
        text=[text], videos=[seen[record["video"]]], return_tensors="pt", add_special_tokens=chat.adds_special(text)
    )


@torch.inference_mode()
def predict(
    model: Any, chat: Chat, prompts: list[dict[str, torch.Tensor]], watch: LogitsProcessor | None = None
) -> list[str]:
    """Greedy answers to a batch of questions; `watch` looks at the logits."""
    longest = max(entry["input_ids"].shape[1] for entry in prompts)
    room = [longest - entry["input_ids"].shape[1] for entry in prompts]
    fill = chat.tokenizer.pad_token_id
    inputs = {
        "input_ids": torch.cat([pad(e["input_ids"], (r, 0), value=fill) for e, r in zip(prompts, room, strict=True)]),
        "attention_mask": torch.cat([pad(e["attention_mask"], (r, 0)) for e, r in zip(prompts, room, strict=True)]),
        "pixel_values_videos": torch.cat([entry["pixel_values_videos"] for entry in prompts]),
    }
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    watching = LogitsProcessorList([] if watch is None else [watch])
    output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, logits_processor=watching)
    answers = chat.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def evaluate(model: Any, chat: Chat, records: list[dict[str, Any]], folder: Path, batch: int) -> dict[str, Any]:
    """Answer every record and count.

    Returns:
        Accuracy per kind and their mean, counts, tokens per layer and their average, seconds per question, peak memory
        and every prediction.
    """
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    predictions, seen, non_finite = {}, {}, 0
    begin = time.perf_counter()
    rest = iter(records)
    with duet.trace(images=False) as trace:
        while group := list(islice(rest, batch)):
            watch = Watch()
            answers = predict(model, chat, [prompt(chat, record, folder, seen) for record in group], watch)
            non_finite += sum(watch.rows(len(group)))
            for record, answer in zip(group, answers, strict=True):
                right[record["kind"]].append(answer == record["answer"])
                predictions[record["id"]] = answer
    accuracy = {kind: mean(marks) for kind, marks in right.items() if marks}
    layers = layer_means(trace, model.config.text_config.num_hidden_layers)
    return {
        "accuracy": accuracy,
        "mean": mean(accuracy.values()),
        "questions": {kind: len(marks) for kind, marks in right.items()},
        "tokens_per_layer": layers,
        "average_tokens": mean(layers),
        "seconds_per_question": (time.perf_counter() - begin) / len(records),
        "peak_memory_mib": peak_memory(),
        "non_finite": non_finite,
        "predictions": predictions,
    }


def _figure(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    text = f"{scale * mean(values):.{digits}f}"
    return f"{text} ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else text


def markdown(runs: list[dict[str, Any]]) -> str:
    """A table with one row per name: mean ± standard deviation over seeds; chance and time-blind guessing above."""
    head = ["run", "seeds", "average visual tokens", "mean %", *(f"{kind} %" for kind in KINDS), "s per training step"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in (("chance", CHANCE), ("digits known, time not", UNORDERED)):
        cells = [name, "", "", _figure([mean(row.values())], 100), *(_figure([row[kind]], 100) for kind in KINDS), ""]
        lines.append("| " + " | ".join(cells) + " |")
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        broken = " **(BROKEN, no result)**" if any(run.get("broken") for run in own) else ""
        cells = [markdown_cell(name) + broken, str(len(own)), _figure([run["average_tokens"] for run in own])]
        cells.append(_figure([run["mean"] for run in own], 100))
        for kind in KINDS:
            values = [run["accuracy"][kind] for run in own if kind in run["accuracy"]]
            cells.append(_figure(values, 100) if values else "n/a")
        steps = [run["seconds_per_step"] for run in own if run.get("seconds_per_step")]
        cells.append(_figure(steps, 1, 2) if steps else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--model-base", help="the model that an adapter belongs to")
    parser.add_argument("--data", default="playground/tiny/data/video/heldout.json")
    parser.add_argument("--name", help="row of the table; default: the last part of --model-path")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training run, to average rows of one name")
    parser.add_argument("--out", default="results.json")
    parser.add_argument("--limit", type=int, help="use only this many questions")
    parser.add_argument("--batch", type=int, default=7)
    ReductionArguments.add_arguments(parser)
    return parser


@main_guard(statuses={BrokenResult: BROKEN})
def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    args = make_parser().parse_args(argv)
    records = load_records(args.data)[: args.limit]
    model, chat = load(args.model_path, args.model_base, ReductionArguments.from_namespace(args))
    require_finite_weights(model, args.model_path)
    run = evaluate(model, chat, records, Path(args.data).parent, args.batch)
    run |= {"name": args.name or Path(args.model_path).name, "seed": args.seed, "reduction": model.config.duet}
    done = Path(args.model_path) / "run_complete.json"
    if done.is_file():
        run["seconds_per_step"] = json.loads(done.read_text(encoding="utf-8")).get("seconds_per_step")
    run["broken"] = look_at(run, CHANCE, was_trained(args.model_path, None))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    table = markdown(collect(out, run))
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    refuse({run["name"]: run["broken"]})


if __name__ == "__main__":
    raise SystemExit(main())
