"""The three video benchmarks from `python -m llava.eval` to the judge and the table, with a small real model."""

import json
import shutil

import pytest
import runner_world
from runner_world import REDUCTION, flags, only
from video_helpers import write_benchmark
from video_stub_judge import MODEL, SNAPSHOT, serve_judge

from llava.eval import judge, report
from llava.eval.__main__ import main
from llava.eval.tasks.video_qa import MsrvttQA, MsvdQA, TgifQA, VideoQA

TASKS = (MsvdQA, MsrvttQA, TgifQA)
NAMES = [task.name for task in TASKS]
FRAMES, PATCHES = 8, runner_world.PATCHES


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, the videos (mp4 where PyAV is there, else GIF), and a run without and one with a reduction."""
    try:
        import av  # noqa: F401

        suffixes = (".avi", ".mp4", ".gif")
    except ImportError:
        suffixes = (".gif",) * 3
    folder = tmp_path_factory.mktemp("videos")
    built = runner_world.SimpleNamespace(
        folder=folder, model=runner_world.build_model(folder), root=folder / "eval", out=folder / "out"
    )
    for task, suffix in zip(TASKS, suffixes, strict=True):
        write_benchmark(built.root / task.folder, task.video_folder, suffix=suffix, frames=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoQA, "max_new_tokens", 6)
        for name, more in (("full", ()), ("duet", REDUCTION)):
            assert main(flags(built, built.out, "--name", name, "--batch", 4, *more, benchmarks=",".join(NAMES))) == 0
        yield built


def record_path(out, name, benchmark):
    return only(out / name, f"{benchmark}-*.result.json")


def record(out, name, benchmark):
    return json.loads(record_path(out, name, benchmark).read_text(encoding="utf-8"))


@pytest.mark.parametrize("benchmark", NAMES)
def test_videos_are_answered_and_scored(world, benchmark):
    full, duet = record(world.out, "full", benchmark), record(world.out, "duet", benchmark)
    assert (full["n_expected"], full["n_missing"], full["headline"]) == (6, 0, "contains")
    assert any("not comparable" in note for note in full["notes"])
    assert full["settings"]["template"] == "llava_v1" and "8 frames" in full["settings"]["visuals"]
    assert full["visual_tokens"]["tokens_per_layer"] == [float(FRAMES * PATCHES)] * 4
    assert duet["visual_tokens"]["tokens_per_layer"] == [96.0, 48.0, 48.0, 0.0]  # 8 x (10 + 2), then half, then none
    lines = only(world.out / "full", f"{benchmark}-????????????.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    assert [row["question_id"] for row in answers] == [0, 1, "v_2", 3, 4, 5]
    assert len({row["text"] for row in answers}) > 2


def test_batch_size_does_not_change_answers(world, tmp_path):
    assert main(flags(world, tmp_path, "--name", "one", "--batch", 1, benchmarks="msvd_qa")) == 0
    alone = only(tmp_path, "msvd_qa-????????????.jsonl").read_text(encoding="utf-8")
    together = only(world.out / "full", "msvd_qa-????????????.jsonl").read_text(encoding="utf-8")
    texts = [[json.loads(line)["text"] for line in lines.splitlines()] for lines in (alone, together)]
    assert texts[0] == texts[1]


def test_a_missing_video_is_named_before_the_model_is_loaded(world, tmp_path, capsys):
    folder = tmp_path / MsvdQA.folder
    write_benchmark(folder, MsvdQA.video_folder)
    (folder / MsvdQA.video_folder / "coffee.gif").unlink()
    args = flags(runner_world.SimpleNamespace(model="no-model", root=tmp_path), tmp_path / "out", benchmarks="msvd_qa")
    assert main(args) == 2
    said = capsys.readouterr().err
    assert "2 questions have no picture" in said and "coffee.mp4 does not exist" in said


def test_a_missing_set_says_where_to_get_it(tmp_path, capsys):
    args = flags(runner_world.SimpleNamespace(model="no-model", root=tmp_path), tmp_path / "out", benchmarks="tgif_qa")
    assert main(args) == 2
    said = capsys.readouterr().err
    for part in ("test_q.json", "test_a.json", "mp4", "TRAIN_AND_VALIDATE.md"):
        assert part in said


def test_a_broken_video_is_named_and_ends_with_2(world, tmp_path, capsys):
    folder = tmp_path / MsvdQA.folder
    write_benchmark(folder, MsvdQA.video_folder, frames=2)
    (folder / MsvdQA.video_folder / "rocket.gif").write_bytes(b"GIF89a no more")
    args = flags(runner_world.SimpleNamespace(model=world.model, root=tmp_path), tmp_path / "out", benchmarks="msvd_qa")
    assert main(args) == 2
    said = capsys.readouterr()
    assert "no answer to 4" in said.err and "rocket.gif" in said.err and "no score" in said.out


def test_judged_answers_come_into_the_table(world, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(world.out, tmp_path / "out")
    with serve_judge(monkeypatch) as stub:
        stub.always = "{'pred': 'yes', 'score': 4}"
        for name in ("full", "duet"):
            path = record_path(out, name, "tgif_qa")
            assert judge.main(["--result", str(path), "--root", str(world.root), "--judge-model", MODEL]) == 0
    assert record(out, "full", "tgif_qa")["judge"]["reported_as"] == [SNAPSHOT]
    capsys.readouterr()
    assert report.main([str(out), "--baseline", "full", "--benchmarks", "tgif_qa"]) == 0
    said = capsys.readouterr().out
    assert "100.0 (100.0%)" in said and f"judged by {MODEL}" in said and "not comparable" not in said


def test_a_rules_score_is_no_percentage_of_a_judges(world, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(world.out, tmp_path / "out")
    assert report.main([str(out), "--baseline", "paper-video-7b"]) == 0
    said = capsys.readouterr().out
    assert "| duet |" in said and said.count("%)") == 3, "only the paper's own row has percentages"
    with serve_judge(monkeypatch) as stub:
        stub.always = "{'pred': 'yes', 'score': 4}"
        path = record_path(out, "duet", "tgif_qa")
        assert judge.main(["--result", str(path), "--root", str(world.root), "--judge-model", MODEL]) == 0
    capsys.readouterr()
    assert report.main([str(out), "--baseline", "full", "--benchmarks", "tgif_qa"]) == 0
    duet = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| duet |"))
    assert "| 100.0 |" in duet and "%" not in duet
    assert report.main([str(out), "--baseline", "paper-video-7b", "--benchmarks", "tgif_qa"]) == 0
    assert "100.0 (212.3%)" in capsys.readouterr().out  # of 47.1
