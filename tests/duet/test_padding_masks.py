"""Training on right-padded batches hands no mask to the attention kernels, and changes nothing for the tokens."""

import pytest
import small

import duet
from duet import DuetConfig

CONFIGS = {
    "full": DuetConfig.none(),
    "duet": DuetConfig(dominant=10, contextual=3, cluster_width=3, schedule={2: 0.5, 4: 0.0}),
}


@pytest.fixture(scope="module")
def model():
    return small.build()


@pytest.fixture
def masks(model):
    """The attention mask that each call of a layer gets."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
        for layer in model.model.language_model.layers
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def run(model, side, train):
    """Loss and gradient of a mixed batch."""
    inputs = small.mixed_batch(side)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == 99), -100)
    model.train(train).zero_grad()
    try:
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
    finally:
        model.eval()
    return loss.item(), model.model.language_model.layers[0].self_attn.q_proj.weight.grad.clone()


@pytest.mark.parametrize("name", CONFIGS)
def test_no_mask_in_training_with_padding_behind(model, masks, name):
    with duet.attach(model, CONFIGS[name]):
        loss, gradient = run(model, "right", train=True)
        assert masks == [None] * small.LAYERS
        masks.clear()
        masked_loss, masked_gradient = run(model, "right", train=False)  # no dropout here, so the same numbers
        assert any(mask is not None for mask in masks)
    assert loss == pytest.approx(masked_loss, abs=1e-6)
    assert (gradient - masked_gradient).abs().max() <= 1e-6
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_in_front_keeps_its_mask(model, masks, name):
    with duet.attach(model, CONFIGS[name]):
        run(model, "left", train=True)
    assert masks[0] is not None
