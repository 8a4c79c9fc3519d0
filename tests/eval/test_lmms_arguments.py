"""What `llava.eval.lmms` does without lmms-eval: arguments, pictures, the entry point, and what it says then."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from PIL import Image

from duet import DuetConfig
from llava.eval import lmms
from llava.reduction import ReductionArguments

ROOT = Path(__file__).resolve().parents[2]


def test_reduction_flags_are_those_of_the_command_line():
    given = {"duet_tokens": 192, "queries": "salient"}  # lmms-eval turns numbers and True into values
    assert lmms.parse_reduction(given) == ReductionArguments(duet_tokens=192, queries="salient")
    lists = {"dominant": 60, "contextual": 5, "layer_list": "[4,6]", "image_token_ratio_list": "[0.5,0.0]"}
    config = lmms.parse_reduction(lists).to_config()
    assert config == DuetConfig(dominant=60, contextual=5, schedule={4: 0.5, 6: 0.0})
    assert lmms.parse_reduction({"dominant_num": 9}).dominant == 9
    assert lmms.parse_reduction({"use_salient_tokens": True}).use_salient_tokens is True
    assert lmms.parse_reduction({}) == ReductionArguments()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dominate": 3}, "unknown in --model_args: --dominate=3; the reduction's names are dominant, contextual"),
        ({"dominant": "many"}, "--dominant.*invalid int value: 'many'"),
        ({"use_salient_tokens": "perhaps"}, "use_salient_tokens.*neither True nor False"),
        ({"domin": 3}, "unknown in --model_args: --domin=3"),
    ],
)
def test_wrong_arguments_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        lmms.parse_reduction(given)


def test_generation_settings():
    greedy = {"num_beams": 1, "max_new_tokens": 1024, "use_cache": True, "do_sample": False}
    assert lmms.decoding({}) == greedy
    task = {"until": ["\n\n"], "image_aspect_ratio": "original", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 16}
    assert lmms.decoding(task) == greedy | {"max_new_tokens": 16}
    sampled = lmms.decoding({"temperature": 0.7, "top_p": 0.9, "num_beams": 2})
    assert sampled == greedy | {"num_beams": 2, "do_sample": True, "temperature": 0.7, "top_p": 0.9}


def test_pictures_of_a_document(tmp_path):
    assert lmms.pictures_of(None, "t") == lmms.pictures_of([], "t") == []
    grey = Image.new("L", (4, 3), 7)
    (found,) = lmms.pictures_of([grey], "t")
    assert found.mode == "RGB" and found.getpixel((0, 0)) == (7, 7, 7)
    frames = [Image.new("RGB", (4, 4), (40 * i, 0, 0)) for i in range(4)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    assert len(lmms.pictures_of([str(tmp_path / "clip.gif")], "t")) == 8
    with pytest.raises(ValueError, match=r"task 'audio' gave a dict; expected pictures, or paths of videos"):
        lmms.pictures_of([{"array": []}], "audio")


@pytest.mark.parametrize("ask", [lmms.manifest, lmms._model_class.__wrapped__])
def test_without_lmms_eval_the_message_says_what_to_install(ask, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval"] or ["lmms_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"lmms-eval is not installed; pip install -e '.\[lmms\]'"):
        ask()


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = lmms.Nothing


def test_the_entry_point_leads_to_the_manifest():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split('[project.entry-points."lmms_eval.models"]\n')[1].split("\n[")[0]
    name, value = (part.strip().strip('"') for part in section.strip().split("="))
    entry = EntryPoint(name=name, value=value, group="lmms_eval.models")
    assert name == lmms.MODEL and entry.load() is lmms.manifest
