"""Models that accelerate spreads over devices or offloads, attached: hooks move what the towers' parts need."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from models import CASES
from qwen_models import CASES as QWEN

import duet

ALL = CASES | QWEN
NEVER_OFFLOADED = (
    "llava_next",
    "llava_onevision",
    "llava_next_video",
)  # transformers reads image_newline past the hooks


def hooked(model):
    return dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def offloaded(model):
    return cpu_offload(model, execution_device=torch.device("cpu"))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "spread"),
    [(name, hooked) for name in ALL] + [(name, offloaded) for name in ALL if name not in NEVER_OFFLOADED],
)
def test_hooked_models_give_the_same_with_and_without_duet(name, spread):
    case = ALL[name]
    model = case.build()
    inputs = case.batch(model)
    how = {"max_new_tokens": 3, "do_sample": False}
    plain = model(**inputs).logits
    with duet.attach(model, case.config):
        reduced, answers = model(**inputs).logits, model.generate(**inputs, **how)
    model = spread(model)
    with duet.attach(model, case.config):
        assert torch.equal(model(**inputs).logits, reduced)
        assert torch.equal(model.generate(**inputs, **how), answers)
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model.generate(**inputs, **how)[:, :-3], inputs["input_ids"])
