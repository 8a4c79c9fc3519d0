"""Settings that only one method knows: declared by it, checked, stored, and given on the command line."""

import argparse
import json

import pytest

from duet import DuetConfig
from duet.config import declared_options
from duet.registry import Registry
from duet.stage1 import VISION_REDUCERS
from duet.stage2 import LANGUAGE_REDUCERS
from llava.reduction import ReductionArguments, parse_options

DECLARED = {"share": 0.5, "count": 3, "merge": True, "note": "", "order": ("raster", "score")}


@pytest.fixture
def knobs(monkeypatch):
    """Let FastV know some options for one test."""
    LANGUAGE_REDUCERS.get("fastv")
    monkeypatch.setitem(LANGUAGE_REDUCERS._options, "fastv", DECLARED)


def config(**options):
    return DuetConfig(stage1="none", stage2="fastv", schedule={2: 0.5}, options=options)


def test_declared_defaults_hold(knobs):
    assert {name: config().option(name) for name in DECLARED} == DECLARED | {"order": "raster"}
    changed = config(order="score", share=1, merge=False)
    assert (changed.option("order"), changed.option("share"), changed.option("merge")) == ("score", 1.0, False)
    assert changed.option("count") == 3 and isinstance(changed.option("share"), float)
    with pytest.raises(KeyError):
        config().option("nothing")


def test_round_trip_and_hash(knobs):
    changed = config(order="score", count=7)
    again = DuetConfig.from_dict(json.loads(json.dumps(changed.to_dict())))
    assert again == changed and hash(again) == hash(changed) != hash(config())
    assert "options" not in config().to_dict()  # the digests of settings stored before there were options stay


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 3}, r"unknown option\(s\) size for stage1='none' and stage2='fastv'; known: count, merge, note"),
        ({"count": True}, "option count must be of type int, as its default 3, got True"),
        ({"count": 1.5}, "option count must be of type int"),
        ({"share": "much"}, "option share must be of type float"),
        ({"share": float("nan")}, "option share"),
        ({"merge": 1}, "option merge must be of type bool"),
        ({"order": "size"}, "option order must be one of raster, score, got 'size'"),
        (["count"], "options must map names to values"),
    ],
)
def test_wrong_options_are_named(knobs, options, message):
    with pytest.raises(ValueError, match=message):
        DuetConfig(stage1="none", stage2="fastv", schedule={2: 0.5}, options=options)


def test_no_name_means_two_things():
    for vision in VISION_REDUCERS.names():
        for language in LANGUAGE_REDUCERS.names():
            assert not set(VISION_REDUCERS.options(vision)) & set(LANGUAGE_REDUCERS.options(language))
            assert declared_options(vision, language) == {
                **VISION_REDUCERS.options(vision), **LANGUAGE_REDUCERS.options(language),
            }  # fmt: skip


def test_an_entry_declares_its_options():
    registry = Registry("thing", "duet.stage2")
    registry.register("mine", options={"size": 1})(object())
    assert registry.options("mine") == {"size": 1}
    with pytest.raises(ValueError, match="unknown thing 'yours'"):
        registry.options("yours")


def flags(text, *more):
    parser = argparse.ArgumentParser()
    ReductionArguments.add_arguments(parser)
    return ReductionArguments.from_namespace(parser.parse_args(["--reduction_options", text, *more]))


def test_command_line(knobs):
    got = flags("count=4, share=.25,order=score,merge=False", "--reduce", "none+fastv").to_config()
    assert got.options == {"count": 4, "share": 0.25, "order": "score", "merge": False}
    assert flags("note=x", "--stage1", "none").to_config(config(count=9)).options == {"count": 9, "note": "x"}
    assert parse_options("") == {} and parse_options("a=1e-3,b=b c") == {"a": 1e-3, "b": "b c"}
    for text, message in (("count", "must be name=value"), ("=3", "must be name=value"), ("a=1,a=2", "gives a twice")):
        with pytest.raises(ValueError, match=message):
            parse_options(text)


def test_another_method_drops_what_it_does_not_know(knobs):
    arguments = ReductionArguments(stage2="dart")
    assert arguments.to_config(config(count=9)).options == {}
    with pytest.raises(ValueError, match="unknown option"):
        ReductionArguments(stage2="dart", reduction_options="count=9").to_config(config())
