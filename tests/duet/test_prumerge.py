"""PruMerge and PruMerge+, with a fixed number of tokens and adaptively: a literal loop, and the edges of the rule."""

import numpy as np
import pytest
import small
import torch
from dense import TOKENS, model, parts, reduced
from hypothesis import given, settings
from hypothesis import strategies as st

from duet import DuetConfig, run_decoder, trace
from duet.stage1 import CONTEXTUAL, DOMINANT
from duet.stage1.prumerge import _adaptive, adaptive_count
from duet.vision import encode_vision

N = small.PATCHES
FENCE = 0.8  # the small tower's attention is flat, so that the published 1.5 finds few outliers


def signals():
    """(attention, keys) of the next block, not split into heads. Shapes: [3, N], [3, N, D]."""
    block = parts()["next"]
    with torch.no_grad():
        normed = block.layer_norm1(parts()["state"])
        query, keys = block.self_attn.q_proj(normed)[:, 0], block.self_attn.k_proj(normed)
        scores = torch.stack([(keys[b] @ query[b]) / 32**0.5 for b in range(3)])
    return scores.softmax(-1)[:, 1:], keys[:, 1:]


def literal_kept(a, method, release, batch):
    """Which patches METHODS 2.4 keeps for one image, in output order."""
    ranked = sorted(range(N), key=lambda i: (-a[i], i))
    if method.endswith("adaptive"):
        low, high = np.percentile(batch if release else a, [25, 75])
        count = max(1, sum(value > high + FENCE * (high - low) for value in a))
        kept = ranked[:count]
        if "plus" in method:
            stride = max(1, int(int(1 / (count / N)) / 3))
            kept = kept + [i for i in range(0, N - 1, stride) if i not in kept]
    elif "plus" in method:
        count = (TOKENS - 1) // 2
        kept = ranked[: TOKENS - 1 - count]
        if release:
            step = N // count
            return kept + [step // 2 + i * step for i in range(count)]
        others = sorted(set(range(N)) - set(kept))
        kept = kept + [others[int((i + 0.5) * len(others) / count)] for i in range(count)]
    else:
        kept = ranked[: TOKENS - 1]
    return kept if release else sorted(kept)


@pytest.mark.parametrize("method", ["prumerge", "prumerge_plus", "prumerge_adaptive", "prumerge_plus_adaptive"])
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_equals_a_literal_loop(method, variant):
    options = {"options": {"fence": FENCE}} if method.endswith("adaptive") else {}
    out = reduced(method, parts()["pixels"], variant=variant, **options)
    attention, keys = signals()
    lengths = []
    for row, (tokens, source) in enumerate(zip(out.per_image(out.tokens), out.per_image(out.source), strict=True)):
        a, x = attention[row], parts()["features"][row]
        kept = literal_kept(a.tolist(), method, variant == "release", attention.flatten().tolist())
        lengths.append(len(kept) + 1)
        unit = torch.nn.functional.normalize(keys[row], dim=-1)
        assert source[:-1].tolist() == kept
        for place, i in enumerate(kept):
            near = sorted((j for j in range(N) if j != i), key=lambda j: (-float(unit[i] @ unit[j]), j))[:32]
            assert torch.allclose(tokens[place], x[i] + sum(a[j] * x[j] for j in near), atol=1e-4)
        dropped = [j for j in range(N) if j not in kept]
        assert torch.allclose(tokens[-1], sum(a[j] * x[j] for j in dropped), atol=1e-4)
        assert [m for m in out.members[row, 0].tolist() if m >= 0] == dropped
        kind = out.kind.expand_as(out.source)[row, : len(source)].tolist()
        assert kind == [DOMINANT] * len(kept) + [CONTEXTUAL]
    if method.endswith("adaptive"):
        assert out.counts.tolist() == lengths and len(set(lengths)) > 1, "the images must differ to say anything"
        assert all(not out.tokens[row, count:].any() for row, count in enumerate(lengths))
    else:
        assert out.counts is None and lengths == [TOKENS] * 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=8, max_size=40), st.floats(0, 3))
def test_outliers_equal_a_direct_percentile_computation(values, fence):
    low, high = np.percentile(np.float32(values).astype(np.float64), [25, 75])
    border = high + fence * (high - low)
    near = [v for v in values if abs(v - border) < 1e-5]
    count = int(adaptive_count(torch.tensor([values]), fence))
    assert sum(v > border + 1e-5 for v in values) <= count <= sum(v > border for v in values) + len(near)


def test_outliers_are_counted_per_image_or_as_released_per_batch():
    attention = torch.full((2, 40), 0.01)
    attention[0, :3] = 0.5
    attention += torch.linspace(0, 1e-3, 40)
    assert adaptive_count(attention).tolist() == [3, 0]
    attention[1] *= 30
    assert adaptive_count(attention).tolist() == [3, 0]
    assert adaptive_count(attention, whole_batch=True).tolist() == [0, 0]


@torch.no_grad()
def test_no_outlier_keeps_the_best_patch_and_every_patch_an_outlier_has_no_summary():
    flat = encode_vision(
        model().model.vision_tower,
        small.pixels(2),
        config=DuetConfig(stage1="prumerge_adaptive", options={"fence": 1e6}, schedule={}),
    )
    assert flat.counts.tolist() == [2, 2]
    (attention, _), counts = signals(), [1, 18, N]
    _, real = _adaptive(attention, torch.tensor(counts), plus=True, release=False)
    uniform = [{0, 12, 24}, set(range(N - 1)), set(range(N))]
    best = [set(row.argsort(descending=True)[:count].tolist()) for row, count in zip(attention, counts, strict=True)]
    assert real.sum(1).tolist() == [len(one | other) for one, other in zip(uniform, best, strict=True)]
    everything = encode_vision(
        model().model.vision_tower,
        small.pixels(2),
        config=DuetConfig(stage1="prumerge_plus_adaptive", options={"fence": -1e6}, schedule={}),
    )
    assert everything.counts.tolist() == [N, N] and (everything.source >= 0).sum(1).tolist() == [N, N]


@torch.no_grad()
def test_the_decoder_drops_shares_of_what_each_image_has():
    config = DuetConfig(stage1="prumerge_adaptive", options={"fence": FENCE}, schedule={2: 0.5, 4: 0.0})
    with trace() as seen:
        out = encode_vision(model().model.vision_tower, parts()["pixels"], config=config)
        counts = out.counts.tolist()
        visual = torch.zeros(3, 4 + max(counts), dtype=torch.bool)
        for row, count in enumerate(counts):
            visual[row, 1 : 1 + count] = True
        run_decoder(model().model.language_model, torch.randn(*visual.shape, 32), visual_mask=visual, config=config)
    assert [layer.visual for layer in seen.passes[0]] == [counts, [c // 2 for c in counts], [0, 0, 0]]
    assert [len(image.kept_after[2]) for image in seen.images] == [c // 2 for c in counts]
    for image, count in zip(seen.images, counts, strict=True):
        assert len(image.source) == count and image.kind == ["dominant"] * (count - 1) + ["contextual"]
        assert len(image.fate()) == N and not any("dropped in stage 1" in line for line in image.fate())
