"""Every named method meets a budget or says by how much it misses; published integer settings come out."""

import pytest

from duet import DuetConfig
from duet.calibrate import Calibration, Curve
from duet.methods import METHODS, TOLERANCE, BudgetError, solve

NOMINAL = (192, 128, 64)
ADAPTIVE = [name for name, method in METHODS.items() if method.solve == "adaptive"]


@pytest.fixture(scope="module")
def calibrations(tmp_path_factory):
    """Options that name a calibration of a decoder of 32 or 12 layers."""
    folder, out = tmp_path_factory.mktemp("calibrations"), {}
    for layers in (32, 12):
        curves = tuple(Curve(alpha, (alpha * 2 / layers,) * (layers - 1)) for alpha in (0.25, 0.5))
        Calibration(layers, 64, 128, 2, curves).save(folder / f"{layers}.json")
        out[layers] = {"options": {"calibration": str(folder / f"{layers}.json")}}
    return out


def needs(name, calibrations, depth):
    return calibrations[depth] if METHODS[name].solve == "calibrated" else {}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ADAPTIVE])
@pytest.mark.parametrize("tokens", NOMINAL)
@pytest.mark.parametrize("depth", [32, 12])
def test_a_budget_is_met_within_half_a_token_or_refused(name, tokens, depth, calibrations):
    try:
        config = solve(name, tokens, 576, depth, **needs(name, calibrations, depth))
    except BudgetError as error:
        floor = 576 * min(config_layers(name, depth)) / depth
        assert floor > tokens - TOLERANCE, f"{name} can reach {tokens}: {error}"
        assert "tokens above" in str(error)
        return
    layers = config.tokens_per_layer(576, depth)
    assert layers == sorted(layers, reverse=True) and sum(layers) / depth == config.average_tokens(576, depth)
    assert not METHODS[name].meets_budgets or abs(config.average_tokens(576, depth) - tokens) <= TOLERANCE
    assert DuetConfig.from_dict(config.to_dict()) == config


def config_layers(name, depth):
    return [max(1, round(layer * depth / 32)) for layer in METHODS[name].schedule] or [0]


def counts(name, tokens, **more):
    """Tokens after each stage, by layer."""
    config = solve(name, tokens, 576, 32, **more)
    layers = config.tokens_per_layer(576, 32)
    assert layers[0] == 576
    return {layer: layers[layer] for layer in config.schedule}, config.average_tokens(576, 32)


@pytest.mark.parametrize(
    ("name", "layers", "wanted"),
    [
        ("fastv", (2,), {192: (166,), 128: (98,), 64: (30,)}),  # R = (32 T - 576 K) / (32 - K)
        ("random-llm", (2,), {192: (166,), 128: (98,), 64: (30,)}),
        ("dart", (2,), {192: (166,), 128: (98,), 64: (30,)}),
        ("fastv-all", (1,), {192: (180,), 128: (114,), 64: (48,)}),
        ("pyramiddrop", (8, 16, 24), {192: (145, 36, 9)}),
        ("pyramiddrop-early", (4, 8, 16), {192: (303, 159, 84), 128: (203, 71, 25)}),
        ("pyramiddrop-earliest", (2, 8, 16), {64: (110, 21, 4)}),
        ("sparsevlm-1.5", (2, 6, 15), {192: (309, 204, 113)}),  # the stages that make the claimed 192.03 true
        ("sparsevlm-2.0", (2, 6, 15), {192: (300, 200, 118), 128: (238, 108, 60), 64: (66, 34, 20)}),
    ],
)
def test_integer_settings_at_true_averages(name, layers, wanted):
    """LLaVA-1.5-7B, 576 patches, 32 layers."""
    for tokens, after in wanted.items():
        found, average = counts(name, tokens)
        assert found == dict(zip(layers, after, strict=True)) and abs(average - tokens) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "layers", "wanted"),
    [
        ("sparsevlm-1.5-release", (3, 7, 16),
         {192: (309, 204, 113, 206.5), 128: (312, 117, 39, 145.4), 64: (82, 32, 18, 82.3)}),
        ("sparsevlm-2.0-release", (3, 7, 16),
         {192: (300, 200, 118, 206.8), 128: (238, 108, 60, 144.1), 96: (246, 54, 28, 113.9), 64: (66, 34, 20, 81.8)}),
        ("dart-release", (2,), {192: (188, 212.3), 128: (124, 152.3), 64: (60, 92.3)}),
    ],
)  # fmt: skip
def test_integer_settings_as_released_and_their_true_averages(name, layers, wanted):
    for tokens, (*after, true) in wanted.items():
        found, average = counts(name, tokens)
        assert found == dict(zip(layers, after, strict=True)) and abs(average - true) <= 0.051


def test_fastv_at_other_layers():
    for tokens, three, five in ((192, 152, 121), (128, 82, 45)):
        assert counts("fastv", tokens, schedule={3: 0.5})[0] == {3: three}
        assert counts("fastv", tokens, schedule={5: 0.5})[0] == {5: five}
    assert counts("fastv", 64, schedule={3: 0.5})[0] == {3: 11}
    with pytest.raises(BudgetError, match=r"cannot average 64 .* nearest is 90, 26\.0 tokens above"):
        solve("fastv", 64, 576, 32, schedule={5: 0.5})


@pytest.mark.parametrize("name", [n for n in METHODS if not METHODS[n].schedule and METHODS[n].solve == "entering"])
def test_vision_methods_enter_with_the_budget(name):
    for tokens in NOMINAL:
        assert solve(name, tokens, 576, 32).entering == tokens


@pytest.mark.parametrize(("tokens", "entering"), [(192, 307), (128, 205), (64, 102)])
def test_duet_enters_with_more(tokens, entering):
    config = solve("duet", tokens, 576, 32)
    layers = config.tokens_per_layer(576, 32)
    assert [layers[i] for i in (0, 15, 16, 23, 24)] == [entering, entering, entering // 2, entering // 2, 0]


def test_visionzip_splits_as_published():
    for tokens, dominant, contextual in ((192, 162, 30), (128, 108, 20), (64, 54, 10)):
        config = solve("visionzip", tokens, 576, 32)
        assert (config.dominant, config.contextual) == (dominant, contextual)


@pytest.mark.parametrize("name", ["duet", "duet-all", "duet-salient", "duet-release"])
@pytest.mark.parametrize("layers", [32, 12])
def test_duet_splits_as_published(name, layers):
    """Table 12; for other budgets VisionZip's share."""
    for tokens, dominant, contextual in ((192, 300, 7), (128, 170, 35), (64, 72, 30), (100, 135, 25)):
        config = solve(name, tokens, 576, layers)
        assert (config.dominant, config.contextual) == (dominant, contextual)


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("pyramiddrop", 128, r"cannot average 128 of 576 .* 32 layers; the nearest is 144, 16\.0 tokens above"),
        ("pyramiddrop", 64, r"the nearest is 144, 80\.0 tokens above"),
        ("pyramiddrop-early", 64, r"the nearest is 72, 8\.0 tokens above"),
        ("visionzip", 600, r"cannot average 600 of 576 visual tokens .* nearest is 576, 24\.0 tokens below"),
        ("sparsevlm-1.5-release", 100, "100 of 576 visual tokens: settings are published for 192, 128, 64 of 576 only"),
    ],
)
def test_budgets_that_cannot_be_reached(name, tokens, message):
    with pytest.raises(BudgetError, match=message):
        solve(name, tokens, 576, 32)


def test_sparsevlm_from_ranks():
    for tokens, scale, bias in ((192, 13.5, 0.0), (128, 9.0, 6.0), (64, 0.8, 0.0)):
        config = solve("sparsevlm-1.0-release", tokens, 576, 32)
        assert config.options == {"scale": scale, "bias": bias} and list(config.schedule) == [3, 7, 16, 20]
    assert solve("sparsevlm-1.0-release", 64, 192, 32).options == {"scale": 4.5, "bias": 0.0}  # a third of the patches


def test_fitprune_needs_a_calibration_of_this_decoder(calibrations):
    for name in ("fitprune", "fitprune-release"):
        with pytest.raises(
            BudgetError, match=r"needs a calibration.*python -m llava\.eval\.calibrate.*calibration=FILE"
        ):
            solve(name, 192, 576, 32)
        with pytest.raises(ValueError, match=r"12\.json is of a decoder with 12 layers, not 32"):
            solve(name, 192, 576, 32, **calibrations[12])
        assert not solve(name, 192, 576, 32, **calibrations[32]).options  # the schedule says it all, no path is kept
    with pytest.raises(ValueError, match="follow from a budget of its own"):
        solve("visionzip+fitprune", 192, 576, 32, **calibrations[32])
    lists = [solve("fitprune-release", tokens, 576, 32, **calibrations[32]) for tokens in NOMINAL]
    averages = [config.average_tokens(576, 32) for config in lists]
    assert averages == sorted(averages, reverse=True) and averages[0] < 576


def test_pairs_take_the_stages_and_options_of_both():
    config = solve("visionzip+sparsevlm-2.0", 192, 576, 32)
    assert (config.stage1, config.stage2, config.positions) == ("visionzip", "sparsevlm", "original")
    assert list(config.schedule) == [2, 6, 15] and config.option("plus") is True
    assert abs(config.average_tokens(576, 32) - 192) <= TOLERANCE


def test_all_tokens_are_a_budget_too(calibrations):
    for name, method in METHODS.items():
        if method.meets_budgets:
            tokens = 100 if method.solve == "entering" else 576
            assert solve(name, tokens, 576, 32, **needs(name, calibrations, 32)) is not None


@pytest.mark.parametrize("name", [*ADAPTIVE, *(f"{name}+fastv" for name in ADAPTIVE)])
def test_methods_that_find_their_own_number_refuse_a_budget(name):
    with pytest.raises(BudgetError, match=rf"{name.replace('+', '.')} finds the number of tokens .* stage1='"):
        solve(name, 64, 576, 32)
    config = DuetConfig(stage1=name.split("+")[0], schedule={})
    config.validate(patches=36, num_layers=6)  # counts are not compared: 307 of 36
    assert config.adaptive and config.entering_tokens(36) == 36


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match=r"unknown method 'fastw'; known: .*fastv"):
        solve("fastw", 192, 576, 32)
