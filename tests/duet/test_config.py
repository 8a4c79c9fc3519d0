"""The configuration, its presets, and the arithmetic behind them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet import DuetConfig, budget
from duet.presets import PRESETS

LLAMA = {16: 0.5, 24: 0.0}


def test_the_constructor_of_the_paper():
    config = DuetConfig(
        dominant=300, contextual=7, cluster_width=4, schedule={16: 0.5, 24: 0.0}, queries="last", positions="auto",
        variant="paper",
    )  # fmt: skip
    assert config == DuetConfig()
    assert config.average_tokens(576, 32) == 191.75


@pytest.mark.parametrize(
    ("name", "row", "split", "average"),
    [
        ("llava-1.5-7b", 192, (300, 7), 191.75),
        ("llava-1.5-7b", 128, (170, 35), 128.0),
        ("llava-1.5-7b", 64, (72, 30), 63.75),
        ("llava-next-7b", 640, (850, 175), 640.5),
        ("llava-next-7b", 320, (360, 150), 318.75),
        ("llava-next-7b", 160, (225, 30), 159.25),
        ("video-llava-7b", 960, (1280, 256), 960.0),
        ("video-llava-7b", 136, (160, 56), 135.0),
        ("qwen2.5-vl-7b-table15", 640, (870, 153), 639.25),
        ("qwen2.5-vl-7b-table15", 320, (517, 91), 380.0),
        ("qwen2.5-vl-7b-table15", 160, (207, 36), 151.75),
        ("qwen2.5-vl-7b", 640, (870, 154), 640.0),
        ("qwen2.5-vl-7b", 320, (435, 77), 320.0),
        ("qwen2.5-vl-7b", 160, (218, 38), 160.0),
        ("qwen2.5-vl-7b-release", 640, (540, 100), 440.0),
    ],
)
def test_tables_12_to_15_row_by_row(name, row, split, average):
    preset = PRESETS[name][row]
    assert (preset.dominant, preset.contextual) == split
    assert budget.average_tokens(preset.entering, dict(preset.schedule), preset.depth) == average
    config = DuetConfig.preset(name, row)
    assert config.entering * preset.units == preset.entering
    assert config.for_depth(preset.depth).schedule == dict(preset.schedule)


@pytest.mark.parametrize(
    ("schedule", "averages"),
    [
        ({14: 0.5, 21: 0.0}, (639.25, 380.0, 151.75)),
        ({14: 0.5, 21: 0.25}, (703.0, 418.0, 166.75)),
        ({14: 0.5, 21: 0.125}, (671.0, 399.0, 159.25)),
        ({7: 0.75, 14: 0.5, 21: 0.25}, (639.0, 380.0, 151.5)),  # 639.4 and 151.9 without the floors
    ],
)
def test_table_15_fits_no_single_schedule(schedule, averages):
    got = tuple(budget.average_tokens(n, schedule, 28) for n in (1023, 608, 243))
    assert got == averages


@pytest.mark.parametrize(
    ("target", "entering"), [(192, 307), (128, 205), (64, 102), (640, 1024), (320, 512), (160, 256)]
)
def test_the_solver_inverts_the_average(target, entering):
    assert abs(budget.solve_entering(target, LLAMA, 32) - entering) <= 1
    assert abs(budget.average_tokens(budget.solve_entering(target, LLAMA, 32), LLAMA, 32) - target) <= 0.5


@given(st.integers(1, 3000), st.integers(2, 60), st.data())
def test_averages_equal_the_closed_formula(entering, depth, data):
    layers = data.draw(st.lists(st.integers(1, depth - 1), unique=True, max_size=4).map(sorted))
    ratios = sorted(data.draw(st.lists(st.integers(0, 8), min_size=len(layers), max_size=len(layers))), reverse=True)
    schedule = {layer: ratio / 8 for layer, ratio in zip(layers, ratios, strict=True)}
    edges = [*layers, depth]
    closed = edges[0] * entering
    for i, layer in enumerate(layers):
        closed += (edges[i + 1] - layer) * (entering * ratios[i] // 8)
    assert budget.average_tokens(entering, schedule, depth) == closed / depth


@given(st.integers(0, 5000), st.integers(0, 1000))
def test_a_floor_never_loses_a_token_to_rounding(entering, thousandths):
    assert budget.kept_tokens(entering, thousandths / 1000) == entering * thousandths // 1000


@pytest.mark.parametrize(("entering", "split"), [(307, (261, 46)), (102, (87, 15)), (576, (576, 0)), (560, (555, 5))])
def test_a_split_never_asks_for_more_cluster_members_than_there_are(entering, split):
    dominant, contextual = budget.solve_split(entering, 576, 4)
    assert (dominant, contextual) == split
    assert 4 * contextual <= 576 - dominant


def test_a_split_of_more_than_all_patches():
    with pytest.raises(ValueError, match="at most 576"):
        budget.solve_split(577, 576, 4)


def test_flops_and_kv_bytes_of_llava_7b():
    shape = budget.DecoderShape(32, 4096, 11008, 32, 32, 128, 32000)
    n, d, m = 616, 4096, 11008
    assert shape.layer_flops(n) == 2 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m)
    assert shape.kv_bytes([n] * 32) == 32 * n * 2 * 4096 * 2
    reduced = [40 + v for v in DuetConfig().tokens_per_layer(576, 32)]
    assert 2.3 < shape.prefill_flops([n] * 32) / shape.prefill_flops(reduced) < 2.8


def test_schedules_are_scaled_to_the_depth():
    config = DuetConfig.preset("llava-1.5-7b", tokens=192)
    assert config.for_depth(12).schedule == {6: 0.5, 9: 0.0}
    assert config.for_depth(40).schedule == {20: 0.5, 30: 0.0}
    assert config.average_tokens(576, 12) == (307 * 6 + 153 * 3) / 12
    with pytest.raises(ValueError, match="beyond the model"):
        config.for_depth(2)
    with pytest.raises(ValueError, match="does not fit into 1"):
        DuetConfig(schedule={1: 0.5}, depth=32).for_depth(1)


@pytest.mark.parametrize("config", [
    DuetConfig(), DuetConfig.none(), DuetConfig.preset("llava-1.5-13b", 64, queries=(0, -1), positions="original"),
    DuetConfig(stage1="visionzip", schedule={2: 1.0}, depth=4),
])  # fmt: skip
def test_json_round_trip(config):
    assert DuetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(DuetConfig.from_dict(config.to_dict())) == hash(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dominant": -1}, "dominant must be an integer of at least 0"),
        ({"dominant": 2.5}, "dominant"),
        ({"contextual": True}, "contextual"),
        ({"dominant": 0, "contextual": 0}, "at least 1"),
        ({"dominant": 0, "variant": "release"}, "class token counts"),
        ({"cluster_width": 0}, "cluster_width"),
        ({"schedule": {16: 1.5}}, r"1\.5 at layer 16 must lie in \[0, 1\]"),
        ({"schedule": {16: -0.1}}, "must lie in"),
        ({"schedule": {8: 0.25, 16: 0.5}}, "cannot grow"),
        ({"schedule": {0: 0.5}}, "layer 0 must be at least 1"),
        ({"schedule": [16, 0.5]}, "must map layers"),
        ({"schedule": {"x": 0.5}}, "must map layers"),
        ({"schedule": {32: 0.5}, "depth": 32}, "beyond the model"),
        ({"queries": "first"}, "queries must be one of last, all, salient"),
        ({"queries": ()}, "queries"),
        ({"positions": "packed"}, "positions"),
        ({"variant": "beta"}, "variant"),
        ({"stage1": "magic"}, "unknown vision reducer 'magic'; known: "),
        ({"salient_tokens": 0}, "salient_tokens"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        DuetConfig(**values)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown field\(s\) lambda.*known: dominant"):
        DuetConfig.from_dict({"lambda": 1})
    with pytest.raises(ValueError, match=r"known: .*llava-1\.5-13b"):
        DuetConfig.preset("gpt", 192)
    with pytest.raises(ValueError, match=r"rows \[64, 128, 192\]"):
        DuetConfig.preset("llava-1.5-7b", 100)


def test_the_registry_refuses_bad_and_taken_names():
    from duet.stage1 import VISION_REDUCERS

    with pytest.raises(ValueError, match="lower case"):
        VISION_REDUCERS.register("Bad Name")
    VISION_REDUCERS.get("visionzip")
    with pytest.raises(ValueError, match="already registered"):
        VISION_REDUCERS.register("visionzip")(lambda tower, config: None)
