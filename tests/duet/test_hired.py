"""HiRED shares a picture's budget between its tiles: exactly, by content, and picture by picture."""

import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duet import DuetConfig, trace
from duet.stage1.hired import share
from duet.vision import encode_vision

PATCHES = small.PATCHES


@pytest.fixture(scope="module")
def tower():
    return small.build().model.vision_tower


def config(tokens, **options):
    return DuetConfig(stage1="hired", dominant=tokens, contextual=0, schedule={}, **options)


def class_rows(tower, pixels, block):
    """The class token's attention in one block, summed over heads, from a dense map. Shapes: [B, N]."""
    states = tower(pixels, output_hidden_states=True).hidden_states
    layer = getattr(tower, "vision_model", tower).encoder.layers[block]
    normed = layer.layer_norm1(states[block])
    split = lambda x: x.unflatten(-1, (4, -1)).transpose(1, 2)  # noqa: E731
    query, key = split(layer.self_attn.q_proj(normed)), split(layer.self_attn.k_proj(normed))
    return (query @ key.transpose(-1, -2) * layer.self_attn.scale).softmax(-1).sum(1)[:, 0, 1:]


def literal_budgets(content, side, tiles, tokens, alpha=0.5):
    """METHODS 2.2 for one picture, as a loop: content is the first block's class row over the whole picture."""
    count = tiles[0] * tiles[1]
    total = tokens * (1 + count)
    whole = min(int(alpha * total), side * side)
    rest = min(total - whole, count * side * side)
    marks = sorted(range(side * side), key=lambda i: (-content[i], i))[: int(side * side * (1 - alpha))]
    covered = [0] * count
    for mark in marks:
        row, column = divmod(mark, side)
        covered[row * tiles[0] // side * tiles[1] + column * tiles[1] // side] += 1
    budgets = [rest * c // len(marks) for c in covered]
    by_remainder = sorted(range(count), key=lambda p: (-(rest * covered[p] % len(marks)), p))
    while sum(budgets) < rest:
        for p in by_remainder[: rest - sum(budgets)]:
            budgets[p] += 1
    return [whole, *budgets]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [2, 7, 12])
def test_equals_a_literal_loop(tower, tokens):
    tiles = [(2, 2), (0, 0), (1, 3), (2, 2)]
    pixels = small.pixels(5 + 1 + 4 + 5)
    got = encode_vision(tower, pixels, config=config(tokens), tiles=tiles)
    first, last = class_rows(tower, pixels, 0), class_rows(tower, pixels, 2)
    features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    start, wanted = 0, []
    for shape in tiles:
        single = shape == (0, 0)
        wanted += [tokens] if single else literal_budgets(first[start].tolist(), 6, shape, tokens)
        start = len(wanted)
    assert got.counts.tolist() == wanted
    for row, (tokens_row, source) in enumerate(zip(got.per_image(got.tokens), got.per_image(got.source), strict=True)):
        best = sorted(range(PATCHES), key=lambda i: (-float(last[row, i]), i))[: wanted[row]]
        assert source.tolist() == sorted(best)
        assert torch.allclose(tokens_row, features[row, source], atol=1e-5)
        assert not got.tokens[row, wanted[row] :].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 36), st.sampled_from([(1, 2), (2, 1), (2, 2), (1, 3), (3, 2)]), st.floats(0.01, 0.99), st.data())
def test_the_sum_over_tiles_is_exact(tokens, tiles, alpha, data):
    values = data.draw(st.lists(st.integers(0, 5), min_size=36, max_size=36))
    content = torch.tensor([values], dtype=torch.float32)
    counts = share(content, (6, 6), tiles, config(tokens, options={"alpha": alpha}))[0].tolist()
    assert sum(counts) == tokens * (1 + tiles[0] * tiles[1]) and all(0 <= count <= 36 for count in counts)
    release = share(content, (6, 6), tiles, config(tokens, options={"alpha": alpha}, variant="release"))[0].tolist()
    assert sum(release) <= sum(counts)


def corner():
    """Content in the top left quarter of a whole picture of 6 x 6 patches."""
    content = torch.zeros(6, 6)
    content[:3, :3] = 1.0
    return content.reshape(1, 36)


def test_a_picture_with_content_in_one_corner_spends_its_tiles_there():
    settings_ = {"tokens": 4, "options": {"alpha": 0.75}}  # 9 marks, all in one quarter
    assert share(corner(), (6, 6), (2, 2), config(**settings_))[0].tolist() == [15, 5, 0, 0, 0]
    released = share(corner(), (6, 6), (2, 2), config(**settings_, variant="release"))[0].tolist()
    assert released == [15, 3, 1, 0, 0]  # bands of 9 patches in raster order hold 6 and 3 of the marks


def test_a_full_tile_hands_its_surplus_on():
    assert share(corner(), (6, 6), (2, 2), config(36, options={"alpha": 0.75}))[0].tolist() == [36, 36, 36, 36, 36]
    assert share(corner(), (6, 6), (1, 2), config(30, options={"alpha": 0.75}))[0].tolist() == [36, 36, 18]


@torch.no_grad()
def test_a_picture_does_not_see_the_others_of_its_batch(tower):
    tiles, pixels = [(2, 2), (1, 2)], small.pixels(8)
    together = encode_vision(tower, pixels, config=config(6), tiles=tiles)
    alone = encode_vision(tower, pixels[5:], config=config(6), tiles=tiles[1:])
    for one, other in zip(alone.per_image(alone.source), together.per_image(together.source)[5:], strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_the_trace_has_the_tokens_of_every_tile(tower):
    with trace() as seen:
        got = encode_vision(tower, small.pixels(5), config=config(3), tiles=[(2, 2)])
    assert [len(image.source) for image in seen.images] == got.counts.tolist()
    assert sum(len(image.source) for image in seen.images) == 15
    assert all(image.kind == ["dominant"] * len(image.source) for image in seen.images)


@torch.no_grad()
def test_tiles_that_do_not_add_up(tower):
    with pytest.raises(ValueError, match=r"tiles \[\(2, 2\)\] describe 5 tower passes .* pixel_values holds 3"):
        encode_vision(tower, small.pixels(3), config=config(6), tiles=[(2, 2)])
    with pytest.raises(ValueError, match=r"option alpha must lie between 0 and 1"):
        config(6, options={"alpha": 1.5})
