"""What a run on several nodes is planned as: slots, devices, batches, precision, the size of the base; and refusals."""

from __future__ import annotations

import base64
import json
import os
import socket

import pytest

from llava.train import launch, node, runner, runtime
from llava.train.choices import base_layers
from llava.train.devices import Devices, find_devices, read_hostfile
from llava.train.plan import resolve


@pytest.fixture
def hosts(tmp_path):
    """Write a hostfile; gives its path."""

    def write(text: str) -> str:
        (tmp_path / "hosts").write_text(text)
        return str(tmp_path / "hosts")

    return write


HOSTFILES = [
    "n1 slots=8\nn2 slots=8\n",
    "# rack\n\n  n1 slots=4 \n\tn2\tslots=4 # comment\n",
    "user@10.0.0.1 slots=2 max_slots=2\r\n10.0.0.2 slots=2\r\n",
    "n1\nn2\n", "n1:8\n", "n1 slots=\n", "n1 slots=8, n2 slots=8\n", "", "# n1 slots=8\n", "n1 slots=8\nn1 slots=8\n",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTFILES)
def test_a_hostfile_means_what_it_means_to_deepspeed(hosts, text):
    """Its own reader is the judge; what it refuses, we refuse with the file, the line, and what to write."""
    from deepspeed.launcher.runner import fetch_hostfile

    path = hosts(text)
    try:
        expected = dict(fetch_hostfile(path))
    except ValueError:
        with pytest.raises(ValueError, match=r"HOSTFILE=.*hosts"):
            read_hostfile(path)
        return
    try:
        assert read_hostfile(path) == expected
    except ValueError as err:
        assert "," in text and "is not understood" in str(err)  # DeepSpeed reads the first host and drops the others


@pytest.mark.parametrize(
    ("text", "env", "here", "said"),
    [
        ("n1 slots=8\nn2 slots=4\n", {}, 8, r"n1 8, n2 4.*slots=4"),
        ("n1 slots=8\nn2 slots=8\n", {"NUM_DEVICES": "4"}, 8, r"NUM_DEVICES=4.*slots=8"),
        ("n1 slots=8\nn2 slots=0\n", {}, 8, "n2 has no slots"),
        ("-oProxyCommand=x slots=8\nn2 slots=8\n", {}, 8, "no host's name"),
        ("n1 slots=8\nn2 slots=8\n", {"LAUNCHER": "python"}, 8, "LAUNCHER=python starts one rank"),
        ("localhost slots=8\n", {}, 4, "shows 4 devices"),
    ],
)
def test_slots_that_cannot_be_started_are_refused(hosts, text, env, here, said):
    with pytest.raises(ValueError, match=said):
        find_devices({"HOSTFILE": hosts(text), "RECIPE": "7b", **env}, accelerators=here)


@pytest.mark.parametrize("here", [0, 2, 8])
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_the_slots_are_the_ranks_whatever_this_machine_has(hosts, here, launcher):
    env = {"HOSTFILE": hosts("n1 slots=4\nn2 slots=4\n"), "RECIPE": "7b", "LAUNCHER": launcher, "NUM_DEVICES": "4"}
    plan = resolve("finetune_duet", env, (), accelerators=here)
    assert (plan.devices.world, plan.devices.hosts) == (8, ("n1", "n2"))
    stage = plan.stages[-1]
    assert stage.world * stage.per_device * stage.accumulation == stage.global_batch == 128
    assert stage.flags["bf16"] is True  # a login node's CPU says nothing about the nodes
    commands = node.ssh_commands(plan.devices, stage.arguments(), 1234, plan.job.module, "10.0.0.1")
    assert [name for name, _ in commands] == ["n1", "n2"]
    for number, (name, command) in enumerate(commands):
        assert command[: len(node.SSH) + 1] == [*node.SSH, name]
        assert f"--node {number} --launcher {launcher} --nodes 2 --per_node 4 --address 10.0.0.1" in command[-1]


def test_slurm_on_nodes_and_on_a_login_node():
    slurm = {"SLURM_JOB_NUM_NODES": "4", "RECIPE": "7b"}
    login = find_devices({**slurm, "SLURM_GPUS_PER_NODE": "a100:8"}, accelerators=0)
    assert (login.world, login.accelerator, login.launcher) == (32, True, "torchrun")
    assert find_devices({**slurm, "LAUNCHER": "deepspeed"}, accelerators=8).launcher == "deepspeed"
    assert find_devices({**slurm, "NUM_DEVICES": "4"}, accelerators=8).world == 16
    with pytest.raises(ValueError, match="Say it with NUM_DEVICES"):
        find_devices(slurm, accelerators=0)
    with pytest.raises(ValueError, match="has 8 devices"):
        find_devices({**slurm, "NUM_DEVICES": "16"}, accelerators=8)
    with pytest.raises(ValueError, match="srun started this script 32 times"):
        find_devices({**slurm, "SLURM_STEP_NUM_TASKS": "32"}, accelerators=8)


def test_one_node_takes_what_is_visible():
    with pytest.raises(ValueError, match=r"shows 2 devices \(CUDA_VISIBLE_DEVICES=4,5\)"):
        find_devices({"NUM_DEVICES": "4", "CUDA_VISIBLE_DEVICES": "4,5"}, accelerators=2)
    with pytest.raises(ValueError, match=r"NUM_DEVICES=1\.5: expected a whole number"):
        find_devices({"NUM_DEVICES": "1.5"}, accelerators=2)
    with pytest.raises(ValueError, match="NUM_DEVICES=2 asks for more"):
        find_devices({"NUM_DEVICES": "2", "LAUNCHER": "python"}, accelerators=2)


@pytest.mark.parametrize(
    ("visible", "ids"),
    [("4,5,6,7", ["4", "5"]), ("GPU-aa, MIG-bb,GPU-cc", ["GPU-aa", "MIG-bb"]), ("", ["0", "1"])],
)
def test_deepspeed_gets_the_subset_of_devices(monkeypatch, visible, ids):
    """Its launcher overwrites CUDA_VISIBLE_DEVICES by what it is told."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    command = runner.node_command(Devices("x", True, 2, 2, "deepspeed"), [], 1, "m", node=1, address="a")
    info = next(item for item in command if item.startswith("--world_info=")).partition("=")[2]
    assert json.loads(base64.urlsafe_b64decode(info)) == {"node0": [0, 1], "node1": ids}


def test_a_global_batch_is_kept_or_refused_with_what_can_be_kept():
    env = {"RECIPE": "7b", "SLURM_JOB_NUM_NODES": "3"}
    with pytest.raises(ValueError) as caught:
        resolve("finetune_duet", env, (), accelerators=8)
    for part in ("256 cannot be shared equally by 24 ranks", "16 or 32 ranks", "PRETRAIN_BATCH=264 or 240", "nearest"):
        assert part in str(caught.value)
    both = {"PRETRAIN_BATCH": "nearest", "FINETUNE_BATCH": "144"}
    plan = resolve("finetune_duet", env | both, (), accelerators=8)
    assert [stage.global_batch for stage in plan.stages] == [264, 144]
    assert "global batch 144 (the recipe's is 128) = 24 ranks x 6 records x 1 passes" in plan.describe()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--gradient_accumulation_steps 4", (4, 4)),
        ("--per_device_train_batch_size 8", (8, 2)),
        ("--per_device_train_batch_size 5", "Use one of 1, 2, 4, 8, 16;"),
        ("--gradient_accumulation_steps 3", "Use one of 1, 2, 4, 8, 16;"),
        ("--gradient_accumulation_steps 1 --per_device_train_batch_size 5", (5, 1)),
        ("--gradient_accumulation_steps x", "expected a whole number"),
    ],
)
def test_a_flag_for_one_part_of_the_batch_keeps_the_whole(flags, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            resolve("finetune", {}, flags.split(), accelerators=8)
        return
    stage = resolve("finetune", {}, flags.split(), accelerators=8).stages[-1]
    assert (stage.per_device, stage.accumulation) == expected
    given = dict(zip(stage.arguments()[::2], stage.arguments()[1::2], strict=True))
    assert (given["--per_device_train_batch_size"], given["--gradient_accumulation_steps"]) == tuple(map(str, expected))


@pytest.mark.parametrize(
    ("features", "has"),
    [("flags : fpu avx512_bf16", True), ("Features : fp asimd bf16", True), ("flags : fpu avx2\nbugs : bf16", False)],
)  # fmt: skip
def test_a_cpu_trains_in_bf16_where_it_has_instructions_for_it(monkeypatch, tmp_path, features, has):
    (tmp_path / "cpuinfo").write_text(features)
    assert runtime.cpu_has_bf16(tmp_path / "cpuinfo") is has and not runtime.cpu_has_bf16(tmp_path / "none")
    monkeypatch.setattr("llava.train.runtime.cpu_has_bf16", lambda: has)
    for stage in resolve("finetune_duet", env={}, accelerators=0).stages:
        assert stage.flags["bf16"] is has
    assert resolve("finetune_duet_video", env={}, accelerators=0).stages[0].flags["bf16"] is has
    assert "bf16" not in resolve("finetune_duet_qlora", env={}, accelerators=0).stages[-1].flags


@pytest.mark.parametrize("job", ["finetune_duet", "finetune_duet_video"])
def test_precision_is_the_runs_own_at_every_start(monkeypatch, tmp_path, job):
    """A run that goes on upon another kind of CPU keeps its precision, for a stage that has not begun, too."""
    env = {"OUTPUT_ROOT": str(tmp_path / "x")}
    monkeypatch.setattr("llava.train.runtime.cpu_has_bf16", lambda: True)
    first = resolve(job, env, (), accelerators=0).stages[0]
    first.output.mkdir(parents=True)
    launch.write_json_atomically(first.output / launch.PLAN_FILE, launch.comparable(first))
    monkeypatch.setattr("llava.train.runtime.cpu_has_bf16", lambda: False)
    again = resolve(job, env, (), accelerators=0)
    assert all(stage.flags["bf16"] is True for stage in again.stages) and launch.differences(again.stages[0]) == []
    other = resolve(job, env | {"PRECISION": "fp32"}, (), accelerators=0)
    assert all(stage.flags["bf16"] is False for stage in other.stages)
    assert launch.differences(other.stages[0]) == ["bf16: True -> False"]
    with pytest.raises(ValueError, match="PRECISION=half: expected one of bf16, fp16, fp32"):
        resolve(job, env | {"PRECISION": "half"}, (), accelerators=0)


def test_a_precision_flag_holds_for_both_stages():
    for flags in (["--bf16", "False"], ["--fp16", "True"]):
        stages = resolve("finetune_duet", {}, flags, accelerators=8).stages
        assert [stage.flags.get(flags[0][2:]) for stage in stages] == [flags[1]] * 2
        assert flags[0] == "--bf16" or all("bf16" not in stage.flags for stage in stages)
    stages = resolve("finetune_duet", {"PRECISION": "fp16"}, (), accelerators=8).stages
    assert all((stage.flags["bf16"], stage.flags["fp16"]) == (False, True) for stage in stages)


def test_the_13b_recipe_has_the_size_and_the_folders_of_13b(tmp_path):
    named = resolve("finetune_duet", {"RECIPE": "13b"}, (), accelerators=8)
    assert (named.recipe.model, named.recipe.layers) == ("lmsys/vicuna-13b-v1.5", 40)
    assert str(named.stages[-1].output) == "checkpoints/llava-v1.5-13b-duet-finetune"
    assert named.stages[-1].global_batch == 128 and "over 40 layers" in named.describe()
    assert "0.5 after layer 20, 0 after layer 30" in named.describe()
    for env, flags in (({"BASE_MODEL": "lmsys/vicuna-13b-v1.5"}, []), ({}, ["--model_name_or_path", "x/y-13B-chat"])):
        found = resolve("finetune_duet_lora", env, flags, accelerators=8)
        assert found.recipe.name == "13b" and "13b" in str(found.stages[0].output)
        assert len({str(stage.flags["model_name_or_path"]) for stage in found.stages}) == 1
    with pytest.raises(ValueError, match=r"RECIPE=7b, but .*13b.* has 40 layers and not 32: use RECIPE=13b"):
        resolve("finetune_duet", {"RECIPE": "7b", "BASE_MODEL": "lmsys/vicuna-13b-v1.5"}, (), accelerators=8)
    hf = resolve("finetune_duet_hf", {"RECIPE": "13b"}, (), accelerators=8)
    assert "llava-1.5-13b-hf" in hf.describe() and str(hf.stages[0].output).startswith("checkpoints/hf-13b-")
    with pytest.raises(ValueError, match="RECIPE=13b: expected video-7b or tiny"):
        resolve("finetune_duet_video", {"RECIPE": "13b"}, (), accelerators=8)


def test_a_base_of_another_size_is_planned_as_it_is(tmp_path):
    for depth in (40, 24):
        folder = tmp_path / f"base{depth}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": depth}))
        assert base_layers(str(folder)) == depth
    assert resolve("finetune", {"BASE_MODEL": str(tmp_path / "base40")}, (), accelerators=8).recipe.name == "13b"
    plan = resolve("finetune", {"BASE_MODEL": str(tmp_path / "base24")}, (), accelerators=8)
    assert plan.recipe.layers == 24 and str(plan.stages[0].output) == "checkpoints/llava-v1.5-7b-base24-pretrain"
    assert (base_layers("a/vicuna-7b"), base_layers("a/x-113b"), base_layers("a/x-1.13b")) == (None, None, None)


def test_ports_of_two_runs_do_not_meet(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert node.meeting_port("127.0.0.1") > 0
    ports = set()
    for job in ("101", "102"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        ports.add(node.meeting_port("far-away"))
    assert len(ports) == 2 and all(20_000 <= port < 32_768 for port in ports)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(ValueError, match=r"MASTER_PORT=\d+ cannot be used on this machine"):
            node.meeting_port("127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "http")
    with pytest.raises(ValueError, match="MASTER_PORT=http: expected a port number"):
        node.meeting_port("127.0.0.1")


def test_a_node_with_other_devices_than_planned_says_so(monkeypatch):
    monkeypatch.setattr(node, "visible_accelerators", lambda: 4)
    with pytest.raises(ValueError, match=r"shows 4 devices.*8 ranks were planned"):
        node.check_node(Devices("", True, 8, 2, "torchrun"))
    with pytest.raises(ValueError, match="has 4 accelerators, but the plan was made without"):
        node.check_node(Devices("", False, 2, 2, "torchrun"))


def test_what_travels_and_what_srun_is_not_told(monkeypatch):
    env = {"HF_HOME": "/x", "HOME": "/root", "SSH_CLIENT": "1", "SLURM_JOB_ID": "3", "CUDA_VISIBLE_DEVICES": "0"}
    assert set(runner.travelling(env)) == {"HF_HOME", "CUDA_VISIBLE_DEVICES"}
    assert {"SLURM_GPUS_PER_TASK", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK"} <= set(runner.PER_TASK)
    assert not {"SLURM_JOB_ID", "SLURM_JOB_NODELIST"} & set(runner.PER_TASK)


def test_scontrol_tells_the_nodes(monkeypatch, tmp_path):
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    assert node.head_address(Devices("", True, 8, 2, "torchrun")) == "n1"
    monkeypatch.setenv("SLURM_JOB_NODELIST", "")
    with pytest.raises(ValueError, match="SLURM_JOB_NODELIST"):
        node.slurm_nodes()
    monkeypatch.setenv("SLURM_JOB_NODELIST", "other")
    with pytest.raises(ValueError, match="scontrol could not list"):
        node.slurm_nodes()
