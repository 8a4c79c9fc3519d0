"""`python -m llava.eval`: complete, interrupted, in several processes, and with things missing."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import runner_world
from runner_world import REDUCTION, answers_file, flags, in_processes, only

from llava.eval.__main__ import main
from llava.eval.tasks.pope import Pope


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The model and the benchmarks, with short answers."""
    with runner_world.short_answers(tmp_path_factory.mktemp("runner"), 8) as world:
        yield world


@pytest.fixture(scope="module")
def whole(world):
    """An uninterrupted run over both benchmarks."""
    out = world.folder / "whole"
    assert main(flags(world, out, "--name", "row", "--batch", 4, benchmarks="pope,scienceqa")) == 0
    return out


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(path):
    return {row["key"]: row["text"] for row in rows(path)}


def record(out, benchmark="pope"):
    return json.loads(only(out, f"{benchmark}-*.result.json").read_text())


def test_all_questions_are_answered_in_order_and_scored(world, whole):
    answers = rows(answers_file(whole))
    asked = Pope().questions(world.root)
    assert [row["key"] for row in answers] == [question.key for question in asked]
    assert [row["prompt"] for row in answers] == [question.text for question in asked]
    assert set(answers[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata", "key"}
    assert len({row["answer_id"] for row in answers}) == len(answers)
    assert len({row["text"] for row in answers}) > 3
    found = record(whole)
    assert (found["name"], found["benchmark"], found["n_expected"], found["n_missing"]) == ("row", "pope", 18, 0)
    assert found["metrics"][found["headline"]] >= 0
    assert found["visual_tokens"]["tokens_per_layer"] == [36.0] * 4 and found["visual_tokens"]["samples"] == 18
    assert found["visual_tokens"]["untouched"] == {}
    assert found["seconds_per_sample"] > 0
    assert found["settings"]["template"] == "vicuna_v1" and found["settings"]["reduction"] is None


def test_text_only_questions_are_answered_and_left_out_of_the_token_count(whole):
    found = record(whole, "scienceqa")
    assert found["n_missing"] == 0 and found["n_expected"] == 6 and found["visual_tokens"]["samples"] == 3
    prompts = [row["prompt"] for row in rows(answers_file(whole, "scienceqa"))]
    assert [prompt.startswith("<image>\n") for prompt in prompts] == [False, True] * 3


def test_a_reduction_is_measured_and_gets_a_file_of_its_own(world, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    assert main(flags(world, tmp_path / "out", "--name", "row", "--batch", 4, *REDUCTION)) == 0
    assert len(sorted(tmp_path.rglob("pope-????????????.jsonl"))) == 2
    assert main(flags(world, tmp_path / "alone", *REDUCTION)) == 0
    found = record(tmp_path / "alone")
    assert found["visual_tokens"]["tokens_per_layer"] == [12.0, 6.0, 6.0, 0.0]
    assert found["visual_tokens"]["average_tokens"] == 6.0
    assert found["visual_tokens"]["untouched"] == {"stage 1": 0, "stage 2, layer 1": 0, "stage 2, layer 3": 0}
    assert found["name"] == "tiny-llava-duet-6"
    assert texts(answers_file(tmp_path / "alone")) != texts(answers_file(whole))


def kill_at(world, out, count):
    """Run in this process and die like after kill -9 when picture number `count` is opened."""
    opened = []
    before = Pope.open_visual

    def open_visual(self, path):
        opened.append(path)
        if len(opened) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(self, path)

    Pope.open_visual = open_visual
    return main(flags(world, out, "--name", "row", "--batch", 4))


def test_a_killed_run_goes_on_and_gives_the_same_file(world, whole, tmp_path):
    assert in_processes(kill_at, world, tmp_path, 4) == [-signal.SIGKILL]
    shard = only(tmp_path, "*.rank0.jsonl")
    stored = rows(shard)
    assert 0 < len(stored) < 18 and not list(tmp_path.rglob("*.result.json"))
    with open(shard, "ab") as file:
        file.write(b'{"question_id": 3, "prompt": "Is th')
    assert main(flags(world, tmp_path, "--name", "row", "--batch", 4)) == 0
    assert answers_file(tmp_path).read_bytes() == answers_file(whole).read_bytes()
    assert rows(shard)[: len(stored)] == stored
    assert record(tmp_path)["metrics"] == record(whole)["metrics"]
    assert record(tmp_path)["visual_tokens"] == record(whole)["visual_tokens"]


def test_a_batch_that_was_stored_in_part_is_completed(world, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    shard = only(tmp_path, "pope-*.rank0.jsonl")
    shard.write_text("".join(line + "\n" for line in shard.read_text().splitlines()[:6]))
    answers_file(tmp_path).unlink()
    assert main(flags(world, tmp_path / "out", "--name", "row", "--batch", 4)) == 0
    assert answers_file(tmp_path).read_bytes() == answers_file(whole).read_bytes()


def test_a_finished_run_asks_nothing_again(world, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(Pope, "open_visual", lambda *_: pytest.fail("a picture was opened"))
    assert main(flags(world, tmp_path / "out", "--name", "row", "--batch", 4)) == 0


def test_a_changed_question_starts_anew(world, whole, tmp_path):
    shutil.copytree(world.root, tmp_path / "eval")
    shutil.copytree(whole, tmp_path / "out")
    path = tmp_path / "eval" / "pope" / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text().replace("dining table", "green table"))
    world = type(world)(**(vars(world) | {"root": tmp_path / "eval"}))
    assert main(flags(world, tmp_path / "out", "--name", "row", "--batch", 4)) == 0
    assert len(sorted(tmp_path.rglob("pope-????????????.jsonl"))) == 2


def test_batch_size_and_workers_do_not_change_answers(world, whole, tmp_path):
    assert main(flags(world, tmp_path, "--batch", 1, "--workers", 2)) == 0
    assert answers_file(tmp_path).name == answers_file(whole).name
    assert texts(answers_file(tmp_path)) == texts(answers_file(whole))


def test_two_processes_give_the_same_file_as_one(world, whole, tmp_path):
    both = flags(world, tmp_path, "--name", "row", "--batch", 4, benchmarks="pope,scienceqa")
    assert in_processes(main, both, world=2) == [0, 0]
    for benchmark in ("pope", "scienceqa"):
        assert answers_file(tmp_path, benchmark).read_bytes() == answers_file(whole, benchmark).read_bytes()
        shards = sorted(tmp_path.rglob(f"{benchmark}-*.rank*.jsonl"))
        assert len(shards) == 2 and all(rows(shard) for shard in shards)
    assert record(tmp_path)["processes"] == 2


def test_one_process_goes_on_where_two_stopped(world, whole, tmp_path):
    arguments = flags(world, tmp_path, "--name", "row", "--batch", 4)
    assert in_processes(main, arguments, world=2) == [0, 0]
    shard = sorted(tmp_path.rglob("*.rank1.jsonl"))[0]
    shard.write_text(shard.read_text()[:-20])
    answers_file(tmp_path).unlink()
    assert main(arguments) == 0
    assert answers_file(tmp_path).read_bytes() == answers_file(whole).read_bytes()


def test_answers_that_are_there_twice_are_refused(world, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "out")
    shard = only(tmp_path, "pope-*.rank0.jsonl")
    shutil.copy(shard, shard.with_name(shard.name.replace("rank0", "rank1")))
    assert main(flags(world, tmp_path / "out", "--name", "row", "--batch", 4)) == 2
    assert "18 questions have two answers" in capsys.readouterr().err


def no_model(*_, **__):
    raise AssertionError("the model was loaded")


def test_missing_files_are_named_before_the_model_is_loaded(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llava.eval.__main__.load_pretrained_model", no_model)
    shutil.copytree(world.root, tmp_path / "eval")
    (tmp_path / "eval" / "pope" / "coco" / "coco_pope_popular.json").unlink()
    shutil.rmtree(tmp_path / "eval" / "scienceqa" / "images")
    world = type(world)(**(vars(world) | {"root": tmp_path / "eval"}))
    assert main(flags(world, tmp_path / "out", benchmarks="pope,scienceqa,gqa")) == 2
    message = capsys.readouterr().err
    assert "coco_pope_popular.json is missing" in message and "github.com/AoiDragon/POPE" in message
    assert "scienceqa/images/test is missing" in message and "testdev_balanced_questions.json is missing" in message
    assert not (tmp_path / "out").exists()


def test_missing_pictures_are_named_before_the_model_is_loaded(world, tmp_path, capsys, monkeypatch):
    shutil.copytree(world.root, tmp_path / "eval")
    (tmp_path / "eval" / "pope" / "val2014" / "COCO_val2014_000000000001.jpg").unlink()
    world = type(world)(**(vars(world) | {"root": tmp_path / "eval"}))
    with monkeypatch.context() as patch:
        patch.setattr("llava.eval.__main__.load_pretrained_model", no_model)
        assert main(flags(world, tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert "pope: 6 questions have no picture" in message and "COCO_val2014_000000000001.jpg does not exist" in message
    assert main(flags(world, tmp_path / "out", "--on-missing", "skip")) == 0
    found = record(tmp_path / "out")
    assert (found["n_missing"], found["missing_skipped"], len(found["failures"])) == (6, True, 6)


def test_a_benchmark_without_files_can_be_left_out(world, tmp_path, capsys):
    arguments = flags(world, tmp_path, "--on-missing", "skip", "--limit", 2, benchmarks="gqa,pope")
    assert main(arguments) == 0
    assert "gqa: " in capsys.readouterr().err
    assert len(rows(answers_file(tmp_path))) == 2
    assert main(flags(world, tmp_path, "--on-missing", "skip", benchmarks="gqa")) == 2


def test_a_broken_picture_is_named_and_counted_and_the_rest_is_answered(world, whole, tmp_path, capsys):
    shutil.copytree(world.root, tmp_path / "eval")
    (tmp_path / "eval" / "pope" / "val2014" / "COCO_val2014_000000000001.jpg").write_bytes(b"no picture")
    broken = type(world)(**(vars(world) | {"root": tmp_path / "eval"}))
    assert main(flags(broken, tmp_path / "out", "--name", "row", "--batch", 4)) == 2
    out, err = capsys.readouterr()
    assert "pope: no score (12 of 18 questions, 6 without an answer" in out
    assert "COCO_val2014_000000000001.jpg' cannot be read" in err
    assert len(record(tmp_path / "out")["missing"]) == 6
    shutil.copy(
        world.root / "pope" / "val2014" / "COCO_val2014_000000000001.jpg", tmp_path / "eval" / "pope" / "val2014"
    )
    assert main(flags(broken, tmp_path / "out", "--name", "row", "--batch", 4)) == 0
    assert texts(answers_file(tmp_path / "out")) == texts(answers_file(whole))


def test_a_limit_asks_the_first_questions_and_scores_nothing(world, whole, tmp_path, capsys):
    assert main(flags(world, tmp_path, "--limit", 3, "--batch", 4)) == 0
    assert "asked the first 3 of 18 questions, no score" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.result.json"))
    assert main(flags(world, tmp_path, "--batch", 4)) == 0
    assert texts(answers_file(tmp_path)) == texts(answers_file(whole))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-reduction", "--duet_tokens", "192"], "--no-reduction contradicts --duet_tokens"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--name", "a/b"], "--name 'a/b' becomes a folder's name"),
        (["--benchmarks", "pope,nope"], "unknown benchmark 'nope'"),
        (["--conv-mode", "nope"], "unknown conversation template 'nope'"),
    ],
)
def test_wrong_requests_are_refused(world, tmp_path, capsys, arguments, message):
    assert main([*flags(world, tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_starts_several_processes(world, tmp_path):
    script = runner_world.ROOT / "scripts" / "v1_5" / "eval" / "pope.sh"
    command = [
        "bash",
        script,
        "--model-path",
        world.model,
        "--out",
        tmp_path,
        "--workers",
        0,
        "--limit",
        4,
        "--batch",
        2,
    ]
    env = os.environ | {"DUET_PYTHON": sys.executable, "EVAL_ROOT": str(world.root), "NUM_DEVICES": "2"}
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "asked the first 4 of 18 questions" in done.stdout
    assert len(rows(answers_file(tmp_path))) == 4 and len(list(tmp_path.rglob("*.rank*.jsonl"))) == 2
