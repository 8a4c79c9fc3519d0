"""Every combination of the choices in DUET's stage 1 equals a literal loop; the paper's are the defaults."""

from itertools import product

import pytest
import torch
from dense import model, parts

import duet
from duet import DuetConfig
from duet.signals import spread
from duet.stage1.local_cluster import CHOICES
from duet.vision import encode_vision

K1, K2, W = 8, 4, 3
COMBINATIONS = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]


@pytest.fixture(scope="module")
def maps():
    """Attention of the small tower over patches, averaged over heads, from dense maps. Shapes: [3, N, N]."""
    tower = getattr(model().model.vision_tower, "vision_model", model().model.vision_tower)
    block = tower.encoder.layers[-2]
    with torch.no_grad():
        states = model().model.vision_tower(parts()["pixels"], output_hidden_states=True).hidden_states
        normed = block.layer_norm1(states[-3])
        split = lambda x: x.unflatten(-1, (4, -1)).transpose(1, 2)  # noqa: E731
        query, keys = split(block.self_attn.q_proj(normed)), split(block.self_attn.k_proj(normed))
        return (query @ keys.transpose(-1, -2) * block.self_attn.scale).softmax(-1).mean(1)[:, 1:, 1:]


def literal(row, dense, score, centroids, neighbours, merge, order):
    """(tokens, sources, members) of one image by METHODS 2.8 and 5.1, as loops."""
    x, keys = parts()["features"][row], torch.nn.functional.normalize(parts()["keys"][row], dim=-1)
    weight = dense[row].sum(0) if score == "column_mass" else parts()["class"][row]
    ranked = sorted(range(36), key=lambda i: (-float(weight[i]), i))
    dominant, residual = sorted(ranked[:K1]), ranked[K1:]
    pool = residual[: W * K2]
    anchors = pool[:K2] if centroids == "top" else pool[:: len(pool) // K2][:K2]
    clusters = {c: [c] for c in anchors}
    if neighbours == "attention":
        for c in anchors:
            near = sorted((i for i in residual if i != c), key=lambda i: (-float(dense[row, c, i]), i))
            clusters[c] += near[: W - 1]
    else:
        for i in (i for i in pool if i not in anchors):
            clusters[max(anchors, key=lambda c: float(keys[i] @ keys[c]))].append(i)
    tokens = {i: x[i] for i in dominant}
    for c, group in clusters.items():
        others = x[group[1:]].mean(0) if len(group) > 1 else torch.zeros(32)
        tokens[c] = x[group].mean(0) if merge == "mean" else x[c] + others
    source = dominant + anchors if order == "score" else sorted(dominant + anchors)
    return torch.stack([tokens[i] for i in source]), source, clusters


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "-".join(options.values()))
@torch.no_grad()
def test_equals_a_literal_loop(options, maps):
    config = DuetConfig(dominant=K1, contextual=K2, cluster_width=W, schedule={}, options=options)
    with duet.trace() as seen:
        got = encode_vision(model().model.vision_tower, parts()["pixels"], config=config)
    for row in range(3):
        tokens, source, clusters = literal(row, maps, **options)
        assert got.source[row].tolist() == source
        assert torch.allclose(got.tokens[row], tokens, atol=1e-5)
        kind = ["contextual" if i in clusters else "dominant" for i in source]
        assert seen.images[row].kind == kind
        groups = [set(group) for group in seen.images[row].members]
        if options["order"] == "raster":
            assert groups == [set(clusters.get(i, [])) for i in source]
        else:
            assert groups == [set(clusters[i]) for i in source[K1:]]
        fate = seen.images[row].fate()
        merged = {i for i, line in enumerate(fate) if "merged into token" in line}
        assert merged == {i for group in clusters.values() for i in group}


@torch.no_grad()
def test_the_papers_choices_are_the_defaults():
    plain = DuetConfig(dominant=K1, contextual=K2, cluster_width=W, schedule={})
    named = DuetConfig(**(plain.to_dict() | {"options": {name: first for name, (first, _) in CHOICES.items()}}))
    one, other = (encode_vision(model().model.vision_tower, parts()["pixels"], config=c) for c in (plain, named))
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.source, other.source)


@torch.no_grad()
def test_a_cluster_of_one_is_its_centroid():
    for merge in ("mean", "sum"):
        config = DuetConfig(dominant=4, contextual=3, cluster_width=1, schedule={}, options={"merge": merge})
        got = encode_vision(model().model.vision_tower, parts()["pixels"], config=config)
        for row in range(3):
            assert torch.allclose(got.tokens[row], parts()["features"][row][got.source[row]], atol=1e-5)


@torch.no_grad()
def test_visionzips_anchors_as_means():
    base = {"stage1": "visionzip", "dominant": K1, "contextual": K2, "schedule": {}}
    pixels, tower = parts()["pixels"], model().model.vision_tower
    added = encode_vision(tower, pixels, config=DuetConfig(**base))
    mean = encode_vision(tower, pixels, config=DuetConfig(**base, options={"merge": "mean"}))
    assert torch.equal(added.source, mean.source) and torch.equal(added.members, mean.members)
    for row in range(3):
        for number in range(K2):
            group = [i for i in added.members[row, number].tolist() if i >= 0]
            x = parts()["features"][row]
            assert torch.allclose(mean.tokens[row, K1 + number], x[group].mean(0), atol=1e-5)
            others = x[group[1:]].mean(0) if len(group) > 1 else 0
            assert torch.allclose(added.tokens[row, K1 + number], x[group[0]] + others, atol=1e-5)


def test_the_released_code_is_not_varied():
    with pytest.raises(ValueError, match=r"variant='release' has made its choices; leave out the option\(s\) merge"):
        DuetConfig(dominant=K1, contextual=K2, schedule={}, variant="release", options={"merge": "mean"})


@torch.no_grad()
def test_few_readers_rank(maps):
    config = DuetConfig(dominant=K1, contextual=K2, cluster_width=W, schedule={}, options={"readers": 5})
    got = encode_vision(model().model.vision_tower, parts()["pixels"], config=config)
    mass = maps[:, spread(5, 36, maps.device)].sum(1)
    assert [sorted(row[:K1]) for row in mass.argsort(1, descending=True).tolist()] == got.source[:, :K1].tolist()


def test_readers_that_cannot_be_asked():
    for options, said in (
        ({"readers": -1}, r"readers must be 0 \(all patches\) or a number of patches, not -1"),
        ({"readers": 9, "score": "class_row"}, "readers are asked for score='column_mass', not 'class_row'"),
        ({"readers": 2.5}, "readers"),
    ):
        with pytest.raises(ValueError, match=said):
            DuetConfig(dominant=K1, contextual=K2, schedule={}, options=options)
