"""A run goes on with another number of ranks, to the same losses and weights, or says why it cannot."""

from __future__ import annotations

import shutil

import pytest
import train_world
from safetensors.torch import load_file
from train_world import finish, start_ranks

from llava.train.checkpoints import MARKER, RUN_MARKER, CheckpointError, defect_of
from llava.train.other_ranks import COPY, convert

SCRIPTS = train_world.ROOT / "scripts"
# Two rates and decay, so that mixed-up groups show; no dropout, whose numbers depend on the ranks.
FLAGS = {
    "max_steps": 5, "save_steps": 2, "num_train_epochs": 9, "lora_enable": True, "lora_r": 4, "lora_dropout": 0.0,
    "mm_projector_lr": 2e-3, "weight_decay": 0.3, "lr_scheduler_type": "constant", "group_by_modality_length": True,
}  # fmt: skip


def cut(folder, copy):
    """Copy a finished run so that it looks as if it had been killed after step 2."""
    shutil.copytree(folder, copy)
    (copy / RUN_MARKER).unlink()
    for name in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(copy / name)
    (copy / "train_log.jsonl").unlink()


def weights(folder):
    import torch

    return load_file(folder / "adapter_model.safetensors") | torch.load(folder / "non_lora_trainables.bin")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, pytest.param(2, marks=pytest.mark.nodes)])
def test_one_rank_goes_on_as_two_with_the_same_losses(train, flags, tmp_path, zero):
    """Without DeepSpeed nothing is divided; ZeRO-2's state goes through DeepSpeed's universal checkpoint."""
    engine = {"deepspeed": SCRIPTS / f"zero{zero}.json"} if zero else {}
    train("whole", gradient_accumulation_steps=2, **FLAGS | engine)
    cut(tmp_path / "whole", tmp_path / "cut")
    code, output = finish(start_ranks(flags("cut", **FLAGS | engine), launcher="torchrun"))
    assert code == 0, output[-3000:]
    one, two = train_world.losses(tmp_path, "whole"), train_world.losses(tmp_path, "cut")
    assert sorted(two) == [3, 4, 5]
    gaps = [abs(one[step] - two[step]) for step in two]
    assert max(gaps) < 1e-4, gaps
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    worst = max((first[name] - second[name]).abs().max().item() for name in first)
    assert worst < 2e-4, worst
    assert ("was saved by 1 ranks and is converted for 2" in output) == bool(zero)
    assert not (tmp_path / "cut" / COPY).exists() and defect_of(tmp_path / "cut" / "checkpoint-2") is None


def test_a_state_that_cannot_be_converted_is_refused_without_a_loss(tmp_path):
    folder = tmp_path / "checkpoint-2"
    state = folder / "global_step2"
    state.mkdir(parents=True)
    (folder / "latest").write_text("global_step2")
    (state / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"could not convert it for 3 .* Nothing was changed: go on with 1 ranks"):
        convert(folder, tmp_path / COPY, saved=1, wanted=3)
    assert (state / "zero_pp_rank_0_mp_rank_00_optim_states.pt").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt", "latest"])
def test_a_deepspeed_checkpoint_without_a_ranks_file_is_refused_by_its_name(tmp_path, name):
    import json

    import torch

    from llava.train.checkpoints import mark_complete
    from llava.train.resume import lacking

    state = tmp_path / "global_step2"
    state.mkdir()
    for rank in range(2):
        torch.save({}, state / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save({}, state / "mp_rank_00_model_states.pt")
    torch.save({}, tmp_path / "scheduler.pt")
    (tmp_path / "latest").write_text("global_step2")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    mark_complete(tmp_path, world_size=2)
    assert lacking(tmp_path, None, deepspeed=True) == []
    with pytest.raises(CheckpointError, match="resume it with --deepspeed"):
        lacking(tmp_path, None, deepspeed=False)
    (tmp_path / name if name == "latest" else state / name).unlink()
    assert lacking(tmp_path, None, deepspeed=True) == [f"{name} is missing"]
    assert MARKER in {path.name for path in tmp_path.iterdir()}
