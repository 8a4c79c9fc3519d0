"""A configuration refuses what makes no sense, at once and by the field's name, and cannot be changed afterwards."""

import copy
import json
import pickle
from dataclasses import asdict, replace
from fractions import Fraction

import numpy as np
import pytest
import small
import torch

import duet
from duet import DuetConfig
from duet.checks import LARGEST

HUGE = 10**5000  # of more digits than Python prints
PLAIN = {"dominant": 10, "contextual": 3, "schedule": {1: 0.5, 2: 0.0}}
NONSENSE = [
    ("schedule", [
        {1.7: 0.5}, {2.0: 0.5}, {True: 0.5}, {1: 0.9, "1": 0.1}, {1: 0.9, "01": 0.1}, {1.2: 0.9, 1.7: 0.1},
        {"1_6": 0.5}, {" 1": 0.5}, {"+1": 0.5}, {"\uff11": 0.5}, {float("inf"): 0.5}, {float("nan"): 0.5}, {None: 0.5},
        {(1,): 0.5}, {b"1": 0.5}, {-1: 0.5}, {HUGE: 0.5}, {"9" * 5000: 0.5}, {1: True}, {1: "0.5"}, {1: None},
        {1: float("nan")}, {1: torch.tensor(0.5)}, {1: [0.5]}, {1: HUGE}, {1: 0.2, 2: 0.3}, [(1, 0.5)], None, 5,
        "1:0.5",
    ]),
    ("queries", [(True,), 5, {0}, frozenset({0}), np.array([0, 1]), torch.tensor([0]), (1.0,), ("last",), (), [], None,
                 range(2), {0: 1}, (HUGE,), (LARGEST + 1,), (-LARGEST - 1,), b"last", "", (np.int64(1),)]),
    ("stage1", [["none"], None, 5, {"none"}, np.array(["none"]), b"none"]),
    ("stage2", [["fastv"], None, 5, {"a": 1}]),
    ("variant", [["paper"], None, True, np.array(["paper", "release"]), {"paper"}]),
    ("positions", [0, None, ("auto",), np.array(["auto"])]),
    ("per", [None, ["pass"], 1]),
    ("dominant", [True, None, "10", float("nan"), float("inf"), -1, 1.5, -0.1, HUGE, np.array([1, 2]), 1 + 0j]),
    ("contextual", [False, None, "3", float("nan"), -1, 2.0, HUGE, [3], torch.tensor(3)]),
    ("cluster_width", [True, 0, 2.0, None, HUGE, "4", np.array([1, 2])]),
    ("salient_tokens", [True, 0, 2.0, None, HUGE]),
    ("depth", [True, 0, 32.0, "32", HUGE]),
    ("seed", [True, -1, 0.5, None, HUGE, "0"]),
    ("across_frames", [True, 0, 1.0, 0.0, -1, "0.5", HUGE, float("nan"), [1], np.array([0.1, 0.2])]),
    ("option", [{"order": 5}, {"order": ["score"]}, {"order": np.array(["score"])}, {5: 1}, {None: 1, "x": 2},
                {"x": 1}]),
    ("options", [None, 5, ["order"], "order=score", np.array([1, 2]), [("order", "score")]]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [pytest.param(field, value, id=f"{field}-{i}") for field, values in NONSENSE for i, value in enumerate(values)],
)  # fmt: skip
def test_a_field_without_sense_is_refused_by_its_name(field, value):
    name = "options" if field == "option" else field
    with pytest.raises(ValueError, match=field) as refused:
        DuetConfig(**(PLAIN | {name: value}))
    said = str(refused.value)
    assert not isinstance(refused.value, UnicodeError)
    assert "\n" not in said and len(said) < 600, "one line of moderate length"
    with pytest.raises(ValueError, match=field):
        DuetConfig.from_dict(PLAIN | {name: value})


@pytest.mark.parametrize("values", [(1, 0.0), (0.0, 1), (1.0, 1), (0, 0.0), (0.5, 7), (0.9, 0.2)])
def test_a_count_and_a_share_are_not_mixed(values):
    with pytest.raises(ValueError, match=r"dominant and contextual must both be counts or both be shares"):
        DuetConfig(dominant=values[0], contextual=values[1])


def test_zero_is_zero_as_a_count_and_as_a_share():
    assert DuetConfig(dominant=1.0, contextual=0).keeps_every_patch(17)
    assert DuetConfig(dominant=0, contextual=0.25, schedule={}).for_patches(16).contextual == 4


@pytest.mark.parametrize("number", [HUGE, -HUGE, float("inf"), float("nan"), True, "1"], ids=list("abcdef"))
def test_an_option_that_is_a_number_is_one_that_fits(number):
    with pytest.raises(ValueError, match="option drop"):
        duet.checks.clean_options({"drop": number}, {"drop": 0.5}, "methods")
    with pytest.raises(ValueError, match="option drop"):
        duet.checks.clean_options({"drop": number}, {"drop": 5}, "methods")


@pytest.mark.parametrize(
    "entry", [[], None, 5, "paper", {1: 2}, {1: 2, "x": 3}, {"dominant": 3, None: 1}, [("seed", 1)]]
)
def test_an_entry_that_is_no_configuration_is_refused(entry):
    with pytest.raises(ValueError, match="duet configuration"):
        DuetConfig.from_dict(entry)


@pytest.mark.parametrize("name", ["gpt", None, ["llava-1.5-7b"], 7])
def test_a_preset_that_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="unknown preset"):
        DuetConfig.preset(name, 192)


@pytest.mark.parametrize("tokens", [[192], "192", None, 192.0, True])
def test_a_row_that_is_no_number_is_refused(tokens):
    with pytest.raises(ValueError, match="tokens"):
        DuetConfig.preset("llava-1.5-7b", tokens)


def test_the_default_schedule_is_nobodys_to_change():
    DuetConfig().to_dict()["schedule"]["16"] = 1.0
    assert DuetConfig().schedule == {16: 0.5, 24: 0.0}


@pytest.mark.parametrize("change", [
    lambda d: d.__setitem__(1, 1.0), lambda d: d.__delitem__(1), lambda d: d.update({1: 1.0}), lambda d: d.clear(),
    lambda d: d.pop(1), lambda d: d.popitem(), lambda d: d.setdefault(5, 0.1), lambda d: d.__ior__({1: 1.0}),
])  # fmt: skip
@pytest.mark.parametrize("field", ["schedule", "options"])
def test_nothing_is_changed_in_place(field, change):
    config = DuetConfig(**PLAIN, options={"order": "raster"})
    before = hash(config)
    with pytest.raises(TypeError, match=r"dataclasses\.replace"):
        change(getattr(config, field))
    assert hash(config) == before
    assert config.schedule == PLAIN["schedule"] and config.options == {"order": "raster"}


def test_what_was_given_may_change_afterwards_without_effect():
    schedule, options = {1: 0.5}, {"order": "raster"}
    config = DuetConfig(dominant=3, contextual=1, schedule=schedule, options=options)
    schedule[1], options["order"] = 0.1, "score"
    assert config.schedule == {1: 0.5} and config.options == {"order": "raster"}


@pytest.mark.parametrize("again", [
    copy.copy, copy.deepcopy, replace, lambda c: pickle.loads(pickle.dumps(c)), lambda c: DuetConfig(**asdict(c)),
    lambda c: DuetConfig(**{name: getattr(c, name) for name in vars(c)}),
    lambda c: DuetConfig.from_dict(json.loads(json.dumps(c.to_dict()))),
    lambda c: DuetConfig.from_dict(json.loads(json.dumps(asdict(c)))),
], ids=["copy", "deepcopy", "replace", "pickle", "asdict", "fields", "json", "json of asdict"])  # fmt: skip
def test_copies_of_every_kind_are_equal_and_as_frozen(again):
    config = DuetConfig(**PLAIN, queries=(0, -1), options={"order": "raster"})
    other = again(config)
    assert other == config and hash(other) == hash(config)
    with pytest.raises(TypeError):
        other.schedule[1] = 1.0
    assert type(config.to_dict()["schedule"]) is dict and type(config.to_dict()["options"]) is dict


def test_numbers_of_other_libraries_become_plain_ones():
    config = DuetConfig(
        dominant=np.float64(0.5), contextual=0.0, schedule={np.int64(2): np.float32(0.5), 4: Fraction(1, 4)}
    )
    assert json.loads(json.dumps(config.to_dict()))["schedule"] == {"2": 0.5, "4": 0.25}
    assert type(config.dominant) is float and all(type(layer) is int for layer in config.schedule)
    assert DuetConfig(schedule={4: -0.0}).to_dict() == DuetConfig(schedule={4: 0.0}).to_dict()


@pytest.mark.parametrize("config", [DuetConfig(**PLAIN).to_dict(), 192, 0, "", {}, [], "paper", False])
def test_every_door_refuses_what_is_no_configuration(config):
    model = small.build()
    with pytest.raises(ValueError, match="must be a DuetConfig"):
        duet.attach(model, config)
    with pytest.raises(ValueError, match="must be a DuetConfig"):
        duet.encode_vision(model.model.vision_tower, small.pixels(1), config=config)
    with pytest.raises(ValueError, match="must be a DuetConfig"):
        duet.run_decoder(model.model.language_model, torch.zeros(1, 2, 32), config=config)


@pytest.mark.parametrize(
    "entry", [[], 5, {"dominant": "many"}, {"shedule": {}}, {"schedule": {"40": 0.5}, "depth": 32}]
)
def test_a_broken_entry_says_whose_it_is(entry):
    model = small.build()
    model.config.duet = entry
    model.config._name_or_path = "some/checkpoint"
    with pytest.raises(ValueError, match='the entry "duet" in the configuration of some/checkpoint: '):
        duet.attach(model)
