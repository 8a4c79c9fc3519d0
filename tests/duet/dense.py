"""What tests of vision reducers share: one small model, and its tower's states with dense attention maps."""

from functools import cache

import small
import torch

from duet import DuetConfig
from duet.vision import encode_vision

TOKENS = 12  # of 36; a product of two sides, which average pooling needs


@cache
def model():
    return small.build()


def vision_config(name, tokens=TOKENS, **options):
    return DuetConfig(stage1=name, dominant=tokens - 3, contextual=3, schedule={}, **options)


@torch.no_grad()
def reduced(name, pixels, **options):
    tower, project = model().model.vision_tower, model().model.multi_modal_projector
    return encode_vision(tower, pixels, config=vision_config(name, **options), project=project)


@cache
@torch.no_grad()
def parts():
    """(features, keys, class attention, projected tokens) of three images, from dense attention."""
    pixels, tower = small.pixels(3), model().model.vision_tower
    body = getattr(tower, "vision_model", tower)
    states = tower(pixels, output_hidden_states=True).hidden_states
    block = body.encoder.layers[-2]
    normed = block.layer_norm1(states[-3])
    heads = block.self_attn.num_heads
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    query, keys = split(block.self_attn.q_proj(normed)), split(block.self_attn.k_proj(normed))
    maps = (query @ keys.transpose(-1, -2) * block.self_attn.scale).softmax(-1)
    features = states[-2][:, 1:]
    return {
        "pixels": pixels,
        "features": features,
        "keys": keys.mean(1)[:, 1:],
        "class": maps[:, :, 0, 1:].mean(1),
        "projected": model().model.multi_modal_projector(features),
        "state": states[-2],
        "next": body.encoder.layers[-1],
    }
