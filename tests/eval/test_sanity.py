"""A result that is none is said: NaN, empty or identical answers, everything at chance after training."""

import json
from types import SimpleNamespace

import pytest
import runner_world
import torch
from safetensors.torch import load_file, save_file

from llava import sanity
from llava.eval import report
from llava.eval.__main__ import main
from llava.eval.generate import Answerer
from llava.sanity import BROKEN, Group


@pytest.mark.parametrize(
    ("answers", "share", "bad", "said"),
    [
        (["yes"] * 30, 0.5, 0, ["all 30 answers are 'yes', whatever was asked"]),
        (["yes"] * 30, 0.95, 0, []),
        (["yes"] * 30, None, 0, []),
        (["yes"] * 19, 0.5, 0, []),
        (["yes"] * 29 + ["no"], 0.5, 0, []),
        ([""] * 30, 0.0, 0, ["all 30 answers are empty"]),
        ([""] * 30, None, 0, ["all 30 answers are empty"]),
        ([""] * 3, 0.0, 0, []),
        (["a", "b", "c"], 1.0, 2, ["2 of 3 answers come from logits that are NaN (not finite)"]),
        ([], None, 0, []),
    ],
    ids=["alike", "true alike", "truth unknown", "few alike", "one differs", "empty", "limit", "few", "nan", "none"],
)
def test_answers_look_at_themselves(answers, share, bad, said):
    assert sanity.about_answers(answers, share, bad) == said


@pytest.mark.parametrize(
    ("groups", "broken"),
    [
        ({"exists": Group(50, 100, 0.5), "count": Group(0, 100, 0.333)}, True),
        ({"exists": Group(0, 100, 0.5), "order": Group(0, 100, 0.004)}, True),
        ({"exists": Group(75, 100, 0.5), "count": Group(0, 100, 0.333)}, False),
        ({"exists": Group(58, 100, 0.5)}, True),  # 2.33 standard deviations are 11.7
        ({"exists": Group(63, 100, 0.5)}, False),
        ({"exists": Group(0, 59, 0.5)}, False),  # too few to say
        ({"exists": Group(30, 40, 0.5), "count": Group(10, 40, 0.333)}, False),
        ({}, False),
    ],
)
def test_chance_is_a_binomial_bound_over_all_kinds(groups, broken):
    found = sanity.about_chance(groups)
    assert bool(found) == broken
    if broken:
        assert found[0].startswith("after training, everything is at or below chance: exists")


def test_a_refusal_names_results_reasons_and_likely_causes():
    sanity.refuse({"fine": []})
    with pytest.raises(sanity.BrokenResult, match=r"(?s)duet-64: all answers are empty\n.*`duet doctor`"):
        sanity.refuse({"fine": [], "duet-64": ["all answers are empty"]})


def test_weights_are_named_that_are_not_finite():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    sanity.require_finite_weights(model, "some/folder")
    with torch.no_grad():
        model[0].weight[0, 0], model[2].bias[1] = float("nan"), float("inf")
    with pytest.raises(sanity.NonFiniteWeights, match=r"some/folder: 2 weights are NaN.*: 0\.weight, 2\.bias\. "):
        sanity.require_finite_weights(model, "some/folder")


def test_the_part_of_a_partitioned_weight_that_a_rank_holds_is_looked_at():
    model = torch.nn.Linear(2, 2)
    model.weight.ds_tensor = torch.tensor([float("nan")])
    assert sanity.non_finite_weights(model) == ["weight"]


def test_rows_with_nan_logits_are_noted_whenever_they_come():
    watch = sanity.Watch()
    assert watch.rows(2) == [False, False]
    for scores in ([[0.0, -torch.inf], [1.0, 2.0]], [[torch.nan, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]):
        scores = torch.tensor(scores)
        assert watch(torch.zeros(2, 1), scores) is scores
    assert watch.rows(2) == [True, False], "minus infinity is how a word is forbidden"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with runner_world.short_answers(tmp_path_factory.mktemp("sanity"), 6) as built:
        yield built


@pytest.mark.parametrize("name", ["model.norm.weight", "tower", "model.mm_projector.0.weight"])
def test_weights_that_are_nan_end_the_evaluation(world, tmp_path, capsys, name):
    path = world.model / "model.safetensors"
    clean = path.read_bytes()
    weights = load_file(path)
    name = next(key for key in weights if "vision" in key and "q_proj.weight" in key) if name == "tower" else name
    weights[name][:] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    try:
        status = main(runner_world.flags(world, tmp_path, *runner_world.REDUCTION))
    finally:
        path.write_bytes(clean)
    said = capsys.readouterr().err
    assert status == 1 and f"error: {world.model}: 1 weights are NaN or infinite (not finite): " in said
    assert name.rsplit(".", 2)[-2] + ".weight" in said, "the message names the weight"


def run(world, out, *more):
    return main(runner_world.flags(world, out, "--name", "row", *runner_world.REDUCTION, *more))


def test_logits_that_are_nan_are_written_marked_and_no_result(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sanity.Watch, "rows", lambda self, count: [True] + [False] * (count - 1))
    assert run(world, tmp_path) == BROKEN
    said = capsys.readouterr()
    assert "  BROKEN: 3 of 18 answers come from logits that are NaN" in said.out
    assert "error: no result" in said.err and "row, pope: 3 of 18 answers" in said.err and "duet doctor" in said.err
    record = json.loads(runner_world.only(tmp_path, "*.result.json").read_text())
    assert record["broken"] and record["metrics"] and record["n_scored"] == 18, "what was computed is kept"
    monkeypatch.undo()
    assert run(world, tmp_path) == BROKEN, "stored answers stay what they are"
    capsys.readouterr()
    assert report.main([str(tmp_path)]) == BROKEN
    said = capsys.readouterr()
    assert "BROKEN, no result: 3 of 18 answers" in said.out and "broken: row, pope" in said.err
    assert "BROKEN" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("text", ["", "yes"])
def test_one_answer_to_everything_is_no_result(world, tmp_path, capsys, monkeypatch, text):
    def generate(self, ids, *_, **__):
        self.non_finite = [False] * len(ids)
        return [text] * len(ids)

    monkeypatch.setattr(Answerer, "generate", generate)
    monkeypatch.setattr(sanity, "FEW_ANSWERS", 18)
    assert run(world, tmp_path) == BROKEN
    assert "all 18 answers are " in capsys.readouterr().err
    assert run(world, tmp_path / "limit", "--limit", "3") == 0, "three questions say nothing"


def test_a_model_that_nobody_trained_may_guess(world, tmp_path):
    assert run(world, tmp_path) == 0


def test_chance_is_an_error_only_where_training_is_claimed(world, tmp_path, capsys, monkeypatch):
    from llava.eval.tasks.pope import Pope

    monkeypatch.setattr(Pope, "chance", 0.5)
    monkeypatch.setattr(sanity, "FEW_MARKS", 18)
    assert run(world, tmp_path) == 0
    assert run(world, tmp_path, "--after-training") == BROKEN
    assert "after training, everything is at or below chance" in capsys.readouterr().err
    record = json.loads(runner_world.only(tmp_path, "*.result.json").read_text())
    assert record["broken"], "the record of the same answers is marked now"


def test_the_tiny_benchmark_knows_the_level_of_guessing_of_every_kind(tmp_path):
    from llava.eval.tasks import TASKS
    from llava.eval.tasks.base import Question

    task = TASKS.get("tiny")()
    truths = [("exists", "yes"), ("exists", "no"), ("count", "2"), ("count", "3"), ("count", "4"), ("count", "2")]
    questions = [Question(str(i), i, "?", (), kind, {"answer": said}) for i, (kind, said) in enumerate(truths)]
    score = SimpleNamespace(metrics={"accuracy_exists": 50.0, "accuracy_count": 25.0})
    assert task.groups(questions, score) == {"exists": Group(1, 2, 0.5), "count": Group(1, 4, 0.5)}
