"""The scripts' evaluation of a broken run ends with the reason, and keeps what it computed."""

import json
import sys
from types import SimpleNamespace

import pytest
import runner_world
import torch
from transformers.cache_utils import DynamicLayer

from llava.sanity import BROKEN
from playground.tiny import evaluate
from playground.tiny.questions import KINDS

WORDS = ("leftmost", "rightmost", "topmost", "bottommost", "digit", "corner", "how many", "read")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, pictures, and questions whose true answers are what the sound model says: it is always right."""
    folder = tmp_path_factory.mktemp("broken")
    model = runner_world.build_model(folder)
    for number in range(4):
        runner_world.save_picture(folder / f"{number}.png", number)
    records = [
        {
            "id": f"{kind}-{number}", "image": f"{number % 4}.png", "kind": kind, "answer": "",
            "question": f"{WORDS[number % len(WORDS)]} {kind} of {number}?",
        }
        for kind in KINDS for number in range(36)
    ]  # fmt: skip
    loaded = runner_world.load_pretrained_model(str(model), None, "tiny-llava", device="cpu")[:3]
    said = evaluate.evaluate(loaded[1], loaded[0], loaded[2], records, str(folder), 8)["predictions"]
    for record in records:
        record["answer"] = said[record["id"]]
    long = [record for record in records if len(record["answer"].split()) > 2]  # the first token needs no cache
    records = [record for kind in KINDS for record in [one for one in long if one["kind"] == kind][:10]]
    assert len(records) == 10 * len(KINDS)
    (folder / "heldout.json").write_text(json.dumps(records))
    (folder / "long.json").write_text(json.dumps({"step": 5000, "seconds_per_step": 1.0}))
    (folder / "short.json").write_text(json.dumps({"step": 2, "seconds_per_step": 1.0}))
    return SimpleNamespace(folder=folder, model=model, records=records)


def run(world, out, monkeypatch, *more):
    given = ["--model-path", world.model, "--data", world.folder / "heldout.json", "--out", out / "r.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, given), "--name", "duet", *map(str, more)])
    return evaluate.main()


def break_cache(monkeypatch):
    """After the first token generation no longer sees the prompt: a step attends to itself alone."""
    update = DynamicLayer.update

    def forget(self, key_states, value_states, *rest, **more):
        kept = update(self, key_states, value_states, *rest, **more)
        length = key_states.shape[-2]
        if length > 1:
            return kept
        return tuple(torch.zeros_like(x).index_copy_(-2, torch.tensor([x.shape[-2] - 1]), x[..., -1:, :]) for x in kept)

    monkeypatch.setattr(DynamicLayer, "update", forget)


def test_the_sound_model_is_right_and_the_command_ends_well(world, tmp_path, monkeypatch, capsys):
    assert run(world, tmp_path, monkeypatch, "--train-log", world.folder / "long.json") == 0
    (row,) = json.loads((tmp_path / "r.json").read_text())
    assert row["mean"] == 1.0 and row["broken"] == []
    assert "BROKEN" not in capsys.readouterr().out


def test_a_broken_cache_ends_the_scripts_evaluation_with_the_reason(world, tmp_path, monkeypatch, capsys):
    break_cache(monkeypatch)
    assert run(world, tmp_path, monkeypatch, "--train-log", world.folder / "long.json") == BROKEN
    said = capsys.readouterr()
    assert "duet: after training, everything is at or below chance: exists 0.0 % (chance 50.0 %)" in said.err
    assert "uses the cache (`duet doctor`" in said.err and "Traceback" not in said.err
    (row,) = json.loads((tmp_path / "r.json").read_text())
    assert len(row["predictions"]) == len(world.records), "what was computed is written"
    assert "duet **(BROKEN, no result)**" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize("log", [[], ["short.json"]], ids=["untrained", "two steps"])
def test_nothing_is_expected_of_a_model_that_was_not_trained(world, tmp_path, monkeypatch, log):
    break_cache(monkeypatch)
    more = [part for name in log for part in ("--train-log", world.folder / name)]
    assert run(world, tmp_path, monkeypatch, *more) == 0


def test_the_marker_of_a_training_is_as_good_as_its_log(tmp_path):
    assert not evaluate.was_trained(str(tmp_path), None)
    (tmp_path / evaluate.RUN_MARKER).write_text('{"step": 4000}')
    assert evaluate.was_trained(str(tmp_path), None)
    assert not evaluate.was_trained(str(tmp_path), {"step": 3})


def test_few_questions_are_not_called_broken(world, tmp_path, monkeypatch):
    break_cache(monkeypatch)
    assert run(world, tmp_path, monkeypatch, "--train-log", world.folder / "long.json", "--limit", "20") == 0
