"""Whole clients of LLaVA: its README's quick start, its Cog predictor, and VLMEvalKit's `LLaVA`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path

import pytest
import tomllib
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.run_llava import eval_model
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).parents[2]
CHECKPOINT = str(ROOT / "tests" / "golden" / "llava_tiny")
PICTURES = [str(ROOT / "tests" / "golden" / "images" / name) for name in ("coffee.png", "astronaut.png")]
QUESTION = "What is in the cup?"


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained_model(CHECKPOINT, None, "llava-v1.5-tiny")


@pytest.fixture(scope="module")
def greedy(loaded):
    """What the model says to the question with the first picture, by the shortest way."""
    tokenizer, model, image_processor, _ = loaded
    prompt = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the human's questions. USER: <image>\n{QUESTION} ASSISTANT:"
    )
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = process_images([Image.open(PICTURES[0]).convert("RGB")], image_processor, model.config)
    output = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=8)
    return tokenizer.decode(output[0], skip_special_tokens=True).strip()


def test_the_quick_start_of_llavas_readme(greedy, capsys):
    tokenizer, model, image_processor, context_len = load_pretrained_model(
        model_path=CHECKPOINT, model_base=None, model_name=get_model_name_from_path(CHECKPOINT)
    )
    assert image_processor is not None and context_len == 2048 and tokenizer and model
    args = type(
        "Args",
        (),
        {
            "model_path": CHECKPOINT,
            "model_base": None,
            "model_name": "llava-v1.5-tiny",
            "query": QUESTION,
            "conv_mode": None,
            "image_file": PICTURES[0],
            "sep": ",",
            "temperature": 0,
            "top_p": None,
            "num_beams": 1,
            "max_new_tokens": 8,
        },
    )()
    eval_model(args)
    assert capsys.readouterr().out.strip() == greedy


@pytest.fixture
def predictor(monkeypatch):
    """`predict.py`, with a stand-in for the package cog, which only Cog's own containers have."""
    cog = types.ModuleType("cog")
    cog.BasePredictor, cog.Path, cog.ConcatenateIterator = object, Path, list
    cog.Input = lambda **about: about.get("default")
    monkeypatch.setitem(sys.modules, "cog", cog)
    spec = importlib.util.spec_from_file_location("predict_under_test", ROOT / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_predictor_of_cog_streams_the_answer(predictor, loaded, greedy, monkeypatch):
    monkeypatch.setattr(predictor, "load_pretrained_model", lambda *args, **kwargs: loaded)
    monkeypatch.setenv("LLAVA_MODEL", "somewhere/llava-v1.5-tiny")
    service = predictor.Predictor()
    service.setup()
    texts = list(service.predict(Path(PICTURES[0]), QUESTION + "<image>", 1.0, 0.0, 8))
    assert "".join(texts).strip() == greedy and len(texts) > 1
    with pytest.raises(ValueError, match="cannot be read"):
        list(service.predict(ROOT / "README.md", QUESTION, 1.0, 0.0, 8))


def test_what_goes_wrong_while_generating_is_raised(predictor, loaded, monkeypatch):
    monkeypatch.setattr(predictor, "load_pretrained_model", lambda *args, **kwargs: loaded)
    service = predictor.Predictor()
    service.setup()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(predictor, "answer", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(service.predict(Path(PICTURES[0]), QUESTION, 1.0, 0.0, 8))


@pytest.mark.parametrize("pieces", [["a b", "c###d"], ["a b", "c#", "##", "d"], ["a bc", "#", "#x", "###"]])
def test_a_stream_ends_at_the_stop_string(predictor, pieces):
    whole = "".join(pieces).split("###")[0]
    assert "".join(predictor.until("###", iter(pieces))) == whole
    assert "".join(predictor.until(None, iter(pieces))) == "".join(pieces)


def test_cog_installs_what_the_package_requires():
    import yaml

    cog = yaml.safe_load((ROOT / "cog.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cog["build"]["python_packages"] == project["dependencies"]
    assert cog["predict"] == "predict.py:Predictor"


def test_the_calls_of_vlmevalkit(loaded, greedy):
    """`device_map="cpu"`, padding asked for by a bare namespace, half precision, a stop criterion."""
    tokenizer, model, image_processor, _ = load_pretrained_model(
        model_path=CHECKPOINT, model_base=None, model_name="llava-v1.5-tiny", device_map="cpu"
    )
    ask = Namespace()
    ask.image_aspect_ratio = "pad"
    options = {
        "do_sample": False,
        "temperature": 0,
        "max_new_tokens": 8,
        "top_p": None,
        "num_beams": 1,
        "use_cache": True,
    }
    for pictures in ([], PICTURES[:1], PICTURES):
        prompt = "S. USER: " + " <image> " * len(pictures) + QUESTION + " ASSISTANT:"
        pixels = None
        if pictures:
            images = [Image.open(path).convert("RGB") for path in pictures]
            pixels = process_images(images, image_processor, ask).to(dtype=torch.float16)
        ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
        stop = KeywordsStoppingCriteria(["</s>"], tokenizer, ids)
        with torch.inference_mode():
            output = model.generate(ids, images=pixels, stopping_criteria=[stop], **options)
        text = tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
        assert text and QUESTION not in text


def test_vlmevalkit_itself():
    """The real class in a process of its own, where VLMEvalKit is: installed, or a folder that VLMEVALKIT names."""
    spec = importlib.util.find_spec("vlmeval")
    folder = os.environ.get("VLMEVALKIT") or (spec and spec.origin and str(Path(spec.origin).parents[1]))
    if not folder:
        pytest.skip("VLMEvalKit is not here: VLMEVALKIT=<checkout> names one")
    command = [sys.executable, str(Path(__file__).with_name("run_vlmevalkit.py")), folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 5, done.stderr[-2000:]
