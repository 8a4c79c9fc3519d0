"""Pictures of any resolution: which patches are padding, what stage 1 keeps of each tile, and in which order."""

import pytest
import torch
from models import CASES

import duet
from duet import DuetConfig
from duet.families.anyres import Layout
from duet.vision import run_tower

SIZES = [
    (24, 24), (48, 48), (20, 45), (45, 20), (9, 60), (60, 9), (1, 1), (1, 40), (40, 1), (2000, 3), (3, 2000), (31, 64),
    (64, 31), (100, 100), (100, 299), (299, 100), (336, 672), (480, 640), (640, 427), (17, 19), (48, 71), (71, 48),
]  # fmt: skip
SIDE = 6


@pytest.fixture(scope="module")
def model():
    return CASES["llava_next"].build()


def layouts(model, sizes, most_tiles=None):
    return [Layout.of(size, model.config.image_grid_pinpoints, 24, SIDE, most_tiles) for size in sizes]


def inputs_of(model, sizes):
    return CASES["llava_next"].inputs(model, [(2, [("image", size)], 4) for size in sizes], "right")


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_placeholders_are_those_of_the_host(family):
    model = CASES[family].build()
    most = 3 if family == "llava_onevision" else None
    pixels = torch.zeros(len(SIZES), 5, 3, 24, 24)
    wanted = [len(x) for x in model.get_image_features(pixels, torch.tensor(SIZES)).pooler_output]
    assert [layout.placeholders for layout in layouts(model, SIZES, most)] == wanted


def test_views_are_what_unpadding_leaves(model):
    for layout in layouts(model, SIZES):
        visible = [len(view.units) for view in layout.views()]
        assert len(visible) == layout.passes and visible[0] == SIDE**2
        assert sum(visible[1:]) == layout.shown[0] * layout.shown[1]


def splits(model, inputs):
    """Tower features of every pass, [T, N, D], and the passes of each image."""
    tiles = [x[: layout.passes] for x, layout in zip(inputs["pixel_values"], layouts(model, SIZES), strict=True)]
    features = run_tower(model.model.vision_tower, torch.cat(tiles), -2).patches
    return features.split([len(x) for x in tiles])


@torch.no_grad()
def test_dominant_tokens_are_the_patches_that_the_trace_names(model):
    config = DuetConfig(dominant=9, contextual=2, cluster_width=2, schedule={})
    inputs = inputs_of(model, SIZES)
    with duet.attach(model, config), duet.trace() as record:
        tokens = iter(model(**inputs).image_hidden_states)
    records = iter(record.images)
    for features, layout in zip(splits(model, inputs), layouts(model, SIZES), strict=True):
        base = model.model.multi_modal_projector(features[0])
        joined = features[1:].unflatten(0, layout.tiles).unflatten(2, (SIDE, SIDE)).permute(0, 2, 1, 3, 4)
        joined = joined.flatten(0, 1).flatten(1, 2)
        rows, columns = layout.rows, layout.columns
        joined = joined[rows.start : rows.stop, columns.start : columns.stop].flatten(0, 1)
        for patches in (base, model.model.multi_modal_projector(joined)):
            image = next(records)
            dominant = [s for s, kind in zip(image.source, image.kind, strict=True) if kind == "dominant"]
            assert dominant == sorted(set(dominant)) and image.kind[: len(dominant)] == ["dominant"] * len(dominant)
            assert image.grid[0] * image.grid[1] == len(patches)
            for source, kind in zip(image.source, image.kind, strict=True):
                token = next(tokens)
                if kind == "dominant":
                    assert torch.allclose(token, patches[source], atol=1e-5)
    assert next(tokens, None) is None and next(records, None) is None


@torch.no_grad()
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_contextual_tokens_average_patches_of_their_own_tile(model, variant):
    config = DuetConfig(dominant=4, contextual=3, cluster_width=3, schedule={}, variant=variant)
    inputs = inputs_of(model, [(48, 48)])
    with duet.attach(model, config), duet.trace() as record:
        model(**inputs)
    base, tiles = record.images
    assert (base.kind + tiles.kind).count("class") == (5 if variant == "release" else 0)
    assert tiles.kind.count("contextual") == len(tiles.members) == 12 and tiles.grid == (12, 12)
    tile_of = lambda patch: (patch // 12 // SIDE, patch % 12 // SIDE)  # noqa: E731
    centres = tiles.source[-12:]
    assert centres == sorted(centres)
    for centre, members in zip(centres, tiles.members, strict=True):
        assert centre in members and {tile_of(patch) for patch in members} == {tile_of(centre)}


@torch.no_grad()
def test_a_tile_keeps_all_of_what_is_less_than_the_budget(model):
    inputs = inputs_of(model, [(9, 60), (40, 22)])
    visible = [[len(view.units) for view in layout.views()] for layout in layouts(model, [(9, 60), (40, 22)])]
    budget = 20
    assert any(0 < n < budget for mine in visible for n in mine) and any(
        n > budget for mine in visible for n in mine[1:]
    )
    with duet.attach(model, DuetConfig(dominant=16, contextual=4, schedule={})), duet.trace() as record:
        model(**inputs)
    assert record.passes[0][0].visual == [sum(min(n, budget) for n in mine) for mine in visible]
    assert record.whole_passes > 0


@torch.no_grad()
def test_a_picture_that_stage1_leaves_whole_is_the_hosts_own(model):
    inputs = inputs_of(model, [(9, 60), (40, 22)])
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    plain = model(**inputs).logits
    with duet.attach(model, DuetConfig(dominant=36, contextual=0, schedule={})), duet.trace() as record:
        assert torch.equal(model(**inputs).logits, plain)
    newlines = [image.kind.count("newline") for image in record.images]
    shown = [layout.shown[0] for layout in layouts(model, [(9, 60), (40, 22)])]
    assert newlines == [0, shown[0], 0, shown[1]]
    assert record.whole_passes == record.tower_passes == 4


@torch.no_grad()
def test_a_budget_per_picture_is_shared_by_its_passes(model):
    sizes = [(48, 48), (20, 45), (24, 24)]
    with duet.attach(model, DuetConfig(dominant=31, contextual=6, schedule={}, per="picture")) as handle:
        assert "31 + 6 visual tokens per image" in repr(handle)
        with duet.trace() as record:
            model(**inputs_of(model, sizes))
    assert record.passes[0][0].visual == [37, 37, 37]
    five, three = record.images[:2], record.images[2:4]
    assert [len(image.source) for image in five] == [7 + 2, 24 + 4]  # 31 = 7 + 6 + 6 + 6 + 6, 6 = 2 + 1 + 1 + 1 + 1
    assert [len(image.source) for image in three] == [11 + 2, 20 + 4]


def test_a_picture_budget_below_its_passes_is_an_error(model):
    config = DuetConfig(dominant=4, contextual=2, schedule={}, per="picture")
    with duet.attach(model, config), pytest.raises(ValueError, match=r"dominant = 4 .* 5 tower passes"):
        model(**inputs_of(model, [(48, 48)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_sizes": None}, "pixel_values needs image_sizes"),
        ({"image_sizes": torch.tensor([[48, 48], [48, 48]])}, r"2 picture\(s\)"),
        ({"pixel_values": torch.zeros(4, 3, 24, 24)}, "5 tower passes"),
    ],
)
def test_pixels_that_do_not_fit_their_sizes(model, change, message):
    inputs = inputs_of(model, [(48, 48)]) | change
    with (
        duet.attach(model, DuetConfig(dominant=4, contextual=2, schedule={})),
        pytest.raises(ValueError, match=message),
    ):
        model(**inputs)


@torch.no_grad()
def test_passes_in_one_list_are_the_same_pictures(model):
    inputs = inputs_of(model, [(20, 45), (48, 48), (40, 22)])
    counts = [layout.passes for layout in layouts(model, [(20, 45), (48, 48), (40, 22)])]
    listed = torch.cat([x[:count] for x, count in zip(inputs["pixel_values"], counts, strict=True)])
    with duet.attach(model, CASES["llava_next"].config):
        wanted = model(**inputs).logits
        assert torch.equal(model(**inputs | {"pixel_values": listed}).logits, wanted)
        beams = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
        left = CASES["llava_next"].batch(model)
        sizes = [layout.passes for layout in layouts(model, left["image_sizes"].tolist())]
        listed = torch.cat([x[:count] for x, count in zip(left["pixel_values"], sizes, strict=True)])
        plain = model.generate(**left, **beams)
        assert torch.equal(model.generate(**left | {"pixel_values": listed}, **beams), plain)
