"""Overlays and heat maps: what a pixel shows must be what the trace says."""

import numpy as np
import pytest
import torch
from PIL import Image

from duet import draw
from duet.tracing import ImageRecord

GRID = (4, 6)
SIZE = 240  # 60 x 40 pixels a patch
WHITE = Image.new("RGB", (50, 30), (200, 200, 200))


def a_record(**changes):
    values = {
        "grid": GRID,
        "source": [-1, 0, 7, 23, 5, 12],
        "kind": ["class", "dominant", "dominant", "dominant", "contextual", "contextual"],
        "members": [[5, 6], [13, 18]],
        "kept_after": {8: [0, 1, 5], 12: []},
    }
    return ImageRecord(**(values | changes))


def pixel(picture, patch):
    """Colour at the middle of a patch."""
    row, column = divmod(patch, GRID[1])
    height, width = SIZE // GRID[0], SIZE // GRID[1]
    return picture.getpixel((column * width + width // 2, row * height + height // 2))


def test_fates_name_kept_merged_and_dropped_patches():
    fate = draw.patch_fates(a_record())
    assert {p for p in range(24) if fate[p] == -1} == {0, 7, 23}
    assert {p for p in range(24) if fate[p] == 0} == {5, 6}
    assert {p for p in range(24) if fate[p] == 1} == {13, 18}, "the centre 12 is no member, so it is dropped"
    assert (fate == -2).sum() == 24 - 3 - 4


def test_fates_after_a_decoder_stage():
    fate = draw.patch_fates(a_record(), 8)
    assert {p for p in range(24) if fate[p] != -2} == {0, 13, 18}
    assert (draw.patch_fates(a_record(), 12) == -2).all()


def test_a_contextual_token_without_members_shows_its_own_patch():
    fate = draw.patch_fates(a_record(members=[[], [13, 18]]))
    assert fate[5] == 0


def test_panel_colours():
    picture = draw.panel(WHITE, a_record(), size=SIZE)
    assert pixel(picture, 0) == (200, 200, 200), "kept patches stay as they are"
    assert max(pixel(picture, 1)) < 60, "dropped patches are dark"
    first, second = pixel(picture, 5), pixel(picture, 13)
    assert first == pixel(picture, 6), "members of one token share its colour"
    assert first != second
    assert max(first) - min(first) > 50, "merged patches are tinted"


def test_overlay_puts_all_stages_side_by_side():
    sheet = draw.overlay(WHITE, a_record(), size=SIZE)
    assert sheet.width >= 4 * SIZE, "input, stage 1 and two decoder stages"
    assert draw.overlay(WHITE, a_record(), stage=8, size=SIZE).width < 2 * SIZE
    single = draw.overlay(WHITE, a_record(kept_after={}), size=SIZE)
    assert single.width < 3 * SIZE


def test_titles_count():
    assert draw.describe(a_record()) == "stage 1: 6 of 24 (3 kept, 2 merged, class token)"
    assert draw.describe(a_record(), 8) == "after layer 8: 3 of 24 (1 kept, 1 merged, class token)"
    assert draw.describe(a_record(), 12) == "after layer 12: 0 of 24 (0 kept, 0 merged)"


def test_bad_stage_and_bad_patch_are_named():
    with pytest.raises(ValueError, match="no stage 5; it has"):
        draw.overlay(WHITE, a_record(), stage=5)
    with pytest.raises(ValueError, match="names patch 24"):
        draw.panel(WHITE, a_record(members=[[24], []]))


def test_save_overlays(tmp_path):
    paths = draw.save_overlays([WHITE, WHITE], [a_record(), a_record()], tmp_path / "new" / "folder")
    assert [p.name for p in paths] == ["overlay_000.png", "overlay_001.png"]
    for path in paths:
        Image.open(path).verify()
    with pytest.raises(ValueError, match="zip"):
        draw.save_overlays([WHITE], [], tmp_path)


def test_heat_map_orders_colours():
    scores = torch.zeros(GRID)
    scores[0, 0], scores[3, 5] = 1.0, 0.5
    picture = draw.heat_map(WHITE, scores, size=SIZE)
    hot, middle, cold = pixel(picture, 0), pixel(picture, 23), pixel(picture, 8)
    assert hot[0] > hot[1] + 50
    assert hot[0] > hot[2] + 50
    assert middle[1] > middle[0] + 50
    assert cold[2] > cold[0] + 50
    assert np.array_equal(np.asarray(draw.heat_map(WHITE, scores.flatten(), GRID, SIZE)), np.asarray(picture))


@pytest.mark.parametrize(
    ("scores", "grid", "message"),
    [
        (np.zeros(5), GRID, "do not fit"),
        (np.zeros(24), None, r"\[h, w\]"),
        (np.full(GRID, np.nan), None, "NaN"),
    ],
)
def test_heat_map_refuses(scores, grid, message):
    with pytest.raises(ValueError, match=message):
        draw.heat_map(WHITE, scores, grid)


def test_constant_scores_draw():
    assert draw.heat_map(WHITE, np.ones(GRID)).size == (336, 336)


def test_pixels_round_trip():
    picture = np.random.default_rng(0).integers(0, 256, (28, 42, 3), dtype=np.uint8)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    pixels = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    assert np.array_equal(np.asarray(draw.image_from_pixels(pixels, mean, std)), picture)
    with pytest.raises(ValueError, match="3, H, W"):
        draw.image_from_pixels(pixels[0], mean, std)
