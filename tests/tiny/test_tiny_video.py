"""The tiny video world: deterministic, disjoint splits, answers that need time, and a model that trains and answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llava.eval.video import frame_indices, read_frames
from playground.tiny import build_video, compare_video, evaluate_video, scenes, video_questions, video_scenes

ROOT = Path(__file__).resolve().parents[2]


def clips(split="train", count=25):
    return [video_scenes.make_clip(split, 3, index) for index in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small data set on disk."""
    folder = tmp_path_factory.mktemp("video")
    arguments = ["--out", str(folder), "--pretrain", "6", "--train", "6", "--heldout", "3", "--workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["build_video", *arguments])
        build_video.main()
    return folder


def test_a_clip_depends_on_its_arguments_only():
    first, again = (video_scenes.make_clip("train", 3, 7) for _ in range(2))
    assert np.array_equal(first.frames, again.frames) and first.tracks == again.tracks
    for other in (("train", 3, 8), ("train", 4, 7), ("heldout", 3, 7)):
        assert not np.array_equal(first.frames, video_scenes.make_clip(*other).frames)


def test_splits_share_neither_digits_nor_regions():
    sources = {split: {track.source for clip in clips(split) for track in clip.tracks} for split in scenes.SPLITS}
    assert not sources["train"] & sources["heldout"]
    for split in scenes.SPLITS:
        for clip in clips(split):
            left, top, right, bottom = scenes.photo_region(scenes.load_photos()[clip.photo], split)
            for x0, y0, x1, y1 in clip.crops:
                assert left <= x0 < x1 <= right + 1e-6 and top <= y0 < y1 <= bottom + 1e-6


def test_digits_take_turns_move_clearly_and_are_seen_twice_by_the_model():
    seen = frame_indices(video_scenes.STORED, 8)
    for clip in clips(count=60):
        values = [track.value for track in clip.tracks]
        assert 2 <= len(values) <= 4 and len(set(values)) == len(values)
        assert clip.tracks[0].first == 0 and clip.tracks[-1].last == video_scenes.STORED - 1
        for track, following in zip(clip.tracks, clip.tracks[1:], strict=False):
            assert following.first == track.last + 1
        for track in clip.tracks:
            inside = [frame for frame in seen if track.first <= frame <= track.last]
            assert len(inside) >= 2
            way = track.left(inside[-1]) - track.left(inside[0])
            assert abs(way) >= 14 and (way > 0) == (track.direction == "right")
            assert min(track.begin, track.end) >= 0 and max(track.begin, track.end) + track.size <= video_scenes.SIDE


def test_answers_follow_from_the_tracks():
    for clip in clips(count=20):
        values = [track.value for track in clip.tracks]
        rng = np.random.default_rng(0)
        told = {kind: video_questions.ask(kind, clip.tracks, rng) for kind in video_questions.KINDS}
        assert told["order"][1].split() == [str(value) for value in values] and told["count"][1] == str(len(values))
        assert (told["first"][1], told["last"][1]) == (str(values[0]), str(values[-1]))
        asked = int(told["after"][0].rstrip("?").split()[-1])
        assert told["after"][1] == str(values[values.index(asked) + 1])
        asked = int(told["exists"][0].rstrip("?").split()[-1])
        assert told["exists"][1] == ("Yes" if asked in values else "No")
        moving = next(track for track in clip.tracks if f" {track.value} " in told["move"][0])
        assert told["move"][1] == moving.direction
    with pytest.raises(ValueError, match="expected one of exists"):
        video_questions.ask("colour", clips(count=1)[0].tracks, np.random.default_rng(0))


def test_time_is_needed():
    """Without time most questions are guesses: their ceiling lies far below one."""
    for kind in ("first", "last", "after", "order", "move"):
        assert video_questions.CHANCE[kind] <= video_questions.UNORDERED[kind] < 0.65


def test_files_are_llavas_and_the_same_every_time(data, tmp_path, monkeypatch):
    train, heldout = (json.loads((data / f"{name}.json").read_text()) for name in ("train", "heldout"))
    assert len(train) == 6 and len(heldout) == 3 * len(video_questions.KINDS)
    assert train[0]["conversations"][0]["value"].startswith("<video>\n")
    assert [turn["from"] for turn in train[0]["conversations"][:2]] == ["human", "gpt"]
    assert evaluate_video.load_records(str(data / "heldout.json")) == heldout
    frames = read_frames(data / train[0]["video"], 8)
    assert len(frames) == 8 and frames[0].size == (video_scenes.SIDE, video_scenes.SIDE)
    clip = video_scenes.make_clip("train", build_video.SEED * 10 + 1, 0)
    worst = np.abs(np.asarray(frames[0]).astype(int) - clip.frames[0].astype(int)).mean()
    assert worst < 12  # 64 colours
    again = build_video.clip_records(str(_folders(tmp_path)), "train", build_video.SEED, 10, 0)
    assert again == train[:1]
    assert (tmp_path / train[0]["video"]).read_bytes() == (data / train[0]["video"]).read_bytes()
    with pytest.raises(ValueError, match="must be positive"):
        build_video.build(str(tmp_path), "train", 0, lambda index: [], 1)


def _folders(root):
    (root / "train").mkdir()
    return root


@pytest.mark.parametrize(
    ("content", "message"),
    [("[", "no valid JSON"), ("[]", "non-empty list"), ('[{"id": "a"}]', "record 0: video.* missing"),
     ('[{"id": "a", "video": "v", "kind": "x", "question": "", "answer": "", "conversations": []}]', "kind 'x'")],
)  # fmt: skip
def test_wrong_heldout_files_are_named(tmp_path, content, message):
    (tmp_path / "h.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate_video.load_records(str(tmp_path / "h.json"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The assembled model, its projector untrained."""
    out = tmp_path_factory.mktemp("base") / "model"
    subprocess.run(
        [sys.executable, "-m", "playground.tiny.video_model", "--out", str(out), "--no-pretrain"], check=True, cwd=ROOT
    )
    return out


def test_the_base_model_is_the_backbones(base):
    """The towers see a frame as the middle of a large image; the language model answers text as before."""
    from safetensors.torch import load_file

    from playground.tiny.video_model import assemble

    model, processor = assemble()
    weights = load_file(base / "model.safetensors")
    assert len(weights) == len(model.state_dict())
    big = load_file(ROOT / "playground/tiny/weights/clip/model.safetensors")
    table = next(value for name, value in big.items() if name.endswith("position_embedding.weight")).float()
    own = model.model.video_tower.state_dict()
    small = next(value for name, value in own.items() if name.endswith("position_embedding.weight"))
    assert torch.equal(small[0], table[0]) and torch.equal(small[1], table[1 + 8 * 24 + 8])
    assert processor.tokenizer.convert_ids_to_tokens(model.config.video_token_id) == "<video>"
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "What comes after 3?"}]}], add_generation_prompt=True
    )
    ids = processor.tokenizer(text, return_tensors="pt")
    answer = model.eval().generate(**ids, max_new_tokens=3, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(answer, skip_special_tokens=True).strip() == "4"


@pytest.mark.slow
def test_one_command_trains_evaluates_and_resumes(data, base, tmp_path, capfd, monkeypatch):
    """A handful of clips, one step each; the second start of the command does nothing again."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LAUNCHER", "python")
    monkeypatch.setenv("FINETUNE_DATA", str(data / "train.json"))
    monkeypatch.setenv("FINETUNE_IMAGES", str(data))
    monkeypatch.setenv("BASE_MODEL", str(base))
    command = ["--budgets", "0,136", "--seeds", "1", "--out", str(tmp_path), "--limit", "7", "--", "--max_steps", "1"]
    command += ["--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "2", "--logging_steps", "1"]
    assert compare_video.main(command) == 0
    runs = json.loads((tmp_path / "runs.json").read_text())
    names = [run["name"] for run in runs]
    assert names == ["full tokens", "DUET 136, not trained with it", "DUET 136"]
    assert [run["average_tokens"] for run in runs] == [8 * 65, 35, 35]
    assert all(set(run["accuracy"]) == set(video_questions.KINDS) for run in runs)
    assert "| DUET 136 | 1 | 35.0 |" in (tmp_path / "runs.md").read_text()
    assert not list(tmp_path.rglob("*.safetensors"))
    capfd.readouterr()
    assert compare_video.main(command) == 0
    assert "=== finetune" not in capfd.readouterr().out
    assert compare_video.main(["--budgets", "7", "--out", str(tmp_path)]) == 2
