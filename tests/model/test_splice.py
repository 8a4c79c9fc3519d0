"""Splicing pictures into prompts: properties over random batches, and clear errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import IMAGE, golden_model, pixels
from torch import nn

from llava.model.anyres import merge_single, merge_tiles, unpad_image
from llava.model.splice import assign_features, embed_text, image_slots, pad, splice_row, to_left_padding, truncate

WIDTH = 4
EMBED = nn.Embedding(50, WIDTH)
CPU = torch.device("cpu")


@st.composite
def rows(draw):
    """A batch as lists: text tokens are positive, None is a picture of its own length."""
    piece = st.one_of(st.integers(1, 49), st.none())
    batch = draw(st.lists(st.lists(piece, min_size=1, max_size=12), min_size=1, max_size=4))
    lengths = [[draw(st.integers(1, 5)) for token in row if token is None] for row in batch]
    return batch, lengths


@settings(max_examples=60, deadline=None)
@given(rows(), st.sampled_from(["left", "right"]))
def test_every_position_is_where_it_belongs(case, side):
    batch, lengths = case
    spliced, expected, all_ids = [], [], []
    for row in batch:
        all_ids.append(torch.tensor([IMAGE if token is None else token for token in row]))
    texts = embed_text(all_ids, EMBED, CPU)
    for row, sizes, ids, text in zip(batch, lengths, all_ids, texts, strict=True):
        labels = torch.tensor([-100 if token is None else token for token in row])
        features = [torch.full((size, WIDTH), 100.0 + i) for i, size in enumerate(sizes)]
        spliced.append(splice_row(ids, labels, features, text))
        want, pictures = [], iter(enumerate(sizes))
        for token in row:
            if token is None:
                index, size = next(pictures)
                want += [(100.0 + index, -100, True)] * size
            else:
                want.append((EMBED.weight[token, 0].item(), token, False))
        expected.append(want)
    out = pad(spliced, side)
    longest = max(map(len, expected))
    assert out.embeds.shape == (len(batch), longest, WIDTH)
    padded = len({len(want) for want in expected}) > 1
    assert out.counts.left_padded == (padded and side == "left")
    assert out.counts.tokens == [len(want) for want in expected]
    assert out.counts.visual == [sum(visual for *_, visual in want) for want in expected]
    for index, want in enumerate(expected):
        valid = out.mask[index]
        assert valid.sum() == len(want)
        assert bool(valid[-1] if side == "left" else valid[0])
        got = zip(
            out.embeds[index, valid, 0].tolist(),
            out.labels[index, valid].tolist(),
            out.visual[index, valid].tolist(),
            strict=True,
        )
        assert list(got) == want
        assert out.positions[index, valid].tolist() == list(range(len(want)))
        assert (out.labels[index, ~valid] == -100).all() and not out.visual[index, ~valid].any()
        assert not out.embeds[index, ~valid].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.booleans())
def test_pictures_are_dealt_out_in_order(slots, placeholders):
    total = sum(max(count, 1) if placeholders else count for count in slots)
    dealt = assign_features(slots, total)
    assert [index for row in dealt for index in row] == list(range(total))
    assert all(len(row) in ({count} if count else {0, 1}) for row, count in zip(dealt, slots, strict=True))


@pytest.mark.parametrize(
    ("slots", "given_pictures", "named"), [([1, 2], 2, "row 1"), ([1], 2, "row 0: 1"), ([0, 1], 0, "row 1")]
)
def test_a_wrong_number_of_pictures_is_an_error_that_names_the_row(slots, given_pictures, named):
    with pytest.raises(ValueError, match=named):
        assign_features(slots, given_pictures)


def test_left_padding_moves_tokens_and_keeps_their_order():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    values = torch.arange(12).view(3, 4)
    moved_mask, (moved, nothing, deep) = to_left_padding(mask, values, None, values[..., None].expand(-1, -1, 2))
    assert moved_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert moved[0, 2:].tolist() == [0, 1] and moved[2, 2:].tolist() == [9, 10] and nothing is None
    assert torch.equal(deep[..., 1], moved)
    again, (same,) = to_left_padding(moved_mask, moved)
    assert torch.equal(again, moved_mask) and torch.equal(same, moved)


def test_truncation_cuts_everything_alike():
    ids = torch.tensor([3, IMAGE, 4])
    row = splice_row(ids, ids, [torch.ones(5, WIDTH)], *embed_text([ids], EMBED, CPU))
    (cut,) = truncate([row], 4)
    assert len(cut.embeds) == len(cut.labels) == len(cut.visual) == 4
    assert truncate([row], None)[0] is row


def test_a_text_row_keeps_the_projector_in_the_graph():
    feature = torch.ones(3, WIDTH, requires_grad=True)
    ids = torch.tensor([3, 4])
    row = splice_row(ids, ids, [feature], *embed_text([ids], EMBED, CPU))
    assert len(row.embeds) == 2 and not row.visual.any()
    row.embeds.sum().backward()
    assert feature.grad is not None and not feature.grad.any()


@pytest.fixture(scope="module")
def model():
    return golden_model().eval()


def test_early_exits_hand_the_inputs_back(model):
    ids = torch.tensor([[1, 5, 6]])
    for images in (None, []):
        out = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)
        assert isinstance(out, tuple) and len(out) == 6 and out[0] is ids and out[4] is None and out.visual_mask is None
    step = torch.tensor([[7]])
    assert model.prepare_inputs_labels_for_multimodal(step, None, None, None, None, pixels("coffee")[None])[0] is step


def test_a_mark_without_a_picture_is_a_clear_error(model):
    ids = torch.tensor([[1, 5, 6], [1, IMAGE, 6]])
    with pytest.raises(ValueError, match="row 1 has an <image> mark but no picture"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="pictures run out in row 1"):
        model(input_ids=torch.tensor([[1, IMAGE], [1, IMAGE]]), images=pixels("coffee")[None])


def test_a_mask_never_strips_a_picture(model):
    """Clients make masks as ids != pad; with an odd pad id that must not cost a slot."""
    ids = torch.tensor([[1, IMAGE, 5, 0]])
    out = model.prepare_inputs_labels_for_multimodal(
        ids, None, torch.tensor([[1, 0, 1, 0]]), None, None, pixels("coffee")[None]
    )
    assert out[2].shape == (1, 578) and out[2].dtype == torch.long and out.visual_mask.sum() == 576


def test_several_pictures_as_a_list_keep_their_order(model):
    names = ["coffee", "astronaut"]
    ids = torch.tensor([[1, IMAGE, 5, IMAGE, 6]])
    out = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, [pixels(name) for name in names])
    with torch.no_grad():
        for index, name in enumerate(names):
            start = 1 + index * 577
            torch.testing.assert_close(
                out[4][0, start : start + 576], model.encode_images(pixels(name)[None])[0], atol=1e-5, rtol=0
            )


def test_half_precision_pictures_are_cast(model):
    image = pixels("coffee")[None]
    with torch.no_grad():
        assert model.encode_images(image.half()).dtype == torch.float32
    model.get_vision_tower()


def test_another_projects_plain_tuple_works():
    class Patched(type(golden_model())):
        def prepare_inputs_labels_for_multimodal(self, *args, **kwargs):
            return tuple(super().prepare_inputs_labels_for_multimodal(*args, **kwargs))

    from duet import DuetConfig
    from llava.model import LlavaLlamaForCausalLM

    plain = LlavaLlamaForCausalLM.from_pretrained(golden_model().config._name_or_path).eval()
    patched = Patched.from_pretrained(golden_model().config._name_or_path).eval()
    inputs = {"input_ids": torch.tensor([[1, 5, IMAGE, 6, 7]]), "images": pixels("coffee")[None]}
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, patched(**inputs).logits)
        patched.set_reduction(DuetConfig(stage1="none", schedule={4: 0.5}))
        assert patched(**inputs).logits.shape[1] == 4 + 288  # the tensor brings along what is visual
    assert patched.generate(inputs["input_ids"], images=inputs["images"], max_new_tokens=2).shape[1] <= 2


def test_unpad_and_tile_merge_give_the_known_token_counts():
    """Tokens of anyres + spatial_unpad for a picture size."""
    side, newline = 24, torch.zeros(8)
    for size, grid, count in [
        ((336, 336), (1, 1), 1176),
        ((640, 480), (2, 2), 2340),
        ((480, 640), (2, 2), 2352),
        ((1000, 1000), (2, 2), 2928),
        ((1600, 400), (3, 1), 1890),
    ]:
        features = torch.zeros(1 + grid[0] * grid[1], side * side, 8)
        assert len(merge_tiles(features, grid, side, size, newline)) == count, size
        assert len(merge_tiles(features, grid, side, size, None)) == len(features) * 576
    assert unpad_image(torch.zeros(8, 48, 48), (480, 640)).shape == (8, 48, 36)
    assert len(merge_single(torch.zeros(1, 576, 8), newline)) == 577
    with pytest.raises(ValueError, match="flat"):
        merge_tiles(torch.zeros(3, 307, 8), (2, 1), side, (672, 336), None)


def test_slots_are_counted_per_row():
    assert image_slots(torch.tensor([[1, IMAGE, IMAGE], [1, 2, 3]])) == [2, 0]


def test_a_batch_calls_every_module_once_whatever_it_holds(model):
    """Under ZeRO-3 a rank whose batch needs more calls than another's would hang both."""
    calls = []
    watched = {
        "tower": model.get_vision_tower(),
        "projector": model.get_model().mm_projector,
        "text": model.get_input_embeddings(),
    }
    hooks = [module.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, module in watched.items()]
    picture = pixels("coffee")
    for rows, count in (([[1, 5, 6]], 1), ([[1, IMAGE, 6], [1, 5, 6], [IMAGE, IMAGE, 7]], 4), ([[IMAGE, 5, 7]], 1)):
        calls.clear()
        with torch.no_grad():
            model.prepare_inputs_labels_for_multimodal(torch.tensor(rows), None, None, None, None, [picture] * count)
        assert sorted(calls) == ["projector", "text", "tower"]
    for hook in hooks:
        hook.remove()
