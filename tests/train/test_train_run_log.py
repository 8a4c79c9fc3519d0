"""The JSONL log, wandb offline and missing, and the pictures of kept tokens."""

from __future__ import annotations

import importlib.util
import json
import logging

import pytest
import torch
import train_world
from PIL import Image

from llava.train.meter import StepMeter
from llava.train.run_log import RunLog, git_commit, has_wandb_login, jsonable, start_wandb

FIELDS = {
    "loss",
    "learning_rate",
    "lr_mm_projector",
    "grad_norm",
    "tokens_per_second",
    "padding_share",
    "visual_tokens_entering",
    "visual_tokens_average",
    "visual_tokens_from_layer_0",
    "visual_tokens_from_layer_1",
    "visual_tokens_from_layer_2",
    "seconds_per_step",
    "seconds_data",
    "seconds_vision",
    "seconds_language",
    "seconds_optimizer",
    "peak_memory_mb",
}


def test_every_step_has_all_figures(train, tmp_path):
    train(max_steps=2, save_strategy="no", mm_projector_lr=5e-4, image_log_steps=1, image_log_count=1, seed=1)
    lines = [line for line in train_world.figures(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert set(line) >= FIELDS, FIELDS - set(line)
        parts = sum(line[f"seconds_{name}"] for name in ("data", "vision", "language", "optimizer"))
        assert 0 < parts <= line["seconds_per_step"] * 1.01 + 1e-3
        assert 0 <= line["padding_share"] < 1 and line["peak_memory_mb"] > 50
    assert lines[0]["lr_mm_projector"] == pytest.approx(5e-4)
    assert lines[0]["learning_rate"] == pytest.approx(1e-3)
    assert lines[1]["lr_mm_projector"] / lines[1]["learning_rate"] == pytest.approx(0.5)


def test_the_run_describes_itself(train, tmp_path):
    train(max_steps=1, save_strategy="no")
    first = json.loads((tmp_path / "out" / "train_log.jsonl").read_text().splitlines()[0])
    assert first["kind"] == "run"
    assert first["packages"]["torch"] == torch.__version__
    assert first["git_commit"] == git_commit()
    assert first["arguments"]["reduction"]["dominant"] == 10
    assert first["arguments"]["training"]["learning_rate"] == 1e-3
    assert first["arguments"]["model"]["version"] == "v1"
    summary = json.loads((tmp_path / "out" / "run_complete.json").read_text())
    assert summary["step"] == 1 and summary["seconds_per_step"] > 0 and summary["peak_memory_mib"] > 50


def test_pictures_show_kept_tokens(train, tmp_path):
    train(max_steps=2, save_strategy="no", image_log_steps=1, image_log_count=1, captions=True)
    files = sorted((tmp_path / "out" / "overlays").glob("*.png"))
    assert [path.name for path in files] == ["step_000000_000.png", "step_000001_000.png"]
    with Image.open(files[0]) as picture:
        assert picture.width > 3 * 84
    records = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert [r["files"] for r in records if r["kind"] == "pictures"] == [[f"overlays/{path.name}"] for path in files]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_works_offline_without_a_login(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "nothing"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_wandb_login()
    with caplog.at_level(logging.WARNING):
        log = RunLog(tmp_path / "out", {"arguments": {"a": 1}}, wandb_wanted=True)
    assert log.wandb is not None and "offline" in caplog.text
    log.metrics(1, {"loss": 0.5})
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "x.png")
    log.pictures(1, [tmp_path / "out" / "x.png"])
    log.close()
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert (tmp_path / "out" / "wandb_run_id").read_text()


def test_missing_wandb_never_stops_a_run(train, tmp_path, monkeypatch, caplog):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    train(max_steps=1, save_strategy="no", report_to="wandb")
    assert "wandb is not installed" in caplog.text
    assert train_world.losses(tmp_path)


def test_wandb_that_fails_to_start_never_stops_a_run(tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", refuse)
    assert start_wandb(tmp_path, {}, None) is None
    assert "could not start (no network)" in caplog.text


def test_only_the_first_rank_writes(tmp_path):
    log = RunLog(tmp_path / "out", {}, wandb_wanted=True, active=False)
    log.metrics(1, {"loss": 1.0})
    assert not (tmp_path / "out").exists()


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path, caplog):
    log = RunLog(tmp_path / "out", {})
    (tmp_path / "out" / "train_log.jsonl").unlink()
    (tmp_path / "out" / "train_log.jsonl").mkdir()
    log.metrics(1, {"loss": 1.0})
    assert "could not be written" in caplog.text


def test_values_become_strict_json():
    assert jsonable({"a": float("nan"), 1: (torch.tensor([1, 2]), None)}) == {"a": "nan", "1": [[1, 2], None]}


def test_meter_counts_padding_tokens_and_stages():
    from duet.tracing import LayerCount

    meter = StepMeter()
    meter.count_pass([LayerCount(0, 2, [10, 0], [30, 20], 30), LayerCount(2, 4, [5, 0], [25, 20], 25)])
    meter.count_step()
    out = meter.summary(meter.vector().unsqueeze(0))
    assert out["padding_share"] == pytest.approx(10 / 60)
    assert out["visual_tokens_entering"] == 10 and out["visual_tokens_average"] == 7.5
    assert out["visual_tokens_from_layer_0"] == 10 and out["visual_tokens_from_layer_2"] == 5


def test_meter_over_ranks_adds_tokens_and_takes_the_fullest_memory():
    from duet.tracing import LayerCount

    meter = StepMeter()
    meter.count_pass([LayerCount(0, 2, [4], [10], 10)])
    meter.count_step()
    row = meter.vector()
    row[-1] = 1e6
    other = row.clone()
    other[-1] = 3e6
    out = meter.summary(torch.stack([row, other]))
    alone = meter.summary(row.unsqueeze(0))
    assert out["tokens_per_second"] == pytest.approx(2 * alone["tokens_per_second"], rel=1e-6)
    assert out["peak_memory_mb"] == 3.0 and out["visual_tokens_entering"] == 4
