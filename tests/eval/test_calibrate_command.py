"""The command that makes FitPrune's calibration, on a small random checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from runner_world import LAYERS, PATCHES, build_model, save_picture

from duet import DuetConfig
from duet.calibrate import read_calibration
from duet.methods import solve
from llava.eval import calibrate
from llava.eval.plans import run_name


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("calibrate"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate_data")
    records = []
    for number in range(5):
        save_picture(folder / "images" / f"{number}.png", number)
        turns = [{"from": "human", "value": f"<image>\nIs there a {number}?"}, {"from": "gpt", "value": "No"}]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
    records.append({"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi"}]})
    (folder / "mix.json").write_text(json.dumps(records))
    return folder


def arguments(model, data, *more):
    flags = ["--model-path", str(model), "--data-path", str(data / "mix.json"), "--device", "cpu"]
    return [*flags, "--image-folder", str(data / "images"), *more]


def test_a_calibration_serves_every_budget(model, data, capsys):
    assert calibrate.main(arguments(model, data, "--samples", "3", "--tokens", "18,12")) == 0
    path = model / calibrate.FILE_NAME
    out = capsys.readouterr().out
    assert "18 visual tokens: alpha 0." in out and out.strip().endswith(str(path))
    found = read_calibration(path)
    assert (found.layers, found.samples, found.width) == (LAYERS, 3, 32)
    assert found.about["data"] == "mix.json" and str(data) not in path.read_text()
    for tokens in (30, 18, 12):
        config = solve("fitprune", tokens, PATCHES, LAYERS, options={"calibration": str(path)})
        assert abs(config.average_tokens(PATCHES, LAYERS) - tokens) <= 0.5


def test_a_stage_after_every_layer_still_makes_a_folder_name():
    schedule = {layer: (64 - layer) / 64 for layer in range(1, 32)}
    config = DuetConfig(stage1="none", stage2="fitprune", schedule=schedule)
    name = run_name(config)
    assert name.startswith("fitprune-1x0.984-") and "31stages" in name and len(name) < 80
    assert name != run_name(replace(config, schedule=schedule | {31: 0.5}))


@torch.no_grad()
def test_prompts_are_what_the_model_would_read(model, data):
    from llava.eval.generate import Answerer
    from llava.model.builder import load_pretrained_model

    tokenizer, loaded, processor, _ = load_pretrained_model(str(model), None, "llava", device="cpu", duet_config="none")
    answerer = Answerer(loaded, tokenizer, processor, "vicuna_v1")
    questions = calibrate.choose_questions(str(data / "mix.json"), data / "images", 99, 0)
    assert len(questions) == 5 and len({text for text, _ in questions}) == 5
    assert questions != calibrate.choose_questions(str(data / "mix.json"), data / "images", 99, 1)
    prompts = calibrate.make_prompts(answerer, questions[:2])
    for (text, _), prompt in zip(questions, prompts, strict=False):
        length = len(answerer.prompt_ids(text, 1)) - 1 + PATCHES
        assert prompt["inputs_embeds"].shape == (1, length, 32) and int(prompt["visual_mask"].sum()) == PATCHES


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--tokens", "many"], "--tokens many: expected numbers between 1 and 36"),
        (["--tokens", "40"], "--tokens 40: expected numbers between 1 and 36"),
        (["--image-folder", "nowhere"], "image folder 'nowhere'"),
        (["--data-path", "nowhere.json"], "'nowhere.json' does not exist"),
        (["--model-path", "some/model"], "some/model is no folder; say where the calibration goes with --out"),
    ],
)
def test_wrong_requests_are_named(model, data, more, message, capsys):
    assert calibrate.main(arguments(model, data, *more)) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": 1, "conversations": []}], "has no record with a picture and a question"),
        ([{"id": 1, "text": "x"}], "record 0 has no list of conversations"),
    ],
)
def test_data_without_questions(model, data, tmp_path, records, message, capsys):
    (tmp_path / "mix.json").write_text(json.dumps(records))
    assert calibrate.main(arguments(model, data, "--data-path", str(tmp_path / "mix.json"))) == 1
    assert message in capsys.readouterr().err
