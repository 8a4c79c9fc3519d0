"""A Hugging Face model on two ranks of DeepSpeed's launcher, ZeRO-3, with ranks that see text only."""

from __future__ import annotations

import hf_world
import pytest
import train_world

from llava.train.hf_arguments import parse_hf_arguments
from llava.train.train_hf import run

pytestmark = pytest.mark.slow


def test_zero3_with_text_only_ranks_equals_one_rank(tmp_path):
    """Pictures of different shapes (so of different numbers of tower passes) on one rank, text on the other."""
    model = hf_world.build("llava_next", tmp_path)
    data = hf_world.write_records(tmp_path / "data", count=8, text_only=5)
    shared = {"max_steps": 3, "save_strategy": "no", "seed": 5}
    zero3 = {"deepspeed": train_world.ROOT / "scripts" / "zero3.json", "per_device_train_batch_size": 1}
    flags = hf_world.command_line(tmp_path, "llava_next", model, data, "zero3", **shared, **zero3)
    code, output = train_world.finish(train_world.start_ranks(flags, module="llava.train.train_hf"), limit=150)
    assert code == 0, output[-3000:]
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    run(parse_hf_arguments(hf_world.command_line(tmp_path, "llava_next", model, data, "single", **shared, **one)))
    single, two = train_world.losses(tmp_path, "single"), train_world.losses(tmp_path, "zero3")
    assert sorted(single) == sorted(two) == [1, 2, 3]
    assert max(abs(single[step] - two[step]) for step in single) < 1e-4
