"""A vision reducer with a fixed count never waits for the device: it runs on tensors that hold no values."""

import pytest
import small
import torch
from dense import TOKENS, vision_config

from duet import encode_vision
from duet.stage1 import VISION_REDUCERS

FIXED = [name for name in VISION_REDUCERS.names() if not vision_config(name).adaptive]
VARIED = [("local_cluster", {"neighbours": "keys", "centroids": "strided", "order": "raster"})]


def run(name, **options):
    model = small.build().to("meta")
    return encode_vision(
        model.model.vision_tower,
        small.pixels(2).to("meta"),
        config=vision_config(name, **options),
        project=model.model.multi_modal_projector,
    )


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("name", FIXED)
@torch.no_grad()
def test_fixed_counts_need_no_values(name, variant):
    out = run(name, variant=variant)
    assert out.tokens.device.type == "meta" and out.tokens.shape == (2, TOKENS, 32) and out.counts is None


@pytest.mark.parametrize(("name", "options"), VARIED)
@torch.no_grad()
def test_options_need_no_values(name, options):
    assert run(name, options=options).tokens.shape == (2, TOKENS, 32)


@torch.no_grad()
def test_counts_that_depend_on_the_picture_are_noticed():
    with pytest.raises((RuntimeError, NotImplementedError)):
        run("prumerge_adaptive")
