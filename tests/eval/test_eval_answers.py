"""Answers files and settings: what is kept after an interruption, and what never mixes."""

import dataclasses
import json
import os
import shutil
import signal
import time

import pytest
from runner_world import in_processes

from llava.eval.answers import AnswersFile, cut_torn_line, read_answers, read_rows, write_lines
from llava.eval.settings import Settings, model_fingerprint, questions_digest
from llava.eval.tasks.base import BadEvalData, Question

SETTINGS = Settings(
    benchmark="pope",
    questions="q",
    model="m",
    reduction=None,
    template="vicuna_v1",
    decoding={"do_sample": False, "max_new_tokens": 128},
    dtype="float16",
    attention="sdpa",
    visuals="pad",
)


def row(key, **changes):
    return {"question_id": 1, "prompt": "q?", "text": "ja ✓", "key": key} | changes


def test_rows_come_back_and_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    with AnswersFile(path) as file:
        assert file.rows == []
        file.append([row("a"), row("b")])
    with open(path, "ab") as file:
        file.write(json.dumps(row("c"), ensure_ascii=False).encode()[:-3])
    with AnswersFile(path) as file:
        assert [r["key"] for r in file.rows] == ["a", "b"]
        file.append([row("c")])
    assert read_rows(path) == [row("a"), row("b"), row("c")]


def test_a_file_of_one_torn_line_becomes_empty_and_a_whole_one_stays(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"key": "a')
    cut_torn_line(path)
    assert path.read_bytes() == b""
    path.write_bytes(b'{"key": "a"}\n')
    cut_torn_line(path)
    assert path.read_bytes() == b'{"key": "a"}\n'


def refused(path):
    """Whether another process may neither write nor repair; called in a child."""
    for attempt in (AnswersFile, cut_torn_line):
        with pytest.raises(BadEvalData, match=r"a\.jsonl: another process is writing"):
            attempt(path)


def test_two_writers_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswersFile(path) as file:
        file.append([row("a")])
        assert in_processes(refused, path) == [0]
    assert in_processes(refused, path) == [1]


def test_a_worker_that_outlives_a_killed_run_keeps_nobody_out(tmp_path):
    path = tmp_path / "a.jsonl"

    parent = os.fork()
    if parent == 0:
        file = AnswersFile(path)
        file.append([row("a")])
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    begin = time.monotonic()
    with AnswersFile(path) as file:
        assert len(file.rows) == 1 and time.monotonic() - begin < 2, "the worker must still be alive"


def test_reading_the_rows_does_not_give_the_lock_up_and_old_answers_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, [row("a")])
    with AnswersFile(path) as file:
        assert in_processes(refused, path) == [0]
        assert file.set_aside() == tmp_path / "a.jsonl.old1"
        file.append([row("b")])
        assert in_processes(refused, path) == [0]
    assert (read_rows(path), read_rows(tmp_path / "a.jsonl.old1")) == ([row("b")], [row("a")])


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row("a")) + "\n{oops\n" + json.dumps(row("b")) + "\n")
    with pytest.raises(BadEvalData, match=r"a\.jsonl, line 2"):
        AnswersFile(path)


def test_our_rows_and_llavas_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    llava = {"question_id": "x/1.jpg", "prompt": "p", "text": "", "answer_id": "i", "model_id": "m", "metadata": {}}
    write_lines(path, [row("a"), llava])
    ours, theirs = read_answers(path)
    assert (ours.key, ours.text, ours.question_id) == ("a", "ja ✓", 1)
    assert (theirs.key, theirs.text, theirs.question_id) == ("", "", "x/1.jpg")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "p", "text": "t"}, "line 2: field 'question_id'"),
        ({"question_id": 1, "prompt": "p", "text": None}, "line 2: field 'text'"),
        ({"question_id": 1, "text": "t"}, "line 2: field 'prompt'"),
        (row("a"), r"1 questions have two answers, first: a"),
    ],
)
def test_bad_answers_are_named(tmp_path, bad, message):
    path = tmp_path / "a.jsonl"
    write_lines(path, [row("a"), bad])
    with pytest.raises(BadEvalData, match=message):
        read_answers(path)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Settings)])
def test_every_setting_changes_the_file_name(name):
    other = {"reduction": {"dominant": 300}, "decoding": {"max_new_tokens": 16}, "protocol": 99}.get(name, "other")
    assert dataclasses.replace(SETTINGS, **{name: other}).stem != SETTINGS.stem
    assert dataclasses.replace(SETTINGS).stem == SETTINGS.stem
    assert len(SETTINGS.digest) == 12 and set(SETTINGS.digest) <= set("0123456789abcdef")


def test_the_questions_digest_follows_what_is_asked_and_not_where_it_lies(tmp_path):
    def digest(root, key="k", text="t", picture="a.jpg"):
        return questions_digest([Question(key, 1, text, (root / picture,))], root)

    assert digest(tmp_path) == digest(tmp_path / "moved")
    changed = [digest(tmp_path, key="x"), digest(tmp_path, text="x"), digest(tmp_path, picture="x")]
    assert len({digest(tmp_path), *changed}) == 4


def test_the_fingerprint_follows_the_weights_of_model_base_and_tower(tmp_path):
    class Config:
        mm_vision_tower = "../clip"
        _name_or_path = str(tmp_path / "model")

    for name in ("model", "base", "clip"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(1000))
    model, base = str(tmp_path / "model"), str(tmp_path / "base")
    first = model_fingerprint(model, base, Config)
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "model" / "trainer_state.json").write_text("{}")
    assert model_fingerprint(model, base, Config) == first
    assert model_fingerprint(str(tmp_path / "copy"), base, Config) == first
    seen = {first, model_fingerprint(model, None, Config), model_fingerprint(model, base, None)}
    for name in ("model", "base", "clip"):
        (tmp_path / name / "model.safetensors").write_bytes(bytes(999) + b"\1")
        seen.add(model_fingerprint(model, base, Config))
    assert len(seen) == 6
