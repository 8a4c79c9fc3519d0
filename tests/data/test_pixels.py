"""Picture processing: golden pixels for both ways of resizing, and the size arithmetic of anyres."""

import base64
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_helpers import GOLDEN, image_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from llava import mm_utils

IMAGES = ["astronaut", "coffee", "flower_tall"]
PAD = SimpleNamespace(image_aspect_ratio="pad")
GRIDS = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]


def picture(name):
    return Image.open(GOLDEN / "images" / f"{name}.png").convert("RGB")


@pytest.mark.parametrize("name", IMAGES)
def test_pad_mode_equals_golden(name):
    golden = np.asarray(Image.open(GOLDEN / "cases" / f"pixels_{name}.png")).astype(np.float64)
    pixels = mm_utils.process_images([picture(name)], image_processor(), PAD)
    assert pixels.shape == (1, 3, 336, 336) and pixels.dtype == torch.float32
    mean, std = np.array(image_processor().image_mean), np.array(image_processor().image_std)
    expected = ((golden / 255 - mean) / std).transpose(2, 0, 1)
    assert np.abs(pixels[0].numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("name", IMAGES)
def test_crop_mode_equals_golden(name):
    golden = load_file(GOLDEN / "cases" / "pixels_nopad_check.safetensors")[f"{name}_rowsum"]
    pixels = mm_utils.process_images([picture(name)], image_processor(), SimpleNamespace(image_aspect_ratio=None))
    assert (pixels[0].sum(dim=-1) - golden).abs().max() < 1e-3


def test_square_is_the_processors_own_way():
    square = mm_utils.process_images(
        [picture("coffee")], image_processor(), SimpleNamespace(image_aspect_ratio="square")
    )
    crop = mm_utils.process_images([picture("coffee")], image_processor(), SimpleNamespace())
    assert torch.equal(square, crop)


def test_pad_colour_is_truncated():
    assert tuple(int(channel * 255) for channel in image_processor().image_mean) == mm_utils.CLIP_MEAN_COLOUR
    wide = mm_utils.expand2square(Image.new("RGB", (6, 2)), mm_utils.CLIP_MEAN_COLOUR)
    assert wide.size == (6, 6)
    assert wide.getpixel((0, 0)) == (122, 116, 104) and wide.getpixel((0, 2)) == (0, 0, 0)


@given(width=st.integers(1, 40), height=st.integers(1, 40))
@settings(deadline=None)
def test_expand2square(width, height):
    original = Image.new("L", (width, height), 200)
    square = mm_utils.expand2square(original, 7)
    side = max(width, height)
    assert square.size == (side, side) and square.mode == "L"
    assert (np.asarray(square) == 200).sum() == width * height
    assert (square is original) == (width == height)


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (3, 3), (3, 400), (2000, 1)])
def test_odd_sizes(size):
    for config in (PAD, SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=GRIDS)):
        pixels = mm_utils.process_images([Image.new("RGB", size, "red")], image_processor(), config)
        assert pixels.shape[-3:] == (3, 336, 336) and torch.isfinite(pixels).all()


# --- anyres ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "best"),
    [
        ((336, 336), (672, 672)),
        ((640, 480), (672, 672)),
        ((480, 640), (672, 672)),
        ((1000, 1000), (672, 672)),
        ((1600, 400), (1008, 336)),
        ((400, 1600), (336, 1008)),
        ((300, 600), (336, 672)),
    ],
)
def test_select_best_resolution(size, best):
    candidates = GRIDS if size != (336, 336) else [(672, 672)]
    assert mm_utils.select_best_resolution(size, candidates) == best


def test_ties_go_to_less_waste_then_to_the_first():
    assert mm_utils.select_best_resolution((100, 100), [(500, 200), (200, 200)]) == (200, 200)
    assert mm_utils.select_best_resolution((100, 100), [(200, 300), (300, 200)]) == (200, 300)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_resolution_is_the_best_by_definition(width, height):
    best = mm_utils.select_best_resolution((width, height), GRIDS)

    def effective(grid):
        scale = min(grid[0] / width, grid[1] / height)
        return min(int(width * scale) * int(height * scale), width * height)

    assert best in GRIDS
    for grid in GRIDS:
        better = effective(grid) > effective(best)
        same_but_smaller = effective(grid) == effective(best) and grid[0] * grid[1] < best[0] * best[1]
        assert not better and not same_but_smaller


@pytest.mark.parametrize("pinpoints", [GRIDS, str([list(grid) for grid in GRIDS])])
def test_anyres_tiles(pinpoints):
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints)
    same = mm_utils.process_images([picture("coffee"), picture("coffee")], image_processor(), config)
    tiles = mm_utils.get_anyres_image_grid_shape(picture("coffee").size, pinpoints, 336)
    assert same.shape == (2, 1 + tiles[0] * tiles[1], 3, 336, 336)
    mixed = mm_utils.process_images([picture("coffee"), Image.new("RGB", (1600, 400))], image_processor(), config)
    assert [len(tiles) for tiles in mixed] == [1 + tiles[0] * tiles[1], 4]


def test_first_anyres_view_is_the_whole_picture():
    views = mm_utils.process_anyres_image(picture("coffee"), image_processor(), [(672, 336)])
    whole = image_processor()(picture("coffee").resize((336, 336)), return_tensors="pt")["pixel_values"][0]
    assert len(views) == 3 and torch.equal(views[0], whole)


def test_resize_and_pad_centres_on_black():
    padded = mm_utils.resize_and_pad_image(Image.new("RGB", (100, 50), "white"), (200, 200))
    assert padded.size == (200, 200)
    assert padded.getpixel((100, 49)) == (0, 0, 0) and padded.getpixel((100, 51)) == (255, 255, 255)


def test_divide_to_patches_goes_row_by_row():
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    assert [np.asarray(tile)[0, 0] for tile in mm_utils.divide_to_patches(image, 2)] == [0, 2, 8, 10]


@pytest.mark.parametrize("pinpoints", ["[]", "[(1, 2, 3)]", "7"])
def test_bad_pinpoints(pinpoints):
    with pytest.raises(ValueError, match=r"pinpoints"):
        mm_utils.get_anyres_image_grid_shape((10, 10), pinpoints, 336)


# --- the rest of mm_utils -------------------------------------------------------------------------------------------


def test_base64_picture():
    buffer = BytesIO()
    Image.new("RGB", (3, 5), "blue").save(buffer, format="PNG")
    assert mm_utils.load_image_from_base64(base64.b64encode(buffer.getvalue()).decode()).size == (3, 5)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("llava-v1.5-7b", "llava-v1.5-7b"),
        ("a/llava-v1.5-7b/", "llava-v1.5-7b"),
        ("/runs/llava-lora/checkpoint-100", "llava-lora_checkpoint-100"),
        ("checkpoint-100", "checkpoint-100"),
    ],
)
def test_model_name(path, name):
    assert mm_utils.get_model_name_from_path(path) == name
