"""A small LLaVA with random weights, and two benchmarks in their real layouts, for the tests of the runner."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava.eval.tasks.pope import Pope
from llava.eval.tasks.scienceqa import ScienceQa
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests" / "golden" / "tokenizer"
PATCHES, LAYERS = 36, 4
REDUCTION = [
    "--dominant", "10", "--contextual", "2", "--layer_list", "[1,3]", "--image_token_ratio_list", "[0.5,0.0]"
]  # fmt: skip
THINGS = ("cat", "dining table", "dog", "traffic light", "cup", "pair of skis and a very long scarf")


def build_model(folder: Path) -> Path:
    """Write a whole checkpoint: 84 px tower (36 patches), 4 decoder layers.

    Weights are large, so that no two tokens are about equally likely, and every seventh token ends an answer, so that
    answers differ in length.
    """
    torch.manual_seed(0)
    tower, llm, model = folder / "clip", folder / "llm", folder / "tiny-llava"
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=84, patch_size=14
    )
    CLIPVisionModel(vision).save_pretrained(tower)
    CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84}).save_pretrained(tower)
    text = LlamaConfig(
        vocab_size=2000, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        initializer_range=0.4,
    )  # fmt: skip
    LlamaForCausalLM(text).save_pretrained(llm)
    built = LlavaLlamaForCausalLM.from_pretrained(llm)
    built.get_model().initialize_vision_modules(
        SimpleNamespace(vision_tower=str(tower), mm_vision_select_layer=-2, mm_projector_type="mlp2x_gelu")
    )
    for parameter in built.get_model().mm_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    built.config.image_aspect_ratio = "pad"
    built.config.mm_use_im_patch_token = False
    built.generation_config.eos_token_id = [2, *range(3, 2000, 7)]
    built.save_pretrained(model)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / name, model / name)
    return model


@contextlib.contextmanager
def short_answers(folder: Path, tokens: int) -> Iterator[SimpleNamespace]:
    """The model and the benchmarks, whose answers have at most so many tokens inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        for task in (Pope, ScienceQa):
            patch.setattr(task, "max_new_tokens", tokens)
        yield build_world(folder)


def load_model(folder: Path) -> tuple:
    """Write that checkpoint and load it: tokenizer, model and image processor."""
    return load_pretrained_model(str(build_model(folder)), None, "tiny-llava", device="cpu")[:3]


def noise(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A picture of noise, (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def save_picture(path: Path, seed: int) -> None:
    """A picture of noise with a shape of its own."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (40 + seed % 3 * 20, 60, 3), dtype=np.uint8)).save(path)


def write_pope(root: Path, count: int = 6) -> None:
    """POPE with `count` questions a category, two on each picture."""
    folder = root / "pope"
    for category in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": index + 1,
                "image": f"COCO_val2014_{index // 2:012d}.jpg",
                "text": f"Is there a {THINGS[index % len(THINGS)]} in the image?",
                "label": ("yes", "no")[index % 2],
            }
            for index in range(count)
        ]
        (folder / "coco").mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "coco" / f"coco_pope_{category}.json").write_text(lines)
    for number in range(count // 2):
        save_picture(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", number)


def write_scienceqa(root: Path, count: int = 6) -> None:
    """ScienceQA, every other problem without a picture."""
    folder = root / "scienceqa"
    problems = {
        str(index): {
            "question": f"Which {THINGS[index % len(THINGS)]} is it?",
            "choices": ["one", "two", "three"],
            "answer": index % 3,
            "hint": "A hint." if index % 3 == 0 else "",
            "image": "image.png" if index % 2 else None,
        }
        for index in range(count)
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    (folder / "images" / "test").mkdir(parents=True, exist_ok=True)
    for key, problem in problems.items():
        if problem["image"]:
            save_picture(folder / "images" / "test" / key / "image.png", int(key))


def build_world(folder: Path) -> SimpleNamespace:
    """`model` (a checkpoint) and `root` (the benchmarks)."""
    root = folder / "eval"
    write_pope(root)
    write_scienceqa(root)
    return SimpleNamespace(folder=folder, model=build_model(folder), root=root)


def flags(world: SimpleNamespace, out: Path, *more: object, benchmarks: str = "pope") -> list[str]:
    """A command line of `python -m llava.eval`."""
    fixed = ["--model-path", world.model, "--root", world.root, "--out", out, "--benchmarks", benchmarks]
    return [str(part) for part in (*fixed, "--workers", 0, "--device", "cpu", *more)]


def only(folder: Path, pattern: str) -> Path:
    """The one file below a folder that fits."""
    found = sorted(folder.rglob(pattern))
    assert len(found) == 1, found
    return found[0]


def answers_file(out: Path, benchmark: str = "pope") -> Path:
    """The merged answers of a run with one group of settings."""
    return only(out, f"{benchmark}-????????????.jsonl")


def in_processes(function: Callable, *arguments: object, world: int = 1) -> list[int | None]:
    """Call `function(*arguments)` in forked processes with torchrun's variables; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    group = [context.Process(target=_child, args=(rank, world, port, function, arguments)) for rank in range(world)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    return [process.exitcode for process in group]


def _child(rank: int, world: int, port: int, function: Callable, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    raise SystemExit(function(*arguments))
