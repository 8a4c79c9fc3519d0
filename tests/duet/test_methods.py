"""Every registered method: exact counts, independence of the batch, no-ops; and a slow, literal version of each."""

import pytest
import small
import torch

from duet import DuetConfig, attach
from duet.chance import uniform
from duet.grids import pooled_grid
from duet.stage1 import VISION_REDUCERS
from duet.stage1.prumerge import adaptive_count
from duet.stage2 import LANGUAGE_REDUCERS
from duet.tokens import rank_descending
from duet.vision import encode_vision

TOKENS = 12  # of 36; a product of two sides, which average pooling needs
VISION, LANGUAGE = VISION_REDUCERS.names(), LANGUAGE_REDUCERS.names()


def vision_config(name, tokens=TOKENS, **options):
    return DuetConfig(stage1=name, dominant=tokens - 3, contextual=3, schedule={}, **options)


SELECTING = ("random", "fastervlm", "hired", "divprune", "vispruner", "cdpruner")
FIXED = [name for name in VISION if not vision_config(name).adaptive]


@pytest.fixture(scope="module")
def model():
    return small.build()


@torch.no_grad()
def reduced(model, name, pixels, **options):
    tower, project = model.model.vision_tower, model.model.multi_modal_projector
    return encode_vision(tower, pixels, config=vision_config(name, **options), project=project)


@pytest.fixture(scope="module")
def parts(model):
    """(features, keys, class attention, projected tokens) of three images, from dense attention."""
    pixels, tower = small.pixels(3), model.model.vision_tower
    body = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
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
            "projected": model.model.multi_modal_projector(features),
            "state": states[-2],
            "next": body.encoder.layers[-1],
        }


@pytest.mark.parametrize("name", FIXED)
def test_stage1_hands_on_exactly_what_was_asked_for(model, name):
    out = reduced(model, name, small.pixels(2))
    assert out.tokens.shape == (2, TOKENS, 32) and out.source.shape == (2, TOKENS) and out.kind.shape == (TOKENS,)
    assert out.tokens.isfinite().all()
    assert int((out.kind == 2).sum()) == out.members.shape[1]


@pytest.mark.parametrize("name", VISION)
def test_stage1_does_not_look_at_other_images(model, name):
    pixels = small.pixels(3)
    together = reduced(model, name, pixels)
    for row in range(3):
        alone = reduced(model, name, pixels[row : row + 1])
        assert torch.equal(alone.per_image(alone.source)[0], together.per_image(together.source)[row])
        assert torch.allclose(alone.per_image(alone.tokens)[0], together.per_image(together.tokens)[row], atol=1e-5)


@pytest.mark.parametrize("name", [n for n in VISION if n != "visionzip"])
def test_stage1_with_all_patches_is_the_tower_itself(model, name):
    pixels = small.pixels(2)
    config = DuetConfig(stage1=name, dominant=small.PATCHES, contextual=0, schedule={})
    plain = encode_vision(model.model.vision_tower, pixels)
    assert torch.equal(encode_vision(model.model.vision_tower, pixels, config=config).tokens, plain.tokens)


@pytest.mark.parametrize("name", SELECTING)
def test_selected_patches_are_tower_features_in_raster_order(model, parts, name):
    out = reduced(model, name, parts["pixels"])
    assert (out.source.diff(dim=1) > 0).all()
    for row in range(3):
        assert torch.allclose(out.tokens[row], parts["features"][row][out.source[row]], atol=1e-5)


@pytest.mark.parametrize("name", ["fastervlm", "hired"])
def test_class_attention_keeps_the_most_attended(model, parts, name):
    out = reduced(model, name, parts["pixels"])
    for row in range(3):
        best = sorted(range(small.PATCHES), key=lambda i: (-float(parts["class"][row, i]), i))[:TOKENS]
        assert out.source[row].tolist() == sorted(best)


def test_divprune_is_the_greedy_max_min_subset(model, parts):
    out = reduced(model, "divprune", parts["pixels"])
    for row in range(3):
        unit = torch.nn.functional.normalize(parts["projected"][row], dim=-1)
        distance = (1 - unit @ unit.T).tolist()
        others = lambda i: [distance[i][j] for j in range(small.PATCHES) if j != i]  # noqa: B023, E731
        picks = [max(range(small.PATCHES), key=lambda i: (min(others(i)), -i))]
        while len(picks) < TOKENS:
            free = [i for i in range(small.PATCHES) if i not in picks]
            picks.append(max(free, key=lambda i: (min(distance[p][i] for p in picks), -i)))
        assert out.source[row].tolist() == sorted(picks)


def test_divprune_survives_equal_tokens(model):
    out = reduced(model, "divprune", torch.zeros(1, 3, 24, 24))
    assert len(set(out.source[0].tolist())) == TOKENS


@pytest.mark.parametrize("tokens", [12, 13, 35])
def test_vispruner_thins_by_parity(model, parts, tokens):
    out = reduced(model, "vispruner", parts["pixels"], tokens=tokens)
    for row in range(3):
        order = sorted(range(small.PATCHES), key=lambda i: (-float(parts["class"][row, i]), i))
        unit = torch.nn.functional.normalize(parts["features"][row], dim=-1)
        keep, rest = order[: tokens // 2], order[tokens // 2 :]
        wanted = tokens - tokens // 2
        while len(rest) > wanted:
            even, odd = rest[::2], rest[1::2]
            alike = {i: max(float(unit[i] @ unit[j]) for j in odd) for i in even}
            count = min(8, len(rest) - wanted, len(even))
            rest = sorted(even, key=lambda i: (-alike[i], even.index(i)))[count:] + odd
        assert out.source[row].tolist() == sorted(keep + rest)


def test_prumerge_adds_neighbours_and_a_summary(model, parts):
    out = reduced(model, "prumerge", parts["pixels"])
    attention_module = parts["next"].self_attn
    with torch.no_grad():
        normed = parts["next"].layer_norm1(parts["state"])
        query, keys = attention_module.q_proj(normed)[:, 0], attention_module.k_proj(normed)
        scores = torch.stack([(keys[b] @ query[b]) / 32**0.5 for b in range(3)]).softmax(-1)[:, 1:]
    for row in range(3):
        a, x = scores[row], parts["features"][row]
        unit = torch.nn.functional.normalize(keys[row, 1:], dim=-1)
        kept = sorted(sorted(range(36), key=lambda i: (-float(a[i]), i))[: TOKENS - 1])
        for place, i in enumerate(kept):
            near = sorted((j for j in range(36) if j != i), key=lambda j: (-float(unit[i] @ unit[j]), j))[:32]
            wanted = x[i] + sum(a[j] * x[j] for j in near)
            assert torch.allclose(out.tokens[row, place], wanted, atol=1e-4)
        summary = sum(a[j] * x[j] for j in range(36) if j not in kept)
        assert torch.allclose(out.tokens[row, -1], summary, atol=1e-4)
        assert [m for m in out.members[row, 0].tolist() if m >= 0] == [j for j in range(36) if j not in kept]


def test_prumerge_counts_outliers_per_image():
    attention = torch.full((2, 40), 0.01)
    attention[0, :3] = 0.5
    attention += torch.linspace(0, 1e-3, 40)
    assert adaptive_count(attention).tolist() == [3, 0]


def test_average_pool_equals_a_mean_over_cells(model, parts):
    out = reduced(model, "average_pool", parts["pixels"])
    assert pooled_grid(12, (6, 6)) == (3, 4)
    for row in range(3):
        for token in range(TOKENS):
            members = [m for m in out.members[row, token].tolist() if m >= 0]
            assert torch.allclose(out.tokens[row, token], parts["features"][row][members].mean(0), atol=1e-5)
            r, c = divmod(token, 4)
            rows, columns = range(2 * r, 2 * r + 2), range(6 * c // 4, -(-6 * (c + 1) // 4))
            assert members == [6 * i + j for i in rows for j in columns]


@pytest.mark.parametrize(("tokens", "shape"), [(192, (12, 16)), (128, (8, 16)), (64, (8, 8)), (576, (24, 24))])
def test_pooled_grids_of_the_usual_budgets(tokens, shape):
    assert pooled_grid(tokens, (24, 24)) == shape


def test_a_number_that_no_grid_has(model):
    with pytest.raises(ValueError, match=r"no grid within 6 x 6 patches has 13 cells; .*12, 15"):
        reduced(model, "average_pool", small.pixels(1), tokens=13)


def test_downsampling_runs_the_tower_on_a_smaller_picture(model, parts):
    out = reduced(model, "downsample", parts["pixels"])
    small_pictures = torch.nn.functional.interpolate(parts["pixels"], size=[12, 16], mode="bicubic", antialias=True)
    with torch.no_grad():
        states = model.model.vision_tower(
            small_pictures, output_hidden_states=True, interpolate_pos_encoding=True
        ).hidden_states
    assert out.grid == (3, 4) and torch.allclose(out.tokens, states[-2][:, 1:], atol=1e-5)


def test_tome_merges_the_most_similar_pairs(model, parts):
    out = reduced(model, "tome_post", parts["pixels"])
    for row in range(3):
        members = [[m for m in group if m >= 0] for group in out.members[row].tolist()]
        assert sorted(m for group in members for m in group) == list(range(36))  # every patch is in exactly one token
        assert [group[0] for group in members] == sorted(group[0] for group in members)
        for token, group in enumerate(members):
            assert torch.allclose(out.tokens[row, token], parts["features"][row][group].mean(0), atol=1e-5)
    one_round = reduced(model, "tome_post", parts["pixels"], tokens=30)
    for row in range(3):
        unit = torch.nn.functional.normalize(parts["keys"][row], dim=-1)
        best = {i: max(range(1, 36, 2), key=lambda j: (float(unit[i] @ unit[j]), -j)) for i in range(0, 36, 2)}
        pairs = sorted(best, key=lambda i: (-float(unit[i] @ unit[best[i]]), i))[:6]
        wanted = {j: sorted([j, *(i for i in pairs if best[i] == j)]) for j in range(36) if j not in pairs}
        got = [[m for m in group if m >= 0] for group in one_round.members[row].tolist()]
        assert sorted(got) == sorted(wanted.values())


def test_tome_in_the_tower_equals_a_literal_loop(model):
    from duet.stage1.tome_tower import merges_per_block

    assert merges_per_block(576, 192, 23) == [17] * 16 + [16] * 7
    assert merges_per_block(576, 64, 23) == [23] * 6 + [22] * 17
    with pytest.raises(ValueError, match=r"cannot merge 30 of 36 tokens in block 1 of 1"):
        merges_per_block(36, 6, 1)
    pixels = small.pixels(2)
    out = reduced(model, "tome", pixels)
    tower = model.model.vision_tower
    body = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        hidden = body.pre_layrnorm(body.embeddings(pixels))
        for row in range(2):
            tokens, groups, cls = list(hidden[row, 1:]), [[i] for i in range(36)], hidden[row, 0]
            for block in body.encoder.layers[:3]:
                x = torch.stack([cls, *tokens])
                normed = block.layer_norm1(x)
                attention = block.self_attn
                split = lambda t: t.view(len(t), 4, 8).transpose(0, 1)  # noqa: E731
                q, k, v = (split(f(normed)) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
                size = torch.tensor([1.0, *map(len, groups)])
                weights = (q @ k.transpose(1, 2) * attention.scale + size.log()).softmax(-1)
                x = x + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
                unit = torch.nn.functional.normalize(k.mean(0)[1:], dim=-1)
                even, odd = range(0, len(tokens), 2), range(1, len(tokens), 2)
                best = {i: max(odd, key=lambda j: (float(unit[i] @ unit[j]), -j)) for i in even}
                gone = sorted(even, key=lambda i: (-float(unit[i] @ unit[best[i]]), i))[:8]
                cls, new, kept = x[0], [], []
                for i in [*(i for i in even if i not in gone), *odd]:
                    merged = [i, *(j for j in gone if best[j] == i)]
                    total = sum(len(groups[j]) for j in merged)
                    new.append(sum(x[1 + j] * len(groups[j]) for j in merged) / total)
                    kept.append(sorted(p for j in merged for p in groups[j]))
                stacked = torch.stack([cls, *new])
                stacked = stacked + block.mlp(block.layer_norm2(stacked))
                cls, tokens, groups = stacked[0], list(stacked[1:]), kept
            order = sorted(range(TOKENS), key=lambda i: groups[i][0])
            assert [[m for m in g if m >= 0] for g in out.members[row].tolist()] == [groups[i] for i in order]
            assert torch.allclose(out.tokens[row], torch.stack([tokens[i] for i in order]), atol=1e-4)


def test_random_choices_are_uniform_and_reproducible(model):
    pixels = small.pixels(3)
    first, again = reduced(model, "random", pixels), reduced(model, "random", pixels.flip(0))
    assert torch.equal(first.source, again.source.flip(0))
    assert not torch.equal(first.source, reduced(model, "random", pixels, seed=1).source)
    draws = torch.stack([uniform(torch.arange(50), 36, seed) for seed in range(40)]).flatten(0, 1)
    chosen = torch.zeros(36)
    for row in rank_descending(draws)[:, :12]:
        chosen[row] += 1
    expected = 2000 * 12 / 36
    statistic = float(((chosen - expected) ** 2 / (expected * (1 - 12 / 36))).sum())
    assert statistic < 66.6  # chi-square, 35 degrees of freedom, 0.1 %
    assert float(draws.min()) >= 0 and float(draws.max()) < 1


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
    single = small.mixed_singles()[2]
    with attach(model, language_config(name)):
        cached = model.generate(**single, max_new_tokens=6, do_sample=False)
        again = model.generate(**single, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)


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
