"""A run that was interrupted goes on as if nothing had happened, for every kind of checkpoint."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
import train_world

from llava.convert import convert
from llava.model.builder import load_pretrained_model

KINDS = {
    "full": {},
    "projector": {"captions": True},
    "lora": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.2, "mm_projector_lr": 1e-3},
    "qlora": {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.2, "bits": 4},
    "grouped": {"group_by_modality_length": True, "gradient_accumulation_steps": 2},
    "tower": {"unfreeze_mm_vision_tower": True},
}


def forget_after(folder, step):
    """Make a finished run look as if it had been killed right after saving `step`."""
    for path in folder.iterdir():
        keep = path.name in (f"checkpoint-{step}", "train_log.jsonl")
        if path.is_dir() and not keep:
            shutil.rmtree(path)
        elif path.is_file() and not keep:
            path.unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_losses_equal_the_uninterrupted_ones(kind, train, tmp_path):
    """12 records or more, 2 per step, 9 steps or more: the interruption lies in the middle of the second epoch."""
    steps, saved = (10, 6) if kind != "projector" else (8, 6)
    flags = {"max_steps": steps, "save_steps": saved, "per_device_train_batch_size": 2} | KINDS[kind]
    train(**flags)
    whole = train_world.losses(tmp_path)
    weights = final_weights(tmp_path / "out")
    forget_after(tmp_path / "out", saved)
    (tmp_path / "out" / "train_log.jsonl").unlink()
    train(**flags)
    resumed = train_world.losses(tmp_path)
    assert sorted(resumed) == list(range(saved + 1, steps + 1))
    worst = max(abs(resumed[step] - whole[step]) for step in resumed)
    assert worst < 1e-5, f"largest difference {worst}"
    again = final_weights(tmp_path / "out")
    assert set(again) == set(weights)
    assert all(torch.allclose(again[name], value, atol=1e-5) for name, value in weights.items())


def final_weights(folder):
    from safetensors.torch import load_file

    found = {}
    for name in ("model.safetensors", "mm_projector.safetensors", "adapter_model.safetensors"):
        if (folder / name).is_file():
            found |= load_file(folder / name)
    if (folder / "non_lora_trainables.bin").is_file():
        found |= torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    return found


@pytest.mark.parametrize("bits", [16, 4])
def test_every_save_of_a_lora_run_is_usable(train, tmp_path, bits):
    train(max_steps=2, save_steps=1, lora_enable=True, lora_r=4, bits=bits)
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-2"):
        for name in ("adapter_model.safetensors", "adapter_config.json", "non_lora_trainables.bin", "config.json"):
            assert (folder / name).is_file(), f"{folder.name} lacks {name}"
        rest = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        assert set(rest) == {f"base_model.model.model.mm_projector.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    # Older folders say there how the base was held in training.
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    convert(str(tmp_path / "out"), "llava", str(tmp_path / "merged"))
    for folder in ("out", "merged"):
        model = load_pretrained_model(str(tmp_path / folder), None, "llava", device="cpu", torch_dtype="auto")[1]
        weight = model.model.layers[0].self_attn.q_proj.weight
        assert weight.dtype == torch.float32 and weight.shape == (32, 32)


def test_stage_one_writes_what_llava_reads_and_stage_two_starts_from_it(train, tmp_path):
    from safetensors.torch import load_file

    train("stage1", captions=True, max_steps=2)
    folder = tmp_path / "stage1"
    old = torch.load(folder / "mm_projector.bin", weights_only=True)
    new = load_file(folder / "mm_projector.safetensors")
    assert set(old) == set(new) == {f"model.mm_projector.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert json.loads((folder / "config.json").read_text())["tune_mm_mlp_adapter"] is True
    assert (folder / "checkpoint-2" / "optimizer.pt").is_file()
    train("stage2", max_steps=1, learning_rate=0.0, pretrain_mm_mlp_adapter=folder / "mm_projector.bin")
    tuned = load_file(tmp_path / "stage2" / "model.safetensors")
    assert all(torch.equal(tuned[name], value) for name, value in new.items())


def test_stage_one_in_a_checkpoint_folder_keeps_llavas_place(train, tmp_path):
    train("checkpoint-9", captions=True, max_steps=1, save_strategy="no")
    assert (tmp_path / "mm_projector" / "checkpoint-9.bin").is_file()


def test_a_checkpoint_without_its_marker_is_passed_over(train, tmp_path, caplog):
    train(max_steps=4, save_steps=2)
    (tmp_path / "out" / "checkpoint-4" / "checkpoint_complete.json").unlink()
    (tmp_path / "out" / "run_complete.json").unlink()
    whole = train_world.losses(tmp_path)
    train(max_steps=4, save_steps=2)
    assert "checkpoint-4 is not used" in caplog.text
    resume = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert [r["checkpoint"][-12:] for r in resume if r["kind"] == "resume"] == ["checkpoint-2"]
    assert train_world.losses(tmp_path) == pytest.approx(whole, abs=1e-6)


def test_a_truncated_file_is_noticed(train, tmp_path):
    from llava.train.checkpoints import CheckpointError, defect_of, last_complete
    from llava.train.resume import resolve_resume

    train(max_steps=4, save_steps=2)
    broken = tmp_path / "out" / "checkpoint-4"
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "model.safetensors has" in defect_of(broken)
    assert last_complete(tmp_path / "out").name == "checkpoint-2"
    with pytest.raises(CheckpointError, match=r"model\.safetensors has"):
        resolve_resume(tmp_path / "out", str(broken))
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_resume(tmp_path / "out", str(tmp_path / "nowhere"))
    assert resolve_resume(tmp_path / "out", "False") is None


def test_save_total_limit_counts_whole_checkpoints_only(train, tmp_path):
    train(max_steps=3, save_steps=1, save_total_limit=2)
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_sigterm_saves_at_the_next_step_and_the_next_start_resumes(train, tmp_path):
    import os

    from llava.train.callbacks import StopSignal
    from llava.train.llava_trainer import LLaVATrainer

    train("whole", max_steps=4, save_steps=4)
    stop, begun = StopSignal().install(), []
    original = LLaVATrainer.training_step

    class Interrupted(LLaVATrainer):
        """Gets SIGTERM in the middle of its second step."""

        def training_step(self, *args, **kwargs):
            begun.append(1)
            if len(begun) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args, **kwargs)

    from llava.train import train as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LLaVATrainer", Interrupted)
        assert train(max_steps=4, save_steps=4, stop=stop) is True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert len(begun) == 2
    assert (tmp_path / "out" / "checkpoint-2" / "checkpoint_complete.json").is_file()
    assert not (tmp_path / "out" / "run_complete.json").exists()
    assert train(max_steps=4, save_steps=4) is False
    assert train_world.losses(tmp_path) == pytest.approx(train_world.losses(tmp_path, "whole"), abs=1e-5)


def test_sigterm_before_training_ends_the_process_at_once():
    import os

    from llava.train.callbacks import EXIT_STOPPED, StopSignal

    stop = StopSignal().install()
    with pytest.raises(SystemExit) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert caught.value.code == EXIT_STOPPED == 143 and stop.requested


def test_a_run_does_not_outlive_its_launcher(monkeypatch):
    import os
    import subprocess
    import sys

    from llava.train.callbacks import LAUNCHER_PID, StopSignal

    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    monkeypatch.setenv(LAUNCHER_PID, str(process.pid))
    assert StopSignal().agreed(torch.device("cpu"))
    monkeypatch.setenv(LAUNCHER_PID, str(os.getpid()))
    assert not StopSignal().agreed(torch.device("cpu"))


def test_full_disk_leaves_older_checkpoints_and_says_what_to_do(train, tmp_path):
    """A file-size limit makes the writes of the second checkpoint fail as a full disk would."""
    import resource

    from llava.train.checkpoints import CheckpointError, defect_of
    from llava.train.llava_trainer import LLaVATrainer

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Filling(LLaVATrainer):
        """Runs out of space while it saves its second checkpoint."""

        def save_model(self, *args, **kwargs):
            if self.state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
            super().save_model(*args, **kwargs)

    from llava.train import train as module

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "LLaVATrainer", Filling)
            with pytest.raises(CheckpointError) as caught:
                train(max_steps=3, save_steps=1, save_total_limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    message = str(caught.value)
    assert "checkpoint-2" in message and "Free some space" in message and "checkpoint-1 is whole" in message
    assert defect_of(tmp_path / "out" / "checkpoint-1") is None
    assert not (tmp_path / "out" / "checkpoint-2").exists()
    train(max_steps=3, save_steps=1, save_total_limit=1)
    assert sorted(train_world.losses(tmp_path)) == [1, 2, 3]


def test_an_output_folder_that_cannot_be_written_is_found_before_the_first_step(train, tmp_path):
    from llava.train.checkpoints import CheckpointError

    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises((CheckpointError, FileExistsError, NotADirectoryError)):
        train(max_steps=1)
