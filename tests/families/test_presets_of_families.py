"""The rows of Tables 13 and 14 per layer, for the number of passes that a picture has."""

import pytest

from duet import DuetConfig, budget
from duet.families.passes import plan


@pytest.mark.parametrize(
    ("name", "row", "patches", "passes", "average"),
    [
        ("llava-next-7b", 640, 576, 5, 640.5),
        ("llava-next-7b", 320, 576, 5, 318.75),
        ("llava-next-7b", 160, 576, 5, 159.25),
        ("llava-next-7b", 640, 576, 3, 384.25),  # fewer tiles, fewer tokens: 3 of 5 times 640.5
        ("llava-next-7b-per-picture", 640, 576, 5, 640.5),
        ("llava-next-7b-per-picture", 640, 576, 3, 640.5),
        ("llava-next-7b-per-picture", 160, 576, 4, 159.25),
        ("video-llava-7b", 960, 256, 8, 960.0),
        ("video-llava-7b", 136, 256, 8, 135.0),
        ("video-llava-7b-per-picture", 136, 256, 8, 136.25),
        ("video-llava-7b-per-picture", 960, 256, 16, 960.0),
    ],
)
def test_averages(name, row, patches, passes, average):
    config = DuetConfig.preset(name, row)
    entering = sum(kept.entering for kept in plan(config, [patches] * passes, has_class=True))
    layers = budget.tokens_per_layer(entering, config.for_depth(32).schedule, 32)
    assert sum(layers) / 32 == average
    assert layers[:16] == [entering] * 16 and layers[16:24] == [entering // 2] * 8 and layers[24:] == [0] * 8


def test_a_printed_row_may_be_shared_by_the_passes_of_a_picture():
    config = DuetConfig.preset("llava-next-7b", 640, per="picture")
    assert (config.dominant, config.contextual) == (850, 175)
    assert config == DuetConfig.preset("llava-next-7b-per-picture", 640)
    assert DuetConfig.from_dict(config.to_dict()) == config


def test_what_a_picture_has_less_of_than_the_budget_stays():
    config = DuetConfig(dominant=20, contextual=5)
    assert plan(config, [25, 26, 0, 3], has_class=False) == [None, config, None, None]
    release = DuetConfig(dominant=20, contextual=5, variant="release")  # the class token is one of the 20
    assert plan(release, [24, 25, 26], has_class=True) == [None, release, release]


def test_per_must_be_known():
    with pytest.raises(ValueError, match=r"per must be one of pass, picture, got 'tile'"):
        DuetConfig(per="tile")
