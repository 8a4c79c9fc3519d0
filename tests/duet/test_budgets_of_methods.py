"""Every named method meets a budget or says by how much it misses; published integer settings come out."""

import pytest

from duet.methods import METHODS, TOLERANCE, BudgetError, solve


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tokens", [192, 128, 64])
@pytest.mark.parametrize("depth", [32, 12])
def test_a_budget_is_met_within_half_a_token_or_refused(name, tokens, depth):
    try:
        config = solve(name, tokens, 576, depth)
    except BudgetError as error:
        floor = 576 * min(config_layers(name, depth)) / depth
        assert floor > tokens - TOLERANCE, f"{name} can reach {tokens}: {error}"
        assert "tokens above" in str(error)
        return
    assert abs(config.average_tokens(576, depth) - tokens) <= TOLERANCE
    layers = config.tokens_per_layer(576, depth)
    assert layers == sorted(layers, reverse=True) and sum(layers) / depth == config.average_tokens(576, depth)


def config_layers(name, depth):
    return [max(1, round(layer * depth / 32)) for layer in METHODS[name].schedule] or [0]


@pytest.mark.parametrize(
    ("name", "tokens", "first", "last"),
    [
        ("fastv", 192, 576, 166),
        ("fastv", 128, 576, 98),
        ("fastv", 64, 576, 30),
        ("random-llm", 64, 576, 30),
        ("fastv-all", 192, 576, 180),
        ("fastv-all", 64, 576, 48),
        ("visionzip", 192, 192, 192),
        ("duet", 192, 307, 0),
        ("duet", 128, 205, 0),
        ("duet", 64, 102, 0),
    ],
)
def test_published_integer_settings(name, tokens, first, last):
    """LLaVA-1.5-7B: FastV's R = (32 T - 576 K) / (32 - K) rounded, SparseVLM's 180/114/48, VisionZip, DUET Table 12."""
    layers = solve(name, tokens, 576, 32).tokens_per_layer(576, 32)
    assert layers[0] == first and abs(layers[-1] - last) <= 1


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


def test_pyramiddrop_at_its_published_layers():
    layers = solve("pyramiddrop", 192, 576, 32).tokens_per_layer(576, 32)
    assert [layers[i] for i in (7, 8, 16, 24)] == [576, 145, 36, 9]
    early = solve("pyramiddrop-early", 192, 576, 32).tokens_per_layer(576, 32)
    assert [early[i] for i in (3, 4, 8, 16)] == [576, 303, 159, 84]
    with pytest.raises(BudgetError, match=r"cannot average 128 .* nearest is 14[4-9]"):
        solve("pyramiddrop", 128, 576, 32)


def test_all_tokens_are_a_budget_too():
    for name in METHODS:
        assert solve(name, 576 if METHODS[name].solve == "ratios" else 100, 576, 32) is not None


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match=r"unknown method 'fastw'; known: .*fastv"):
        solve("fastw", 192, 576, 32)
