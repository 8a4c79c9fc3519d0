"""A small world for the training tests: records, pictures, and command lines on the golden tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from llava.train.runtime import free_port

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
MODEL = GOLDEN / "llava_tiny"
TOWER = GOLDEN / "clip_tiny"


def write_data(folder: Path, count: int = 16, text_only: int = 4, seed: int = 0) -> tuple[Path, Path]:
    """Write records with pictures and without.

    Returns:
        The annotation file and the image folder.
    """
    rng = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(count):
        turns = [
            {"from": "human", "value": f"what is in picture {index}?"},
            {"from": "gpt", "value": "a " + "red " * (index % 3) + f"thing number {index}"},
        ]
        record = {"id": f"r{index}", "conversations": turns}
        if index >= text_only:
            name = f"p{index}.png"
            Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(images / name)
            record["image"] = name
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        records.append(record)
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path, images


def write_captions(folder: Path, count: int = 8) -> tuple[Path, Path]:
    """Write stage-1 records: one picture, one caption."""
    path, images = write_data(folder, count=count, text_only=0)
    return path, images


def command_line(folder: Path, data: tuple[Path, Path], output: str = "out", **flags: object) -> list[str]:
    """Flags of a short finetuning run in fp32; keyword arguments override, None removes."""
    values: dict[str, object] = {
        "model_name_or_path": MODEL,
        "version": "v1",
        "data_path": data[0],
        "image_folder": data[1],
        "vision_tower": TOWER,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "output_dir": folder / output,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "warmup_steps": 0,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "model_max_length": 2048,
        "report_to": "none",
        "disable_tqdm": True,
        "dominant": 20,
        "contextual": 4,
        "layer_list": "[4,6]",
        "image_token_ratio_list": "[0.5,0.0]",
    }
    values.update(flags)
    return [item for key, value in values.items() if value is not None for item in (f"--{key}", str(value))]


def figures(folder: Path, output: str = "out") -> list[dict]:
    """The metric records of a run."""
    lines = (folder / output / "train_log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "metrics"]


def losses(folder: Path, output: str = "out") -> dict[int, float]:
    """Loss by step; a step that was trained twice counts as it came out last."""
    return {record["step"]: record["loss"] for record in figures(folder, output) if "loss" in record}


PORTS: list[int] = []


def port() -> str:
    """A free port for the ranks of a launched run; what the run leaves in shared memory goes when the test ends."""
    PORTS.append(free_port())
    return str(PORTS[-1])


def environment(**extra: str) -> dict[str, str]:
    """Environment of a subprocess: this checkout first, one thread, no launcher variables."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    return (
        env
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline"}
        | extra
    )


def spawn(arguments: list[str], **extra: str) -> subprocess.Popen:
    """Start `python -m llava.train.train` in the background."""
    command = [sys.executable, "-m", "llava.train.train", *arguments]
    return subprocess.Popen(
        command, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def start_ranks(
    arguments: list[str], launcher: str = "deepspeed", module: str = "llava.train.train", ranks: int = 2, **env: str
) -> subprocess.Popen:
    """Start a training on several ranks; its output goes to the pipe."""
    if launcher == "deepspeed":
        head = ["deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", port(), "--module"]
    else:
        head = ["torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port(), "-m"]
    command = [sys.executable, "-m", *head, module, *arguments]
    return subprocess.Popen(
        command, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def finish(process: subprocess.Popen, limit: float = 240) -> tuple[int, str]:
    """Wait for a run that must not hang; returns its exit code and output."""
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        pytest.fail(f"no end after {limit} s: the ranks wait for each other\n{process.communicate()[0][-3000:]}")
    return process.returncode, output


def build_base(folder: Path, layers: int = 4) -> dict[str, Path]:
    """Write a language model and a tower that are smaller than the golden ones, to be put together by a run.

    Returns:
        `model` and `tower` folders.
    """
    import shutil

    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tower, model = folder / "clip", folder / "llm"
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=84, patch_size=14
    )
    CLIPVisionModel(vision).save_pretrained(tower)
    size = {"height": 84, "width": 84}
    CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size=size).save_pretrained(tower)
    text = LlamaConfig(
        vocab_size=2000, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4
    )
    LlamaForCausalLM(text).save_pretrained(model)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "tokenizer" / name, model / name)
    return {"model": model, "tower": tower}
