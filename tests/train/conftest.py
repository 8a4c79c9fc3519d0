"""Fixtures of the training tests: one small world for the session, and runs inside the test process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import train_world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> SimpleNamespace:
    """Small base models, a mixed data set and a caption data set."""
    folder = tmp_path_factory.mktemp("train_world")
    base = train_world.build_base(folder)
    return SimpleNamespace(
        folder=folder,
        **base,
        data=train_world.write_data(folder / "mixed"),
        captions=train_world.write_captions(folder / "captions"),
    )


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """Give back what a run leaves: environment, process group, default template, shared memory."""
    from llava import conversation

    saved, template = dict(os.environ), conversation.default_conversation
    yield
    os.environ.clear()
    os.environ.update(saved)
    conversation.default_conversation = template
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from llava.train.runtime import remove_shared_buffers

    while train_world.PORTS:
        remove_shared_buffers(train_world.PORTS.pop())
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()


@pytest.fixture
def flags(world, tmp_path) -> Callable[..., list[str]]:
    """Command lines of short runs in this test's folder."""

    def make(output: str = "out", captions: bool = False, **overrides: object) -> list[str]:
        base: dict[str, object] = {
            "model_name_or_path": world.model,
            "vision_tower": world.tower,
            "dominant": 10,
            "contextual": 3,
            "layer_list": "[1,2]",
        }
        if captions:
            base |= {"version": "plain", "tune_mm_mlp_adapter": True}
        return train_world.command_line(
            tmp_path, world.captions if captions else world.data, output, **(base | overrides)
        )

    return make


@pytest.fixture
def train(flags) -> Callable[..., bool]:
    """Run a training in this process; returns whether a signal stopped it."""
    from llava.train.arguments import parse_arguments
    from llava.train.train import run

    def go(*args: object, stop: object = None, **kwargs: object) -> bool:
        return run(parse_arguments(flags(*args, **kwargs)), stop=stop)

    return go
