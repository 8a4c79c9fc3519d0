"""Every registered method: exact counts, independence of the batch, no-ops."""

import pytest
import small
import torch
from dense import TOKENS, parts, reduced, vision_config

from duet import DuetConfig, attach
from duet.stage1 import VISION_REDUCERS
from duet.stage2 import LANGUAGE_REDUCERS
from duet.vision import encode_vision

VISION, LANGUAGE = VISION_REDUCERS.names(), LANGUAGE_REDUCERS.names()


SELECTING = [n for n in ("random", "fastervlm", "hired", "divprune", "vispruner", "cdpruner") if n in VISION]
FIXED = [name for name in VISION if not vision_config(name).adaptive]


@pytest.fixture(scope="module")
def model():
    return small.build()


@pytest.mark.parametrize("name", FIXED)
def test_stage1_hands_on_exactly_what_was_asked_for(name):
    out = reduced(name, small.pixels(2))
    assert out.tokens.shape == (2, TOKENS, 32) and out.source.shape == (2, TOKENS) and out.kind.shape == (TOKENS,)
    assert out.tokens.isfinite().all()
    assert int((out.kind == 2).sum()) == out.members.shape[1]


def assert_cached_equals_recomputed(model, config, tokens):
    single = small.mixed_singles()[2]
    with attach(model, config):
        cached = model.generate(**single, max_new_tokens=tokens, do_sample=False)
        again = model.generate(**single, max_new_tokens=tokens, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)


@pytest.mark.parametrize("name", VISION)
def test_stage1_does_not_look_at_other_images(name):
    pixels = small.pixels(3)
    together = reduced(name, pixels)
    for row in range(3):
        alone = reduced(name, pixels[row : row + 1])
        assert torch.equal(alone.per_image(alone.source)[0], together.per_image(together.source)[row])
        assert torch.allclose(alone.per_image(alone.tokens)[0], together.per_image(together.tokens)[row], atol=1e-5)


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("name", VISION)
def test_stage1_with_all_patches_is_the_tower_itself(model, name, variant):
    pixels = small.pixels(2)
    config = DuetConfig(stage1=name, dominant=small.PATCHES, contextual=0, schedule={}, variant=variant)
    plain = encode_vision(model.model.vision_tower, pixels)
    assert torch.equal(encode_vision(model.model.vision_tower, pixels, config=config).tokens, plain.tokens)


@pytest.mark.parametrize("name", SELECTING)
def test_selected_patches_are_tower_features_in_raster_order(name):
    out = reduced(name, parts()["pixels"])
    assert (out.source.diff(dim=1) > 0).all()
    for row in range(3):
        assert torch.allclose(out.tokens[row], parts()["features"][row][out.source[row]], atol=1e-5)


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_stage1_cached_generation_equals_recomputation(model, name):
    assert_cached_equals_recomputed(model, vision_config(name), 4)


@pytest.mark.parametrize("name", VISION)
def test_stage1_trains_projector_and_tower(name):
    model = small.build().train()
    sample = small.mixed_singles()[2]
    labels = sample["input_ids"].clone()
    labels[:, :-3] = -100
    with attach(model, vision_config(name)):
        model(**sample, labels=labels).loss.backward()
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    for part in (model.model.multi_modal_projector.linear_1, tower.encoder.layers[0].mlp.fc1):
        assert part.weight.grad.isfinite().all() and part.weight.grad.abs().sum() > 0


def language_config(name, **options):
    return DuetConfig(stage1="none", stage2=name, schedule={2: 0.5, 4: 0.25}, **options)


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_stage2_does_not_look_at_other_samples(model, name, side):
    batch = small.mixed_batch(side)
    with attach(model, language_config(name)):
        together = model(**batch)
        for row, single in enumerate(small.mixed_singles()):
            alone = model(**single).logits[0]
            got = together.logits[row]
            got = got[-len(alone) :] if side == "left" else got[: len(alone)]
            assert torch.allclose(got, alone, atol=1e-5)


@pytest.mark.parametrize("name", LANGUAGE)
@torch.no_grad()
def test_stage2_cached_generation_equals_recomputation(model, name):
    assert_cached_equals_recomputed(model, language_config(name), 6)


@pytest.mark.parametrize("name", LANGUAGE)
@torch.no_grad()
def test_stage2_that_keeps_everything_changes_nothing(model, name):
    single = small.mixed_singles()[0]
    plain = model(**single).logits
    with attach(model, DuetConfig(stage1="none", stage2=name, schedule={2: 1.0})):
        assert torch.equal(model(**single).logits, plain)


@pytest.mark.parametrize("name", LANGUAGE)
def test_stage2_trains(name):
    model = small.build().train()
    sample = small.mixed_singles()[2]
    labels = sample["input_ids"].clone()
    labels[:, :-3] = -100
    with attach(model, language_config(name)):
        model(**sample, labels=labels).loss.backward()
    for part in (model.model.multi_modal_projector.linear_1, model.model.language_model.layers[0].self_attn.q_proj):
        assert part.weight.grad.isfinite().all() and part.weight.grad.abs().sum() > 0


def hidden_and_maps(layers):
    """Hidden states and executed attention maps of one sample of an eager copy of the model."""
    model = small.build(attention="eager")
    single = small.mixed_singles()[0]
    with torch.no_grad():
        out = model(**single, output_hidden_states=True, output_attentions=True)
    visual = (single["input_ids"][0] == small.IMAGE_TOKEN).nonzero().flatten().tolist()
    return out.hidden_states[layers], out.attentions[layers - 1][0], visual, single


def kept_after(model, config, single, layer):
    from duet import trace

    with attach(model, config), trace() as seen, torch.no_grad():
        model(**single)
    return seen.images[0].kept_after[layer]


def test_fastv_ranks_by_the_executed_layer(model):
    _, attention, visual, single = hidden_and_maps(2)
    config = DuetConfig(stage1="none", stage2="fastv", schedule={2: 10.5 / 36})
    row = attention.mean(0)[-1]
    best = sorted(range(36), key=lambda i: (-float(row[visual[i]]), i))[:10]
    assert sorted(kept_after(model, config, single, 2)) == sorted(best)


def test_dart_follows_its_pivots(model):
    hidden, _, visual, single = hidden_and_maps(2)
    config = DuetConfig(stage1="none", stage2="dart", schedule={2: 17.5 / 36})
    decoder = model.model.language_model
    with torch.no_grad():
        before = small.build(attention="eager")(**single, output_hidden_states=True).hidden_states[1]
        layer = decoder.layers[1]
        keys = layer.self_attn.k_proj(layer.input_layernorm(before)).view(1, -1, 2, 8).transpose(1, 2)
        cos, sin = decoder.rotary_emb(before, torch.arange(before.shape[1])[None])
        half = torch.cat((-keys[..., 4:], keys[..., :4]), -1)
        norms = (keys * cos[:, None] + half * sin[:, None]).abs().sum((1, 3))[0]
        unit = torch.nn.functional.normalize(decoder.norm(hidden)[0], dim=-1)
    text = [i for i in range(len(norms)) if i > visual[-1]]
    largest = lambda group: sorted(group, key=lambda i: (-float(norms[i]), i))[:4]  # noqa: E731
    taken = largest(visual)
    free = [i for i in visual if i not in taken]
    guides = taken + largest(text)
    for number, guide in enumerate(guides):
        share = 13 // 8 + (number < 13 % 8)
        picked = sorted(free, key=lambda i: (float(unit[i] @ unit[guide]), i))[:share]
        free = [i for i in free if i not in picked]
        taken = taken + picked
    assert sorted(kept_after(model, config, single, 2)) == sorted(i - visual[0] for i in taken)


def test_random_tokens_depend_on_seed_and_layer(model):
    single = small.mixed_singles()[0]
    config = lambda **more: DuetConfig(stage1="none", stage2="random", schedule={2: 0.5, 4: 0.25}, **more)  # noqa: E731
    first = kept_after(model, config(), single, 2)
    assert first == kept_after(model, config(), single, 2) and len(first) == 18
    assert first != kept_after(model, config(seed=1), single, 2)


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match=r"unknown language reducer 'slowv'; known: .*fastv"):
        DuetConfig(stage2="slowv")
    with pytest.raises(ValueError, match=r"unknown vision reducer 'zip'; known: .*visionzip"):
        DuetConfig(stage1="zip")
