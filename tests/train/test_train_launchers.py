"""Real launchers on two CPU ranks: ZeRO-3 with a text-only rank, equality with one rank, kill and resume, SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import train_world
from PIL import Image
from train_world import finish, start_ranks

SCRIPTS = train_world.ROOT / "scripts"
pytestmark = pytest.mark.slow


@pytest.fixture
def text_rank_data(tmp_path):
    """Records whose order, unshuffled in pairs, often gives one rank text only: three of four have no picture."""
    return train_world.write_data(tmp_path / "data", count=16, text_only=12)


def test_zero3_with_text_only_ranks_equals_one_rank(train, flags, tmp_path, text_rank_data):
    """Two ranks see the passes that one rank accumulates, so losses and weights have to agree; and nothing hangs."""
    import torch
    from safetensors.torch import load_file

    shared = {"data_path": text_rank_data[0], "image_folder": text_rank_data[1], "max_steps": 4, "save_steps": 4}
    # A projector of its own would start differently: under ZeRO-3, loading the tower draws other random numbers.
    train("stage1", captions=True, max_steps=1, save_strategy="no")
    shared |= {"mm_projector_lr": 5e-4, "seed": 3, "pretrain_mm_mlp_adapter": tmp_path / "stage1" / "mm_projector.bin"}
    # With a feature cache one rank may need the tower, whose weights lie on both, when the other does not.
    zero3 = flags("zero3", deepspeed=SCRIPTS / "zero3.json", feature_cache=tmp_path / "cache", **shared)
    code, output = finish(start_ranks(zero3))
    assert code == 0, output[-3000:]
    train("single", gradient_accumulation_steps=2, **shared)
    one, two = train_world.losses(tmp_path, "single"), train_world.losses(tmp_path, "zero3")
    assert sorted(one) == sorted(two) == [1, 2, 3, 4]
    gaps = [abs(one[step] - two[step]) for step in one]
    print(f"2 ranks (ZeRO-3) against 1 rank: loss differs by at most {max(gaps):.2e}, on average {sum(gaps) / 4:.2e}")
    assert max(gaps) < 1e-4
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("single", "zero3"))
    assert set(first) == set(second)
    assert all(torch.allclose(first[key], second[key], atol=2e-4) for key in first)
    lines = [line for line in train_world.figures(tmp_path, "zero3") if "loss" in line]
    assert all(line["lr_mm_projector"] == pytest.approx(line["learning_rate"] / 2) for line in lines)


def test_zero3_with_tiles_equals_one_rank(train, flags, tmp_path):
    """Pictures of 3 to 5 tower passes on one rank, text only on the other; budgets that leave some pictures whole."""
    rows, images = train_world.write_data(tmp_path / "data", count=12, text_only=7)
    shared = {
        "data_path": rows, "image_folder": images, "max_steps": 3, "save_steps": 3, "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": "[(84, 168), (168, 84), (168, 168)]",
    }  # fmt: skip
    for number, size in enumerate([(170, 160), (300, 60), (60, 200)]):
        Image.new("RGB", size, (40 * number, 90, 200)).save(images / f"p{8 + number}.png")
    stage1 = {name: shared[name] for name in ("image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints")}
    train("stage1", captions=True, max_steps=1, save_strategy="no", **stage1)
    shared |= {"seed": 3, "pretrain_mm_mlp_adapter": tmp_path / "stage1" / "mm_projector.bin"}
    (tmp_path / "reduction.json").write_text(
        '{"dominant": 40, "contextual": 6, "schedule": {"2": 0.5}, "per": "picture"}'
    )
    off = dict.fromkeys(("dominant", "contextual", "layer_list", "image_token_ratio_list"))
    for name, kind in {"duet": off | {"reduction_config": tmp_path / "reduction.json"}, "baseline": off}.items():
        code, output = finish(start_ranks(flags(f"{name}-3", deepspeed=SCRIPTS / "zero3.json", **shared | kind)))
        assert code == 0, output[-3000:]
        train(f"{name}-1", gradient_accumulation_steps=2, **shared | kind)
        one, two = train_world.losses(tmp_path, f"{name}-1"), train_world.losses(tmp_path, f"{name}-3")
        assert sorted(one) == sorted(two) == [1, 2, 3]
        assert all(abs(one[step] - two[step]) < 1e-4 for step in one)


@pytest.mark.parametrize("lora", [False, True])
def test_zero3_in_bf16(train, flags, tmp_path, lora):
    """The projector and the adapters are made outside of ZeRO-3's partitioning, and still get its number type."""
    shared = {"max_steps": 2, "save_steps": 2, "seed": 3, "lora_enable": lora}
    code, output = finish(start_ranks(flags("zero3", deepspeed=SCRIPTS / "zero3.json", bf16=True, **shared)))
    assert code == 0, output[-3000:]
    train("single", gradient_accumulation_steps=2, **shared)
    one, two = train_world.losses(tmp_path, "single"), train_world.losses(tmp_path, "zero3")
    assert sorted(one) == sorted(two) == [1, 2]
    assert all(two[step] == pytest.approx(one[step], rel=0.05) for step in one)


@pytest.mark.parametrize(("ranks", "finalized"), [("1", True), ("2", False)])
def test_a_rank_ends_before_the_interpreter_is_taken_down(ranks, finalized):
    """A thread of gloo that still holds a tensor then aborts the rank; what waits for the exit runs all the same."""
    script = """
import atexit, threading, time
from llava.train import runtime

class Held:
    def __del__(self):
        print("taken down", flush=True)

held = Held()
atexit.register(print, "closed")
threading.Thread(target=lambda: (time.sleep(0.5), print("written"))).start()
runtime.leave(143)
"""
    env = train_world.environment(WORLD_SIZE=ranks)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
    assert done.stdout.split("\n")[:2] == ["written", "closed"]
    assert ("taken down" in done.stdout) == finalized


def test_torchrun_without_deepspeed_equals_one_rank(train, flags, tmp_path):
    shared = {"max_steps": 3, "save_strategy": "no", "captions": True}
    code, output = finish(start_ranks(flags("ddp", **shared), launcher="torchrun"))
    assert code == 0, output[-3000:]
    train("single", gradient_accumulation_steps=2, **shared)
    one, two = train_world.losses(tmp_path, "single"), train_world.losses(tmp_path, "ddp")
    assert sorted(one) == sorted(two) == [1, 2, 3]
    assert max(abs(one[step] - two[step]) for step in one) < 1e-5


def wait_for(condition, process, limit=200):
    deadline = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_kill_9_under_zero2_then_the_same_command_resumes(flags, tmp_path):
    """Mid-run SIGKILL of everything, twelve steps; the second start ends with the losses of an uninterrupted run."""
    shared = {"max_steps": 12, "save_steps": 3, "num_train_epochs": 9, "deepspeed": SCRIPTS / "zero2.json"}
    code, output = finish(start_ranks(flags("whole", **shared)))
    assert code == 0, output[-3000:]
    process = start_ranks(flags("killed", **shared))
    marker = tmp_path / "killed" / "checkpoint-6" / "checkpoint_complete.json"
    wait_for(marker.is_file, process)
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "run_complete.json").exists()
    code, output = finish(start_ranks(flags("killed", **shared)))
    assert code == 0, output[-3000:]
    records = [json.loads(line) for line in (tmp_path / "killed" / "train_log.jsonl").read_text().splitlines()]
    assert any(record["kind"] == "resume" for record in records)
    whole, killed = train_world.losses(tmp_path, "whole"), train_world.losses(tmp_path, "killed")
    assert sorted(whole) == sorted(killed)
    gaps = [abs(whole[step] - killed[step]) for step in whole]
    print(f"resumed against uninterrupted: at most {max(gaps):.2e}, on average {sum(gaps) / len(gaps):.2e}")
    assert max(gaps) < 1e-5


def test_sigterm_to_a_script_saves_and_exits_with_143(world, tmp_path):
    """The scripts' driver passes the signal to the ranks, waits while they save, and says how it ended."""
    env = {
        "BASE_MODEL": str(world.model),
        "VISION_TOWER": str(world.tower),
        "PRETRAIN_DATA": str(world.captions[0]),
        "PRETRAIN_IMAGES": str(world.captions[1]),
        "OUTPUT_ROOT": str(tmp_path / "run"),
        "RECIPE": "tiny",
        "NUM_DEVICES": "2",
    }
    flags = "--max_steps 4000 --save_steps 4000 --logging_steps 1 --dominant 10 --contextual 3 --layer_list [1,2]"
    command = [sys.executable, "-m", "llava.train.plan", "pretrain_duet", "--", *flags.split()]
    process = subprocess.Popen(
        [*command, "--image_token_ratio_list", "[0.5,0.0]"],
        env=train_world.environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=train_world.ROOT,
    )
    output_dir = tmp_path / "run-duet-pretrain"
    log = output_dir / "train_log.jsonl"
    wait_for(lambda: log.is_file() and '"loss"' in log.read_text(), process)
    os.kill(process.pid, signal.SIGTERM)
    code, output = finish(process)
    assert code == 143, output[-3000:]
    assert "SIGTERM: saved" in output and "the same command resumes" in output
    saved = list(output_dir.glob("checkpoint-*/checkpoint_complete.json"))
    assert len(saved) == 1 and not (output_dir / "run_complete.json").exists()
