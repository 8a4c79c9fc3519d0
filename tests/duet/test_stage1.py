"""Signals equal slices of a dense attention map; Algorithm 1 equals a literal, slow version of it."""

import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duet import DuetConfig, signals, tokens
from duet.signals import DecoderSignals, TowerSignals, spread
from duet.vision import encode_vision


class Attention(torch.nn.Module):
    """The parts of a tower's attention that signals read."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.q_proj, self.k_proj = torch.nn.Linear(width, width), torch.nn.Linear(width, width)

    def dense(self, x):
        split = lambda t: t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # noqa: E731
        return (split(self.q_proj(x)) @ split(self.k_proj(x)).transpose(-1, -2) * self.scale).softmax(-1)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("block", [1 << 23, 7])
@torch.no_grad()
def test_tower_signals_equal_slices_of_the_dense_map(class_token, block, monkeypatch):
    monkeypatch.setattr("duet.kernels.reference.BLOCK_ELEMENTS", block)
    attention, hidden = Attention(), torch.randn(2, 30, 16)
    got, dense, first = TowerSignals(hidden, attention, class_token), attention.dense(hidden), int(class_token)
    patches = dense[:, :, first:, first:]
    assert torch.allclose(got.column_mass(), patches.mean((1, 2)), atol=1e-6)
    places = spread(8, patches.shape[2], hidden.device)
    assert len(set(places.tolist())) == 8
    assert torch.allclose(got.column_mass(readers=8), patches[:, :, places].mean((1, 2)), atol=1e-6)
    assert torch.equal(got.column_mass(readers=99), got.column_mass())
    index = torch.tensor([[3, 0, 7], [1, 2, 28]])
    wanted = torch.stack([patches.mean(1)[b, index[b]] for b in range(2)])
    assert torch.allclose(torch.cat(list(got.rows(index)), 1), wanted, atol=1e-6)
    if class_token:
        assert torch.allclose(got.class_row(), dense[:, :, 0, 1:], atol=1e-6)
    else:
        with pytest.raises(ValueError, match="no class token"):
            got.class_row()


@pytest.mark.parametrize(("count", "side"), [(24, 24), (64, 24), (48, 48), (256, 32)])
def test_few_readers_come_from_all_rows_and_columns(count, side):
    places = spread(count, side * side, torch.device("cpu"))
    assert len(set(places.tolist())) == count and int(places.min()) >= 0 and int(places.max()) < side * side
    for quarter in range(4):  # of the rows, and of the columns, which have their share roughly
        assert int((places // side * 4 // side == quarter).sum()) == count // 4
        assert int((places % side * 4 // side == quarter).sum()) > count // 8


@pytest.mark.parametrize("block", [1 << 23, 9])
@torch.no_grad()
def test_decoder_signals_equal_the_eager_attention_of_the_layer(block, monkeypatch):
    monkeypatch.setattr("duet.kernels.reference.BLOCK_ELEMENTS", block)
    model = small.build(attention="eager").model.language_model
    hidden = torch.randn(2, 12, 32)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 9:] = False
    positions = torch.arange(12)[None]
    rotary = model.rotary_emb(hidden, positions)
    layer = model.layers[3]
    causal = torch.ones(12, 12, dtype=torch.bool).tril() & valid[:, None, None, :]
    mask = torch.zeros(2, 1, 12, 12).masked_fill(~causal, torch.finfo(torch.float32).min)
    dense = layer.self_attn(layer.input_layernorm(hidden), rotary, mask)[1]
    rows, counted = torch.tensor([[5, 8, 2], [11, 4, 4]]), torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()
    got = DecoderSignals(layer, hidden, rotary, valid).received(rows, counted)
    wanted = torch.stack([dense[b].mean(0)[rows[b, :2]].mean(0) for b in range(2)])
    assert torch.allclose(got[valid], wanted[valid], atol=1e-6)


@torch.no_grad()
def test_text_to_text_attention_is_divided_by_its_readers():
    model = small.build(attention="eager").model.language_model
    hidden = torch.randn(1, 9, 32)
    rotary = model.rotary_emb(hidden, torch.arange(9)[None])
    layer, text = model.layers[2], [2, 5, 6, 8]
    module = layer.self_attn
    normed = layer.input_layernorm(hidden)
    q = module.q_proj(normed).view(1, 9, 4, 8).transpose(1, 2)
    k = module.k_proj(normed).view(1, 9, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
    q, k = (signals.rotate(t, *rotary) for t in (q, k))
    scores = (q @ k.transpose(-1, -2) * module.scaling)[0][:, text][:, :, text]
    dense = scores.masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -1e30).softmax(-1).mean(0)
    wanted = [float(dense[j + 1 :, j].mean()) if j < 3 else 0.0 for j in range(4)]
    got = DecoderSignals(layer, hidden, rotary, None).received_among(torch.tensor([text]), torch.ones(1, 4).bool())
    assert torch.allclose(got[0], torch.tensor(wanted), atol=1e-6)


def literal_algorithm_1(features, dense, k1, k2, width):
    """Algorithm 1 as a loop, for one image: features [N, D], dense attention [N, N] averaged over heads."""
    count = len(features)
    mass = [sum(float(dense[j, i]) for j in range(count)) for i in range(count)]
    order = sorted(range(count), key=lambda i: (-mass[i], i))
    dominant, centroids = sorted(order[:k1]), order[k1 : k1 + k2]
    residual = [i for i in range(count) if i not in dominant]
    out, members = [features[i] for i in dominant], []
    for c in centroids:
        near = sorted((i for i in residual if i != c), key=lambda i: (-float(dense[c, i]), i))
        members.append([c, *near[: width - 1]])
        out.append(torch.stack([features[i] for i in members[-1]]).mean(0))
    return torch.stack(out), dominant + centroids, members


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(1, 20), st.integers(0, 8), st.integers(1, 6))
@torch.no_grad()
def test_algorithm_1_equals_a_literal_loop(seed, k1, k2, width):
    model = small.build()
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    images = small.pixels(2, seed)
    config = DuetConfig(dominant=k1, contextual=k2, cluster_width=width, schedule={})
    got = encode_vision(tower, images, config=config)
    states = model.model.vision_tower(images, output_hidden_states=True).hidden_states
    block = tower.encoder.layers[2]
    hidden = block.layer_norm1(states[2])
    split = lambda t: t.unflatten(-1, (4, -1)).transpose(1, 2).double()  # noqa: E731
    q, k = split(block.self_attn.q_proj(hidden)), split(block.self_attn.k_proj(hidden))
    dense = (q @ k.transpose(-1, -2) * block.self_attn.scale).softmax(-1).mean(1)[:, 1:, 1:]
    for b in range(2):
        wanted, source, members = literal_algorithm_1(states[3][b, 1:], dense[b], k1, k2, width)
        assert got.source[b].tolist() == source
        assert [sorted(m) for m in got.members[b].tolist()] == [sorted(m) for m in members]
        assert torch.allclose(got.tokens[b], wanted, atol=1e-5)
        assert len({p for m in members for p in m} & set(source[:k1])) == 0


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2, 0, 3, [1, -2]])
@pytest.mark.parametrize("class_token", [True, False])
def test_an_unreduced_tower_is_bit_identical_to_its_hidden_states(layer, class_token):
    tower = small.build().model.vision_tower
    images = small.pixels(2)
    states = tower(images, output_hidden_states=True).hidden_states
    wanted = states[layer] if isinstance(layer, int) else torch.cat([states[i] for i in layer], -1)
    got = encode_vision(tower, images, select_layer=layer, class_token=class_token)
    assert torch.equal(got.tokens, wanted if class_token else wanted[:, 1:])


@torch.no_grad()
def test_the_tower_stops_after_the_layer_whose_features_are_used():
    tower = small.build().model.vision_tower
    ran = []
    blocks = getattr(tower, "vision_model", tower).encoder.layers
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    encode_vision(tower, small.pixels(1), select_layer=-2, config=DuetConfig(dominant=4, contextual=2, schedule={}))
    assert ran == [0, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize("values", [{}, {"variant": "release"}, {"stage1": "visionzip"}])
@pytest.mark.parametrize(("k1", "k2", "width"), [(10, 4, 3), (30, 6, 4), (36, 0, 4), (1, 35, 4), (20, 16, 9)])
def test_counts_are_exact_and_a_batch_equals_single_images(values, k1, k2, width):
    tower = small.build().model.vision_tower
    config = DuetConfig(dominant=k1, contextual=k2, cluster_width=width, schedule={}, **values)
    images = small.pixels(3)
    together = encode_vision(tower, images, config=config)
    assert together.tokens.shape[1] == k1 + k2 == together.source.shape[1] == len(together.kind)
    for i in range(3):
        alone = encode_vision(tower, images[i : i + 1], config=config)
        assert torch.equal(alone.source[0], together.source[i])
        assert torch.allclose(alone.tokens[0], together.tokens[i], atol=1e-5)


@torch.no_grad()
def test_the_release_drops_exactly_the_patches_outside_its_pool():
    tower = small.build().model.vision_tower
    config = DuetConfig(dominant=9, contextual=4, cluster_width=3, schedule={}, variant="release")
    reduced = encode_vision(tower, small.pixels(2), config=config)
    for row in range(2):
        used = [p for p in reduced.source[row, :9].tolist() if p >= 0]
        used += [p for p in reduced.members[row].flatten().tolist() if p >= 0]
        assert len(used) == len(set(used)) == 8 + 12


@torch.no_grad()
def test_a_budget_beyond_the_patches_of_an_image():
    with pytest.raises(ValueError, match="gives 36 visual tokens"):
        encode_vision(small.build().model.vision_tower, small.pixels(1), config=DuetConfig(schedule={}))
    with pytest.raises(ValueError, match="has 4 blocks"):
        encode_vision(small.build().model.vision_tower, small.pixels(1), select_layer=5)


TINY, HUGE = 2.0**-149, 2.0**127  # the smallest fp32 above 0, and a large one
EDGES = st.sampled_from([0.0, -0.0, 1.0, -1.0, -2.0, float("inf"), float("-inf"), TINY, -TINY, HUGE, -HUGE])


@given(st.lists(EDGES | st.floats(width=32, allow_nan=False), min_size=1, max_size=60), st.integers(1, 60))
def test_ties_go_to_the_lower_index(values, count):
    wanted = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert tokens.top_indices(torch.tensor([values]), count)[0].tolist() == wanted


@torch.no_grad()
@pytest.mark.parametrize("stage1", ["local_cluster", "visionzip", "fastervlm"])
def test_the_ranked_block_alone_norms_and_projects_once_more_and_is_left_as_it_is(stage1):
    tower = small.build().model.vision_tower
    config = DuetConfig(stage1=stage1, dominant=9, contextual=0 if stage1 == "fastervlm" else 3, schedule={})
    used = getattr(tower, "vision_model", tower).encoder.layers[:-1]
    parts = [[block.layer_norm1, block.self_attn.q_proj, block.self_attn.k_proj] for block in used]
    calls, hooked = [], []

    def note(module, given, out):
        calls.append((module, out))
        hooked.extend(part for block in parts for part in block if len(part._forward_hooks) != 1)

    hooks = [module.register_forward_hook(note) for block in parts for module in block]
    kept = encode_vision(tower, small.pixels(2), config=config)
    for hook in hooks:
        hook.remove()
    modules = [module for module, _ in calls]
    assert modules[: 3 * len(parts)] == [module for block in parts for module in block]
    again = modules[3 * len(parts) :]
    assert again[0] is parts[-1][0] and set(again) <= set(parts[-1]) and len(again) == len(set(again))
    outs = {module: [out for called, out in calls if called is module] for module in again}
    assert all(torch.equal(*both) for both in outs.values()), "signals have the bits of the block itself"
    assert not hooked, "nothing is hung on what threads share"
    used[-1].compile(backend="eager")
    assert torch.equal(encode_vision(tower, small.pixels(2), config=config).tokens, kept.tokens)
