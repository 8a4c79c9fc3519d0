"""Any vision reducer with any language reducer by name, and what cannot be combined."""

import pytest

from duet.methods import METHODS, find, solve
from duet.stage1 import VISION_REDUCERS
from duet.stage2 import LANGUAGE_REDUCERS
from llava.reduction import ReductionArguments


@pytest.mark.parametrize("vision", VISION_REDUCERS.names())
@pytest.mark.parametrize("language", LANGUAGE_REDUCERS.names())
def test_every_pair_meets_a_budget(vision, language):
    if language in METHODS and METHODS[language].solve == "calibrated":
        with pytest.raises(ValueError, match="give the stages by hand"):
            find(f"{vision}+{language}")
        return
    method = find(f"{vision}+{language}")
    assert (method.stage1, method.options["stage2"] if language not in METHODS else language) == (vision, language)
    if getattr(VISION_REDUCERS.get(vision), "adaptive", False):
        return
    config = solve(f"{vision}+{language}", 128, 576, 32)
    assert (config.stage1, config.stage2) == (vision, method.options.get("stage2", "text_guided"))
    assert abs(config.average_tokens(576, 32) - 128) <= 0.5 and config.entering > 128


def test_a_pair_drops_where_its_language_half_does():
    assert find("visionzip+fastv").schedule == METHODS["fastv"].schedule
    assert find("divprune+pyramiddrop").schedule == METHODS["pyramiddrop"].schedule
    assert find("divprune+text_guided").schedule == METHODS["duet"].schedule
    assert solve("visionzip+none", 128, 576, 32) == solve("visionzip", 128, 576, 32)
    assert solve("none+fastv", 128, 576, 32) == solve("fastv", 128, 576, 32)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            "visionzip+divprune",
            r"divprune is a vision reducer, and a pair has one of each, VISION\+LANGUAGE",
        ),
        ("fastv+text_guided", "fastv is a language reducer; write it second, for example none\\+fastv"),
        ("duet+fastv", "unknown vision reducer 'duet'; known: average_pool"),
        ("visionzip+fastw", "unknown language reducer 'fastw'; known: .*fastv"),
        ("none+none", "reduces nothing"),
        ("fastw", "unknown method 'fastw'; known: .*fastv.*or VISION\\+LANGUAGE"),
    ],
)
def test_what_cannot_be_combined_says_why(pair, message):
    with pytest.raises(ValueError, match=message):
        find(pair)


def test_the_flags_refuse_the_same():
    with pytest.raises(ValueError, match="divprune is a vision reducer"):
        ReductionArguments(reduce="visionzip+divprune").to_config()
    flags = {"layer_list": "[16]", "image_token_ratio_list": "[0.5]"}
    with pytest.raises(ValueError, match=r"--reduce visionzip\+none drops nothing in the decoder, so --layer_list"):
        ReductionArguments(reduce="visionzip+none", **flags).to_config()
    assert ReductionArguments(reduce="visionzip+fastv", **flags).to_config().schedule == {16: 0.5}
