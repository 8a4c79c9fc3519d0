"""The held-out evaluation: reading records, batching, counting tokens, collecting runs, the table."""

import json
from types import SimpleNamespace

import pytest

from playground.tiny import evaluate, report
from playground.tiny.questions import KINDS


def record(**changes):
    base = {"id": "a", "image": "a.jpg", "kind": "count", "question": "How many?", "answer": "3"}
    return {key: value for key, value in (base | changes).items() if value is not None}


def run(name, seed, mean, **changes):
    base = {
        "name": name,
        "seed": seed,
        "mean": mean,
        "accuracy": dict.fromkeys(KINDS, mean),
        "average_tokens": 192.0,
        "seconds_per_question": 0.02,
        "peak_memory_mib": 700.0,
    }
    return base | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "no valid JSON"),
        ("[]", "non-empty list"),
        ("{}", "non-empty list"),
        (json.dumps([record(), record(answer=None)]), "record 1: answer missing"),
        (json.dumps([record(kind="colour")]), "record a: kind 'colour'"),
    ],
)
def test_bad_held_out_files_are_named(tmp_path, content, message):
    path = tmp_path / "heldout.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate.load_records(str(path))


def test_batches_hold_prompts_of_one_length():
    questions = [evaluate.Question(str(i), "a", "count", "3", (0,) * (3 + i % 3)) for i in range(20)]
    found = list(evaluate.batches(questions, 4))
    assert sorted(q.name for group in found for q in group) == sorted(q.name for q in questions)
    assert all(len({len(q.ids) for q in group}) == 1 and len(group) <= 4 for group in found)


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"b\.jpg"):
        evaluate.Pixels(str(tmp_path), None, None).picture("b.jpg")


def test_layer_means_weight_samples_and_leave_out_decoding_steps():
    def segment(start, stop, visual):
        return SimpleNamespace(start=start, stop=stop, visual=visual)

    passes = [
        [segment(0, 2, [10, 10]), segment(2, 4, [4, 4])],
        [segment(0, 4, [0, 0])],
        [segment(0, 2, [16]), segment(2, 4, [4])],
    ]
    assert evaluate.layer_means(SimpleNamespace(passes=passes), 4) == [12.0, 12.0, 4.0, 4.0]


def test_runs_are_collected_by_name_and_seed(tmp_path):
    path = tmp_path / "results.json"
    evaluate.collect(path, run("duet", 0, 0.5))
    evaluate.collect(path, run("duet", 1, 0.7))
    runs = evaluate.collect(path, run("duet", 0, 0.9))
    assert [(r["name"], r["seed"], r["mean"]) for r in runs] == [("duet", 1, 0.7), ("duet", 0, 0.9)]
    assert json.loads(path.read_text()) == runs


def test_the_table_averages_seeds_and_states_chance():
    training = {"seconds_per_step": 1.5, "peak_memory_mib": 900}
    text = report.markdown([run("full", 0, 0.9), run("duet", 0, 0.8, training=training), run("duet", 1, 0.6)])
    lines = text.strip().splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "chance" in lines[2] and "50.0" in lines[2]
    assert "| full | 1 |" in lines[3] and "90.0" in lines[3] and "n/a" in lines[3]
    assert "| duet | 2 |" in lines[4] and "70.0 ± 14.1" in lines[4] and "1.500" in lines[4]
