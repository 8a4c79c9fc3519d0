"""What the scripts say and start: recipes, devices, batches, budgets, and what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import train_world

from llava.train import launch, runtime
from llava.train.choices import split_batch
from llava.train.devices import Devices, find_devices
from llava.train.plan import main, resolve
from llava.train.plan_text import describe
from llava.train.recipes import JOBS

SCRIPTS = train_world.ROOT / "scripts"


def test_tiny_is_the_default_without_an_accelerator():
    plan = resolve("finetune_duet", env={}, accelerators=0)
    assert plan.recipe.name == "tiny"
    assert [stage.recipe.kind for stage in plan.stages] == ["pretrain", "finetune"]
    assert [stage.flags["deepspeed"] for stage in plan.stages] == ["scripts/zero2.json", "scripts/zero3.json"]
    text = describe(plan)
    assert "576 patches -> 307 enter" in text and "191.75 on average" in text and "66.7 % saved" in text
    assert "0.5 after layer 6, 0 after layer 9" in text


def test_the_papers_recipe_on_eight_accelerators():
    plan = resolve("finetune_duet", env={}, accelerators=8)
    assert plan.recipe.name == "7b"
    first, second = plan.stages
    assert (first.global_batch, first.steps, first.flags["learning_rate"]) == (256, 2181, 1e-3)
    assert (second.global_batch, second.steps, second.flags["learning_rate"]) == (128, 5198, 2e-5)
    assert (first.per_device, second.per_device) == (32, 16)
    assert second.flags["bf16"] is True and second.flags["gradient_checkpointing"] is True
    assert second.flags["model_name_or_path"] == "lmsys/vicuna-7b-v1.5"
    # LLaVA-1.5 trained without clipping and, on NVIDIA's devices, with tf32.
    assert (first.flags["max_grad_norm"], second.flags["max_grad_norm"]) == (0.0, 0.0)
    assert second.flags["tf32"] is (torch.version.hip is None)
    text = describe(plan)
    assert "0.5 after layer 16, 0 after layer 24" in text and "5,198 optimizer steps" in text
    assert "missing    data_path playground/data/llava_v1_5_mix665k.json" in text
    assert "FINETUNE_DATA" in text and not plan.can_run


def test_baseline_has_no_reduction():
    plan = resolve("finetune", env={}, accelerators=8)
    assert plan.reduction is None and "duet_tokens" not in plan.stages[0].flags
    assert "no reduction" in describe(plan)


def test_lora_and_qlora():
    lora = resolve("finetune_duet_lora", env={}, accelerators=8).stages[-1].flags
    assert (lora["lora_r"], lora["lora_alpha"], lora["learning_rate"], lora["mm_projector_lr"]) == (
        128,
        256,
        2e-4,
        2e-5,
    )
    assert lora["deepspeed"] == "scripts/zero3.json" and "bits" not in lora
    qlora = resolve("finetune_duet_qlora", env={}, accelerators=8).stages[-1].flags
    assert qlora["bits"] == 4 and qlora["deepspeed"] == "scripts/zero2.json"


def test_overrides_and_environment():
    env = {"DUET_TOKENS": "64", "OUTPUT_ROOT": "o/x", "NUM_DEVICES": "4", "SEED": "7", "RECIPE": "7b"}
    plan = resolve("finetune_duet", env=env, overrides=["--learning_rate", "1e-5"], accelerators=8)
    first, second = plan.stages
    assert (first.flags["learning_rate"], second.flags["learning_rate"]) == (1e-3, "1e-5")
    assert first.flags["duet_tokens"] == second.flags["duet_tokens"] == "64"
    assert (second.world, second.per_device, second.accumulation, second.global_batch) == (4, 16, 2, 128)
    assert str(second.output) == "o/x-duet64-finetune" and second.flags["seed"] == "7"
    lists = [
        "--dominant",
        "170",
        "--contextual",
        "35",
        "--layer_list",
        "[16,24]",
        "--image_token_ratio_list",
        "[0.5,0.0]",
    ]
    plan = resolve("finetune_duet", env={}, overrides=lists, accelerators=8)
    assert plan.reduction.average_tokens(576, 32) == 128 and "duet_tokens" not in plan.stages[0].flags


@pytest.mark.parametrize(
    ("total", "most", "world", "expected"),
    [(128, 16, 8, (16, 1)), (128, 16, 4, (16, 2)), (126, 16, 6, (7, 3)), (16, 8, 2, (8, 1)), (8, 8, 8, (1, 1))],
)
def test_split_batch(total, most, world, expected):
    size, passes = split_batch(total, most, world)
    assert (size, passes) == expected and size <= most and size * passes * world == total


def test_devices(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two nodes\nnode1 slots=8\nnode2 slots=8\n")
    several = find_devices({"HOSTFILE": str(hosts)}, accelerators=8)
    assert (several.nodes, several.world, several.launcher) == (2, 16, "deepspeed")
    slurm = find_devices({"SLURM_JOB_NUM_NODES": "4"}, accelerators=8)
    assert (slurm.nodes, slurm.world, slurm.launcher) == (4, 32, "torchrun")
    with pytest.raises(ValueError, match="no such file"):
        find_devices({"HOSTFILE": str(tmp_path / "none")}, accelerators=8)
    with pytest.raises(ValueError, match="LAUNCHER=mpi"):
        find_devices({"LAUNCHER": "mpi"}, accelerators=8)


def test_commands():
    def command(**kwargs):
        devices = Devices("x", True, 8, kwargs.pop("nodes", 1), kwargs.pop("launcher"), kwargs.pop("hostfile", None))
        return launch.training_command(devices, ["--a", "[16,24]"], 1234)

    text = " ".join(command(launcher="deepspeed"))
    assert "deepspeed.launcher.launch --world_info=" in text and "--master_port 1234" in text
    assert text.endswith("--module llava.train.train --a [16,24]")
    assert "torch.distributed.run --nproc_per_node 8 --nnodes 1" in " ".join(command(launcher="torchrun"))
    text = " ".join(command(launcher="torchrun", nodes=4))
    assert text.startswith("srun --nodes 4 --ntasks 4 --ntasks-per-node 1 --kill-on-bad-exit=1")
    assert "-m llava.train.node --launcher torchrun --nodes 4 --per_node 8" in text
    assert command(launcher="python")[1:3] == ["-m", "llava.train.train"]


def test_missing_things_are_said_together(capsys, monkeypatch):
    monkeypatch.setenv("RECIPE", "7b")
    monkeypatch.setenv("BASE_MODEL", "./nowhere/vicuna")
    assert main(["finetune_duet"]) == 2
    said = capsys.readouterr().out
    for part in ("weights ./nowhere/vicuna", "BASE_MODEL", "blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json"):
        assert part in said


def test_wrong_words_are_refused(capsys):
    assert main(["finetune_duet", "tiny"]) == 2
    assert "training flags go after" in capsys.readouterr().err
    assert main(["dance"]) == 2
    assert main(["finetune_duet", "--plan", "--", "oops"]) == 2
    assert "'oops' is not a flag" in capsys.readouterr().err


def test_a_folder_with_other_settings_is_not_mixed_up(tmp_path, capsys):
    env = {"OUTPUT_ROOT": str(tmp_path / "run"), "PROJECTOR": "x"}
    plan = resolve("finetune_duet", env=env, accelerators=0)
    stage = plan.stages[-1]
    stage.output.mkdir(parents=True)
    (stage.output / launch.PLAN_FILE).write_text(json.dumps(launch.comparable(stage)))
    (stage.output / "checkpoint-5").mkdir()
    assert launch.differences(stage) == []
    stage.flags["logging_steps"] = 3
    assert launch.differences(stage) == []
    stage.flags["learning_rate"] = 1.0
    with launch.Runner(plan.devices) as runner:
        assert launch.run_stage(plan, stage, runner) == 2
    printed = capsys.readouterr()
    assert "learning_rate" in printed.err + printed.out


def test_the_same_global_batch_on_other_ranks_is_the_same_run_and_another_batch_is_not(tmp_path):
    env = {"OUTPUT_ROOT": str(tmp_path / "run"), "PROJECTOR": "x", "RECIPE": "tiny", "LAUNCHER": "torchrun"}

    def stage(ranks, *flags):
        return resolve("finetune_duet", env=env | {"NUM_DEVICES": str(ranks)}, accelerators=0, overrides=flags).stages[
            -1
        ]

    first = stage(2)
    first.output.mkdir(parents=True)
    (first.output / launch.PLAN_FILE).write_text(json.dumps(launch.comparable(first)))
    assert launch.differences(stage(4)) == launch.differences(stage(1)) == []
    other = ("--gradient_accumulation_steps", "3", "--per_device_train_batch_size", "8")
    assert launch.differences(stage(2, *other))[0].startswith("global_batch: 16 -> 48")
    (first.output / launch.PLAN_FILE).write_text('{"torn')
    assert launch.differences(first) == []


def test_a_script_does_not_write_into_a_folder_in_use(tmp_path, capsys, monkeypatch):
    import os
    import time

    from llava.train.folder_lock import exclusive

    plan = resolve("pretrain_duet", env={"OUTPUT_ROOT": str(tmp_path / "run")}, accelerators=0)
    stage = plan.stages[-1]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with exclusive(stage.output):
            os.write(write, b"held")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(read, 4) == b"held"
        monkeypatch.setattr(launch, "PATIENCE", 0.0)
        with launch.Runner(plan.devices) as runner:
            assert launch.run_stage(plan, stage, runner) == 2
        assert f"{stage.output} is in use by another run (process {child}" in capsys.readouterr().err
        assert not (stage.output / launch.PLAN_FILE).exists()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_the_plan_says_what_saving_models_only_costs():
    for job in ("pretrain_duet", "finetune_duet_hf"):
        plan = resolve(job, env={}, accelerators=0, overrides=["--save_only_model", "True"])
        assert "note       save_only_model: checkpoints hold weights only" in plan.describe()


def test_a_finished_stage_is_not_repeated(tmp_path, capsys):
    plan = resolve("pretrain_duet", env={"OUTPUT_ROOT": str(tmp_path / "run")}, accelerators=0)
    stage = plan.stages[-1]
    stage.output.mkdir(parents=True)
    (stage.output / "run_complete.json").write_text("{}")
    with launch.Runner(plan.devices) as runner:
        assert launch.run_stage(plan, stage, runner) == 0
    assert "already finished" in capsys.readouterr().out
    (stage.output / "run_complete.json").write_text('{"files": {"mm_projector.safetensors": 10}}')
    assert not launch.is_finished(stage), "its file is gone"


@pytest.mark.parametrize("job", JOBS)
def test_every_script_prints_its_plan(job):
    if job != "finetune_duet":
        text = (SCRIPTS / f"{job}.sh").read_text()
        assert f'launch.sh" {job} ' in text
        return
    env = train_world.environment(DUET_PYTHON=sys.executable)
    result = subprocess.run(
        ["bash", str(SCRIPTS / f"{job}.sh"), "--plan"], env=env, capture_output=True, text=True, cwd="/"
    )
    assert result.returncode == 0, result.stderr
    assert f"plan: {job}" in result.stdout and "optimizer steps" in result.stdout


def test_scripts_are_short_and_valid_shell():
    for path in sorted(SCRIPTS.glob("*.sh")):
        assert os.access(path, os.X_OK)
    for path in (SCRIPTS / f"{job}.sh" for job in JOBS):  # LLaVA's own scripts hold their flags inside
        assert len(path.read_text().splitlines()) <= 10
    for path in sorted(SCRIPTS.rglob("*.sh")):
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_deepspeed_files_leave_optimizer_and_scheduler_to_the_trainer(name, stage):
    config = json.loads((SCRIPTS / f"{name}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    assert "optimizer" not in config and "scheduler" not in config
    if stage == 3:
        assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    if "offload" in name:
        assert config["zero_force_ds_cpu_optimizer"] is False


def test_what_deepspeed_leaves_in_shared_memory_is_removed(tmp_path):
    names = [f"deepspeed_allreduce_buffer_0_127.0.0.1_{port}_{rank}" for port in (29500, 295) for rank in (0, 1)]
    for name in (*names, "sem.other_29500_1"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in runtime.remove_shared_buffers(29500, tmp_path)] == names[:2]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[2:], "sem.other_29500_1"])
    assert runtime.remove_shared_buffers(29500, tmp_path / "none") == []
