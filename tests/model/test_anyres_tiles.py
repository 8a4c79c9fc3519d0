"""Tiles of LLaVA-1.6: token counts, preprocessing against transformers', reduction, and what goes wrong."""

from typing import Any

import pytest
import torch
from model_helpers import CLIP, GOLDEN
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image as transformers_unpad
from v16_world import SIZES, TILE, merged_count, picture, write_original, write_tower

import duet
from duet import DuetConfig
from duet.families import anyres
from llava.mm_utils import process_anyres_image, process_images, read_pinpoints, resize_and_pad_image
from llava.model.anyres import Tiling, count_tokens, merge_single, merge_tiles, unpad_image
from llava.model.builder import load_pretrained_model
from llava.serve.cli import describe_reduction

PINPOINTS = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
V16 = Tiling(image_size=336, side=24, pinpoints=PINPOINTS, unpad=True, rounded=False)
# (width, height) -> (tiles across, tiles down), visual tokens. Worked out by hand from LLAVA_STACK.md section 10.
COUNTS = {
    (336, 336): ((1, 2), 1176), (640, 480): ((2, 2), 2340), (480, 640): ((2, 2), 2352), (1000, 1000): ((2, 2), 2928),
    (1600, 400): ((3, 1), 1890), (400, 1600): ((1, 3), 1944), (672, 672): ((2, 2), 2928), (640, 427): ((2, 2), 2144),
    (427, 640): ((2, 2), 2160), (500, 375): ((2, 2), 2340), (375, 500): ((2, 2), 2352), (1920, 1080): ((2, 2), 1948),
    (1080, 1920): ((2, 2), 1968), (300, 600): ((1, 2), 1776), (600, 300): ((2, 1), 1752), (335, 337): ((1, 2), 1176),
    (1008, 336): ((3, 1), 2328), (1, 1): ((1, 2), 1176), (2000, 3): ((3, 1), 576), (3, 2000): ((1, 3), 648),
    (205, 328): ((1, 2), 1526), (1008, 337): ((3, 1), 2328),
}  # fmt: skip
REDUCED = DuetConfig(dominant=9, contextual=3, cluster_width=2, schedule={1: 0.5, 3: 0.0})


@pytest.mark.parametrize(("size", "expected"), COUNTS.items(), ids=str)
def test_token_counts(size, expected):
    grid, count = expected
    assert V16.grid(size) == grid and V16.layout(size).placeholders == count
    features, newline = torch.zeros(1 + grid[0] * grid[1], 576, 2), torch.ones(2)
    merged = V16.merge(features, size, newline)
    rows, columns = merged_count(size, grid, 24)
    assert len(merged) == count == 576 + rows * (columns + 1)
    assert merged[:, 0].sum() == rows, "one newline for each row"
    assert torch.equal(merged, merge_tiles(features, grid, 24, size, newline))
    assert len(merge_tiles(features, grid, 24, size, None)) == len(features) * 576


def test_the_two_ways_of_rounding():
    """LLaVA truncates, transformers rounds to 7 digits first; few sizes show it, by two rows."""
    rounded = Tiling(336, 24, PINPOINTS, unpad=True, rounded=True)
    odd = {(328, 205), (328, 861), (376, 799), (88, 55)}
    for width, height in [*odd, *[(w, h) for w in range(1, 1500, 71) for h in range(1, 1500, 73)]]:
        across, down = V16.grid((width, height))
        plane = torch.arange(24 * 24 * across * down).view(1, 24 * down, 24 * across)
        theirs = transformers_unpad(plane, (height, width))
        assert torch.equal(unpad_image(plane, (width, height), rounded=True), theirs)
        assert rounded.layout((width, height)).shown == theirs.shape[1:]
        rows = theirs.shape[1] - unpad_image(plane, (width, height)).shape[1]
        assert rows == (2 if (width, height) in odd else 0)
    assert (V16.layout((328, 205)).placeholders, rounded.layout((328, 205)).placeholders) == (926, 976)


def test_a_picture_without_tiles_has_one_newline():
    assert (
        V16.layout((900, 900), passes=1).placeholders == 577 == len(merge_single(torch.zeros(1, 576, 2), torch.ones(2)))
    )
    spatial = Tiling(336, 24, PINPOINTS, unpad=False, rounded=False)
    assert spatial.layout((640, 480)).placeholders == 5 * 576 and spatial.layout((9, 9), passes=1).placeholders == 576


def test_tiles_lie_where_they_were_cut():
    """Every token of the plane is the patch of the picture at that place."""
    tiling = Tiling(image_size=4, side=2, pinpoints=[(8, 12)], unpad=True, rounded=False)
    place = torch.arange(6 * 4).view(3, 2, 2, 2).permute(0, 2, 1, 3)  # (tile rows, tile columns) of patches
    plane = torch.arange(24).view(6, 4)
    tiles = plane.view(3, 2, 2, 2).permute(0, 2, 1, 3).reshape(6, 4, 1).float()
    assert place.shape == (3, 2, 2, 2)
    merged = tiling.merge(torch.cat([torch.full((1, 4, 1), 90.0), tiles]), (8, 12), torch.tensor([-1.0]))
    assert merged[:4].unique().tolist() == [90]
    assert torch.equal(merged[4:].view(6, 5)[:, :4], plane.float()) and (merged[4:].view(6, 5)[:, 4] == -1).all()
    narrow = tiling.merge(torch.cat([torch.zeros(1, 4, 1), tiles]), (4, 12), torch.tensor([-1.0]))
    assert torch.equal(narrow[4:].view(6, 3)[:, :2], plane[:, 1:3].float())


@pytest.mark.parametrize("name", ["astronaut", "coffee", "flower_tall"])
@pytest.mark.parametrize("size", [None, (640, 480), (1000, 300), (337, 501), (1, 1), (2000, 3)], ids=str)
def test_preprocessing_is_transformers(name, size):
    """Against its processor without torchvision; the largest difference seen is 0.0."""
    with Image.open(GOLDEN / "images" / f"{name}.png") as file:
        image = file.convert("RGB")
    image = image if size is None else image.resize(size)
    ours = CLIPImageProcessorPil.from_pretrained(CLIP)
    side = {"height": 336, "width": 336}
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size=side, image_grid_pinpoints=[[h, w] for w, h in PINPOINTS]
    )
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    got = process_anyres_image(image, ours, PINPOINTS)
    assert got.shape == expected.shape and (got - expected).abs().max() < 1e-5


# --- reduction --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("anyres")
    folder = write_original(root / "m", write_tower(root / "tower"))
    _, model, image_processor, _ = load_pretrained_model(str(folder), None, "m", device="cpu")
    return model, image_processor


@pytest.fixture
def model(world):
    yield world[0]
    world[0].set_reduction(None)
    world[0].config.mm_patch_merge_type = "spatial_unpad"


def inputs(world, *sizes) -> dict[str, Any]:
    pixels = process_images([picture(size) for size in sizes], world[1], world[0].config)
    ids = torch.tensor([[1, 5, *[-200] * len(sizes), 6, 7]])
    return {"input_ids": ids, "images": pixels, "image_sizes": list(sizes)}


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        None,
        DuetConfig(stage1="none", schedule={2: 0.5}),
        REDUCED,
        DuetConfig(dominant=9, contextual=3, schedule={}, variant="release"),
        DuetConfig(dominant=31, contextual=6, schedule={}, per="picture"),
        DuetConfig(dominant=0.25, contextual=0.1, schedule={}),
        DuetConfig(stage1="random", dominant=7, contextual=0, schedule={}),
        DuetConfig(stage1="downsample", dominant=9, contextual=0, schedule={}),
    ],
    ids=lambda config: "none" if config is None else f"{config.stage1}-{config.per}-{config.variant}",
)
def test_counts_are_known_before_the_tower_runs(world, model, config):
    model.set_reduction(config)
    tiling = Tiling.of(model.config, model.get_vision_tower().config)
    expected = [count_tokens(tiling.layout(size), model.reduction) for size in SIZES]
    with duet.trace() as seen:
        model(**inputs(world, *SIZES))
    assert seen.passes[0][0].visual == [sum(expected)]
    if config is not None and config.stage1 != "downsample":  # that one has a record for each pass
        recorded = [len(image.source) for image in seen.images]
        assert [sum(recorded[i : i + 2]) for i in range(0, len(recorded), 2)] == expected
    assert 576 not in expected, "the tower has 36 patches"


@torch.no_grad()
def test_the_content_may_decide_how_many(world, model):
    config = DuetConfig(stage1="hired", dominant=10, contextual=0, schedule={})
    model.set_reduction(config)
    tiling = Tiling.of(model.config, model.get_vision_tower().config)
    for size in SIZES:
        with duet.trace() as seen:
            model(**inputs(world, size))
        assert 0 < seen.passes[0][0].visual[0] <= count_tokens(tiling.layout(size), config)


@torch.no_grad()
def test_a_reduced_picture_has_no_newlines(world, model):
    """Only what stage 1 leaves whole has rows, and so newlines; the newline's value matters there alone."""
    wide = inputs(world, SIZES[0])
    newline = model.get_model().image_newline
    for config, matters in ((None, True), (DuetConfig(stage1="none", schedule={2: 0.5}), True), (REDUCED, False)):
        model.set_reduction(config)
        before = model(**wide).logits
        newline += 1
        same = torch.equal(before, model(**wide).logits)
        newline -= 1
        assert same is not matters


@torch.no_grad()
def test_merge_types(world, model):
    """`flat` puts the tiles' tokens one after the other; `spatial` joins them, with nothing cut off."""
    square = inputs(world, (48, 48))
    lengths = {}
    for merge in ("flat", "spatial", "spatial_unpad"):
        model.config.mm_patch_merge_type = merge
        for name, config in (("whole", None), ("reduced", REDUCED)):
            model.set_reduction(config)
            lengths[merge, name] = model.prepare_inputs_labels_for_multimodal(
                square["input_ids"], None, None, None, None, square["images"], square["image_sizes"]
            )[4].shape[1]
    assert lengths == {
        ("flat", "whole"): 4 + 180, ("flat", "reduced"): 4 + 60, ("spatial", "whole"): 4 + 180,
        ("spatial", "reduced"): 4 + 60, ("spatial_unpad", "whole"): 4 + 180 + 12, ("spatial_unpad", "reduced"): 4 + 60,
    }  # fmt: skip


@torch.no_grad()
def test_a_budget_per_picture_with_flat_tiles(world, model):
    """Tiles one after the other share it as well; a picture in one pass has it alone."""
    model.config.mm_patch_merge_type = "flat"
    model.set_reduction(DuetConfig(dominant=31, contextual=6, schedule={}, per="picture"))
    given = inputs(world, SIZES[0], SIZES[2])
    with duet.trace() as seen:
        flat = model(**given).logits
        one = inputs(world, SIZES[0])
        alone = model(**one | {"images": [one["images"][0][:1]]}).logits
        plain = model(input_ids=one["input_ids"], images=one["images"][0][:1]).logits
        assert torch.equal(plain, alone)
    assert [p[0].visual for p in seen.passes] == [[37 + 37], [36], [36]]
    assert flat.shape[1] == 4 + 74 and alone.shape[1] == 4 + 36 and "31 + 6 visual tokens" in describe_reduction(model)
    with duet.attach(model, DuetConfig(dominant=50, contextual=6, schedule={}, per="picture")) as handle:
        assert "50 + 6 visual tokens per image" in repr(handle), "more than a tile has, and less than five have"
        assert model(**given).logits.shape[1] == 4 + 56 + 56


@pytest.mark.parametrize("config", [None, REDUCED], ids=["whole", "reduced"])
def test_gradients(world, config):
    """Projector and newline have gradients in every batch: zero for a newline that nothing uses, never none."""
    model = world[0]
    model.set_reduction(config)
    given = inputs(world, SIZES[0], SIZES[4])
    anyres._view.cache_clear()
    with torch.inference_mode():  # an evaluation in the middle of a training
        model.eval()(**given)
    model.train()
    blank = {"images": torch.zeros(1, 1, 3, TILE, TILE), "image_sizes": [(TILE, TILE)]}
    text_only: dict[str, Any] = {"input_ids": given["input_ids"][:, :2]} | blank
    for batch in (given, text_only):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"].clamp(min=1)).loss.backward()
        inner = model.get_model()
        newline, projector = inner.image_newline.grad, inner.mm_projector[0].weight.grad
        assert newline is not None and newline.isfinite().all() and projector is not None
        assert bool(newline.any()) is (config is None and batch is given)
        assert bool(projector.any()) is (batch is given)
    model.zero_grad()
    model.eval()
    model.set_reduction(None)


def test_tower_and_projector_run_once_whatever_the_pictures_are(world, model):
    """Under ZeRO-3 every rank must call every module equally often."""
    calls = []
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    handles = [m.register_forward_hook(lambda module, *_: calls.append(module)) for m in (tower, projector)]
    dummy = {"input_ids": torch.tensor([[1, 5]]), "images": torch.zeros(1, 1, 3, TILE, TILE), "image_sizes": [(9, 9)]}
    per_picture = DuetConfig(dominant=40, contextual=5, schedule={}, per="picture")  # leaves pictures of one pass whole
    mixed = inputs(world, SIZES[0], SIZES[1])
    mixed["images"] = [*mixed["images"], torch.zeros(1, 3, TILE, TILE)]
    mixed |= {"input_ids": torch.tensor([[1, -200, -200, -200, 5]]), "image_sizes": [SIZES[0], SIZES[1], (9, 9)]}
    with torch.no_grad():
        for config in (None, REDUCED, per_picture):
            model.set_reduction(config)
            for batch in (dummy, mixed, inputs(world, SIZES[3])):
                calls.clear()
                model(**batch)
                assert calls == [tower, projector]
    for handle in handles:
        handle.remove()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pinpoints", "message"),
    [
        (None, r"must be a list of \(width, height\) pairs .*got None"),
        ("", "'' cannot be read"),
        ("[(336, 672)", "cannot be read"),
        ("(1x1),...,(6x6)", "cannot be read"),
        ([], r"got \[\]"),
        ([(336,)], "must be a list"),
        ([(336, "672")], "must be a list"),
        ([(336, -672)], "must be a list"),
        ([(336, 600)], "336 x 600, which tiles of 336 x 336 pixels .* do not fill; use multiples of 336"),
    ],
)
def test_pinpoints_that_cannot_be_used(pinpoints, message):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    with pytest.raises(ValueError, match=message):
        process_anyres_image(Image.new("RGB", (30, 20)), processor, pinpoints)
    assert read_pinpoints("[[336, 672]]", 336) == read_pinpoints([(336, 672)], 336) == [(336, 672)]


def test_other_kinds_of_anyres(world):
    from types import SimpleNamespace

    config = SimpleNamespace(image_aspect_ratio="anyres_max_9", image_grid_pinpoints=PINPOINTS)
    with pytest.raises(ValueError, match="'anyres_max_9' is not supported; use 'anyres'"):
        process_images([Image.new("RGB", (3, 3))], world[1], config)


@torch.no_grad()
@pytest.mark.parametrize("config", [None, REDUCED], ids=["whole", "reduced"])
def test_tiny_and_extreme_pictures_work(world, model, config):
    model.set_reduction(config)
    for size in ((1, 1), (2000, 3), (3, 2000), (1, 500)):
        given = inputs(world, size)
        assert model(**given).logits.isfinite().all()
        assert model.generate(given.pop("input_ids"), **given, max_new_tokens=2, do_sample=False).shape[1] <= 2
    tiling = Tiling.of(model.config, model.get_vision_tower().config)
    assert count_tokens(tiling.layout((2000, 3)), config) == (36 if config is None else 12)
    assert resize_and_pad_image(Image.new("RGB", (2000, 3)), (672, 336)).size == (672, 336)


@pytest.mark.parametrize("config", [None, REDUCED], ids=["whole", "reduced"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_sizes": None}, r"'spatial_unpad' needs image_sizes, the \(width, height\)"),
        ({"image_sizes": [(45, 20), (1, 1)]}, r"2 image_sizes were given for 1 picture"),
        ({"image_sizes": []}, r"0 image_sizes were given for 1 picture"),
        ({"image_sizes": [(48, 48)]}, r"48 x 48 pixels has 2 x 2 tiles .* 5 tower passes, but 3 were given"),
        ({"images": torch.zeros(1, 2, 3, TILE, TILE)}, "3 tower passes, but 2 were given"),
    ],
)
def test_sizes_that_do_not_fit(world, model, config, change, message):
    model.set_reduction(config)
    with pytest.raises(ValueError, match=message):
        model(**inputs(world, (45, 20)) | change)


def test_names_and_class_tokens_that_do_not_fit(world, model):
    given = inputs(world, (45, 20))
    model.config.mm_patch_merge_type = "anyres"
    with pytest.raises(ValueError, match="unknown mm_patch_merge_type 'anyres'; use 'flat', 'spatial'"):
        model(**given)
    model.config.mm_patch_merge_type = "spatial_unpad"
    model.get_vision_tower().select_feature = "cls_patch"
    try:
        with pytest.raises(ValueError, match="mm_vision_select_feature must be 'patch'"):
            model(**given)
    finally:
        model.get_vision_tower().select_feature = "patch"


def test_a_picture_budget_below_its_passes_is_an_error(world, model):
    model.set_reduction(DuetConfig(dominant=2, contextual=2, schedule={}, per="picture"))
    with pytest.raises(ValueError, match=r"dominant = 2 .* 3 tower passes"):
        model(**inputs(world, (45, 20)))
