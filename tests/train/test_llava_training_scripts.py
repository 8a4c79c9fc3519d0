"""LLaVA's ten training scripts, one step each in the tiny world, with only their paths changed.

A script's command is what its `deepspeed` is called with. Each runs in this process without DeepSpeed's launcher; one
goes through the real launcher as well (slow).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import train_world
from train_world import ROOT

SCRIPTS = ROOT / "scripts"
NAMES = [
    "pretrain_xformers",
    "v1_5/pretrain",
    "finetune_full_schedule",
    "finetune_lora",
    "finetune_qlora",
    "finetune_sqa",
    "v1_5/finetune",
    "v1_5/finetune_lora",
    "v1_5/finetune_task",
    "v1_5/finetune_task_lora",
]
# What a machine without an accelerator cannot do, and one step of the tiny world.
ONE_STEP = ["--max_steps", "1", "--save_strategy", "no", "--dataloader_num_workers", "0", "--report_to", "none"]
RECORDER = """#!{python}
import json, sys
open({out!r}, "w").write(json.dumps(sys.argv[1:]))
"""


def command_of(name: str, folder: Path, **environment: str) -> list[str]:
    """The words that a script passes to `deepspeed`: a stand-in of that name writes them down."""
    bin_folder, out = folder / "bin", folder / "words.json"
    bin_folder.mkdir(exist_ok=True)
    stand_in = bin_folder / "deepspeed"
    stand_in.write_text(RECORDER.format(python=sys.executable, out=str(out)))
    stand_in.chmod(0o755)
    env = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"} | environment
    subprocess.run(["bash", str(SCRIPTS / f"{name}.sh")], env=env, cwd=ROOT, check=True, timeout=60)
    return json.loads(out.read_text())


def flags_of(words: list[str]) -> dict[str, str]:
    """Flags of a command, each with its one value."""
    pairs = words[1:]
    assert all(flag.startswith("--") for flag in pairs[::2]) and len(pairs) % 2 == 0, pairs
    return {flag[2:]: value for flag, value in zip(pairs[::2], pairs[1::2], strict=True)}


def with_paths(flags: dict[str, str], world, folder: Path, start: Path | None = None) -> list[str]:
    """The command with the tiny world's paths."""
    data, images = world.captions if flags["version"] == "plain" else world.data
    paths = {
        "model_name_or_path": start or world.model, "data_path": data, "image_folder": images,
        "vision_tower": world.tower, "output_dir": folder / "out",
    }  # fmt: skip
    if "pretrain_mm_mlp_adapter" in flags:
        kind = flags.get("mm_projector_type", "linear")
        paths["pretrain_mm_mlp_adapter"] = projector_file(folder, kind)
    changed = flags | {name: str(value) for name, value in paths.items()}
    changed.pop("deepspeed")
    return [word for name, value in changed.items() for word in (f"--{name}", value)] + ONE_STEP


def projector_file(folder: Path, kind: str) -> Path:
    """A projector as stage 1 writes it; the towers of the tiny world and its models are 32 wide."""
    import torch

    sizes = {"linear": [""], "mlp2x_gelu": ["0.", "2."]}[kind]
    torch.manual_seed(0)
    state = {f"model.mm_projector.{place}weight": torch.randn(32, 32) / 6 for place in sizes}
    state |= {f"model.mm_projector.{place}bias": torch.zeros(32) for place in sizes}
    torch.save(state, folder / "mm_projector.bin")
    return folder / "mm_projector.bin"


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A finished LLaVA, which the task scripts start from."""
    from llava.train.arguments import parse_arguments
    from llava.train.train import run

    folder = tmp_path_factory.mktemp("finished")
    none = dict.fromkeys(("dominant", "contextual", "layer_list", "image_token_ratio_list"))
    tiny = {"model_name_or_path": world.model, "vision_tower": world.tower, "max_steps": 1, "save_strategy": "no"}
    run(parse_arguments(train_world.command_line(folder, world.data, "llava-tiny", **(none | tiny))))
    return folder / "llava-tiny"


@pytest.mark.parametrize("name", NAMES)
def test_a_script_trains_one_step_with_only_its_paths_changed(name, world, tmp_path, request, monkeypatch):
    from llava.train.arguments import parse_arguments
    from llava.train.train import run

    flags = flags_of(command_of(name, tmp_path))
    start = request.getfixturevalue("finished") if "task" in name else None
    if flags.get("bits") == "4":
        pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes")
    args = parse_arguments(with_paths(flags, world, tmp_path, start))
    assert run(args) is False
    assert list(train_world.losses(tmp_path)) == [1]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    if flags["version"] == "plain":
        assert "mm_projector.bin" in written
    elif "lora_enable" in flags:
        assert {"adapter_config.json", "non_lora_trainables.bin", "config.json"} <= written
    else:
        assert {"model.safetensors", "config.json"} <= written


def test_scripts_name_llavas_recipes():
    """The numbers that make the recipe; the same in all ten where LLaVA's are."""
    for name in NAMES:
        text = (SCRIPTS / f"{name}.sh").read_text()
        assert "--warmup_ratio 0.03" in text and "--weight_decay 0." in text and "--lr_scheduler_type cosine" in text
        assert ("zero3" in text) == (name.startswith("v1_5/finetune"))
        assert ("--image_aspect_ratio pad --group_by_modality_length True" in text) == name.startswith("v1_5/finetune")


def test_variables_choose_the_model_of_the_first_generation(tmp_path):
    flags = flags_of(
        command_of("finetune_lora", tmp_path, MODEL_VERSION="llama-2-7b-chat", PROMPT_VERSION="llava_llama_2")
    )
    assert flags["version"] == "llava_llama_2" and flags["model_name_or_path"] == "./checkpoints/llama-2-7b-chat"
    assert flags["output_dir"] == "./checkpoints/llava-llama-2-7b-chat-finetune_lora"


@pytest.mark.slow
@pytest.mark.nodes
def test_a_script_runs_under_the_real_launcher(world, tmp_path):
    """`deepspeed llava/train/train_mem.py` by its path, with the DeepSpeed file that the script names."""
    words = command_of("v1_5/finetune", tmp_path)
    flags = flags_of(words)
    command = [*with_paths(flags, world, tmp_path), "--deepspeed", flags["deepspeed"]]
    head = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1", "--master_port"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.run(
        [*head, train_world.port(), words[0], *command],
        env=train_world.environment(PATH=path), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    assert list(train_world.losses(tmp_path)) == [1]
    assert shutil.which("deepspeed", path=path)
