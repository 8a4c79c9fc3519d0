"""Table 15's corrections by name, and what is realised on pictures of the benchmarks' sizes (METHODS 1.3 and 6)."""

import pytest

from duet import DuetConfig, budget
from duet.families.passes import plan


def entering(config, count):
    (kept,) = plan(config, [count], has_class=False)
    return count if kept is None else kept.entering


def average(config, count):
    return sum(budget.tokens_per_layer(entering(config, count), config.for_depth(28).schedule, 28)) / 28


@pytest.mark.parametrize(
    ("name", "row", "caps", "on_a_large_picture"),
    [
        ("duet-qwen", 640, (870, 154), 640.0),
        ("duet-qwen", 320, (435, 77), 320.0),
        ("duet-qwen", 160, (218, 38), 160.0),
        ("duet-qwen-table15", 640, (870, 153), 639.25),
        ("duet-qwen-table15", 320, (517, 91), 380.0),
        ("duet-qwen-table15", 160, (207, 36), 151.75),
        ("duet-qwen-release", 640, (540, 100), 440.0),
    ],
)
def test_rows(name, row, caps, on_a_large_picture):
    config = DuetConfig.preset(name, row)
    assert (config.dominant, config.contextual) == caps
    assert average(config, 4000) == on_a_large_picture


def test_the_released_row_runs_as_released():
    config = DuetConfig.preset("duet-qwen-release", 640)
    assert (config.variant, config.queries, dict(config.options)) == ("release", "all", {"causal": False})
    assert dict(config.schedule) == {14: 0.5, 21: 0.25}
    assert DuetConfig.preset("duet-qwen-release", 640, queries="last").queries == "last"
    assert DuetConfig.preset("duet-qwen", 640).variant == "paper"


@pytest.mark.parametrize(
    ("units", "table15_640", "table15_320", "realised"),
    [
        (391, 391, 391, 244.25),  # 640 x 480: 23 x 17 units; 28 layers see 391, 195, then none
        (999, 999, 608, 624.25),  # 1024 x 768
    ],
)
def test_caps_do_nothing_on_most_pictures(units, table15_640, table15_320, realised):
    assert entering(DuetConfig.preset("duet-qwen-table15", 640), units) == table15_640
    assert entering(DuetConfig.preset("duet-qwen-table15", 320), units) == table15_320
    assert average(DuetConfig.preset("duet-qwen-table15", 640), units) == realised


def test_shares_follow_the_picture():
    config = DuetConfig(dominant=0.65, contextual=0.05)
    assert [entering(config, n) for n in (391, 999)] == [254 + 20, 649 + 50]
    assert [entering(config, n) for n in (1, 2, 4)] == [1, 1, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dominant": 0.5, "contextual": 7}, "both be counts or both be shares"),
        ({"dominant": 0.9, "contextual": 0.2}, "add up to at most 1"),
        ({"dominant": 1.5, "contextual": 0.0}, "dominant must be a count .* or a share between 0 and 1, got 1.5"),
        ({"dominant": 0.0, "contextual": 0.0}, "add up to at most 1"),
    ],
)
def test_shares_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DuetConfig(**values)


def test_shares_are_turned_into_counts_before_they_are_added_up():
    config = DuetConfig(dominant=0.25, contextual=0.25)
    with pytest.raises(ValueError, match=r"for_patches\(n\) gives the counts"):
        _ = config.entering
    assert config.for_patches(576) == DuetConfig(dominant=144, contextual=144)
    assert config.average_tokens(576, 32) == DuetConfig(dominant=144, contextual=144).average_tokens(576, 32)
    assert DuetConfig.from_dict(config.to_dict()) == config
