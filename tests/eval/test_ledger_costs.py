"""The ledger: what every method's layers saw equals the closed formula, and costs follow from what was seen."""

import pytest
import runner_world
from runner_world import noise

import duet
from duet import DuetConfig
from duet.budget import DecoderShape, average_tokens, vision_flops
from duet.calibrate import Calibration
from duet.methods import METHODS, solve
from llava.eval.generate import IMAGE_TEMPLATE, Answerer
from llava.eval.ledger import ModelShape, costs, sample_metadata, summarise

PATCHES, LAYERS = runner_world.PATCHES, runner_world.LAYERS
BUDGETS = (12, 18, 27)


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    tokenizer, model, processor = runner_world.load_model(tmp_path_factory.mktemp("ledger"))
    return Answerer(model, tokenizer, processor, IMAGE_TEMPLATE)


def questions():
    return [
        ("Is there a cat?", [noise(0, (84, 84))]),
        ("Say something.", []),
        ("What is on the long dining table?", [noise(1, (84, 84))]),
    ]


def ledger(answerer, reduction):
    """(summary, costs, metadata) of three questions, one of them without a picture."""
    answerer.model.set_reduction(reduction)
    batch = questions()
    with duet.trace(images=False) as trace:
        answerer.answer(batch, 1)
    facts = sample_metadata(trace, [PATCHES * len(pictures) for _, pictures in batch], None)
    shape = ModelShape.of(answerer.model)
    return summarise(facts, reduction, LAYERS), costs(facts, reduction, shape), facts


def solved(name, calibration):
    given = {"options": {"calibration": str(calibration)}} if METHODS[name].solve == "calibrated" else {}
    for budget in BUDGETS:
        try:
            return solve(name, budget, PATCHES, LAYERS, **given)
        except ValueError:
            continue
    return None


@pytest.mark.parametrize("name", METHODS)
def test_the_measured_average_is_the_closed_formula(answerer, tmp_path, name):
    Calibration(LAYERS, 32, 64, 1, ()).save(tmp_path / "calibration.json")
    config = solved(name, tmp_path / "calibration.json")
    if config is None or config.adaptive or config.options.get("scale"):
        pytest.skip(f"{name} has no fixed count at {BUDGETS} of {PATCHES} tokens")
    summary, cost, facts = ledger(answerer, config)
    layers = config.tokens_per_layer(PATCHES, LAYERS)
    assert summary["samples"] == 2 and summary["tokens_per_layer"] == pytest.approx(layers)
    assert summary["average_tokens"] == pytest.approx(config.average_tokens(PATCHES, LAYERS), abs=5e-4)
    assert summary["entering_tokens"] == layers[0]
    assert summary["retained_tokens"] == [count for count in layers if count][-1]
    text = [facts[row]["tokens"][0][0] - facts[row]["visual"][0][0] for row in (0, 2)]
    numbers = 2 * 4 * 8 * 4  # keys and values, heads, head width, bytes of fp32
    assert cost["kv_bytes"] == numbers * (sum(layers) + LAYERS * sum(text) / 2)


def test_average_entering_and_retained_of_the_papers_setting():
    visual = [[307, 16], [153, 8], [0, 8]]
    config = DuetConfig.preset("llava-1.5-7b", tokens=192)
    summary = summarise([{"patches": 576, "visual": visual}, {"patches": 0, "visual": [[0, 32]]}], config, 32)
    assert summary["average_tokens"] == 191.75 == average_tokens(307, config.schedule, 32)
    assert (summary["entering_tokens"], summary["retained_tokens"]) == (307, 153)


def test_flops_follow_from_the_tokens_that_each_layer_saw(answerer):
    full, full_cost, facts = ledger(answerer, None)
    _, cost, reduced = ledger(answerer, solve("duet", 12, PATCHES, LAYERS))
    shape = DecoderShape.from_config(answerer.model.config)
    lengths = [[n for n, layers in f["tokens"] for _ in range(layers)] for f in (reduced[0], reduced[2])]
    assert cost["prefill_flops"] == pytest.approx(sum(map(shape.prefill_flops, lengths)) / 2)
    assert cost["prefill_flops"] < full_cost["prefill_flops"] and cost["kv_bytes"] < full_cost["kv_bytes"]
    assert cost["tower_flops"] == full_cost["tower_flops"] == vision_flops(PATCHES, 32, 48, 2)
    assert full["average_tokens"] == full["retained_tokens"] == PATCHES and facts[1]["visual"][0][0] == 0


def test_a_smaller_picture_makes_the_tower_cheaper(answerer):
    shape = ModelShape.of(answerer.model)
    small = DuetConfig(stage1="downsample", dominant=9, contextual=0, schedule={})
    assert shape.tower_flops(small) == vision_flops(9, 32, 48, 2)
    assert shape.tower_flops(DuetConfig(stage1="downsample", dominant=PATCHES, contextual=0, schedule={})) == (
        shape.tower_flops(None)
    )


def test_a_method_that_merges_in_the_tower_is_billed_block_by_block(answerer):
    config = DuetConfig(stage1="tome", dominant=13, contextual=0, schedule={})
    wanted = vision_flops(PATCHES, 32, 48, 1) + vision_flops(PATCHES - 12, 32, 48, 1)
    assert ModelShape.of(answerer.model).tower_flops(config) == wanted


def test_several_pictures_cost_several_tower_passes(answerer):
    shape = ModelShape.of(answerer.model)
    facts = [{"patches": 2 * PATCHES, "visual": [[2 * PATCHES, 4]], "tokens": [[90, 4]]}]
    assert costs(facts, None, shape)["tower_flops"] == 2 * shape.tower_flops(None)


def test_runs_from_before_tokens_were_recorded_have_no_cost(answerer):
    shape = ModelShape.of(answerer.model)
    for facts in ([], [{}], [{"patches": 36, "visual": [[36, 4]]}], [{"patches": 0, "visual": [[0, 4]]}]):
        assert set(costs(facts, None, shape).values()) == {None}
