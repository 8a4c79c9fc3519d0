"""The README's commands and examples run as they are printed (with a small model in place of the 7B one)."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "structure"))

from readme_page import blocks, lines  # noqa: E402

from llava.train import plan  # noqa: E402

HUB_MODEL = "llava-hf/llava-1.5-7b-hf"
GOLDEN = ROOT / "tests" / "golden"
AVERAGE = {"192": "191.75", "64": "63.75"}


def test_the_first_command_starts():
    """Through bash and the launcher; the other scripts differ in one word (below). tests/train carries plans out."""
    line = lines("plan")[0]
    env = os.environ | {"DUET_PYTHON": sys.executable}
    done = subprocess.run(
        [*shlex.split(line), "--plan"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "plan: finetune_duet" in done.stdout
    assert "191.75 on average" in done.stdout


@pytest.mark.parametrize("line", lines("plan")[1:])
def test_scripts_plan(line, monkeypatch, capsys):
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    script, *rest = [word for word in words if word.split("=")[0] not in variables and word != "bash"]
    job = Path(script).stem
    assert f'launch.sh" {job} "$@"' in (ROOT / script).read_text()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    assert plan.main([job, "--plan", *(word for word in rest if word != "--plan")]) == 0
    printed = capsys.readouterr().out
    assert f"plan: {job}" in printed
    assert re.search(r"recipe\s+7b", printed)
    assert "optimizer steps" in printed
    expected = AVERAGE[variables.get("DUET_TOKENS", "192")] if "duet" in job else "no reduction"
    assert expected in printed


@pytest.fixture(scope="module")
def small_hub_model(tmp_path_factory):
    """A model with the geometry of the one in the README, and random weights."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = tmp_path_factory.mktemp("hub") / "model"
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = LlavaProcessor(
        image, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=32, num_attention_heads=2, vocab_size=len(tokenizer)
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_python_examples(small_hub_model, tmp_path, monkeypatch, capsys):
    shutil.copy(GOLDEN / "images" / "coffee.png", tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        assert HUB_MODEL in block["text"] or names, "the first example loads the model"
        exec(block["text"].replace(HUB_MODEL, str(small_hub_model)), names)
    assert "191.8 visual tokens per layer" in capsys.readouterr().out
    assert (tmp_path / "kept.png").stat().st_size > 1000


@pytest.mark.parametrize("line", lines("model"))
def test_asking_commands(line, tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "golden")
    shutil.copy(GOLDEN / "images" / "coffee.png", tmp_path / "picture.jpg")
    command = shlex.split(line.replace("MODEL", "llava_tiny"))
    command[0] = sys.executable
    command += ["--device", "cpu", "--max_new_tokens" if "run_llava" in line else "--max-new-tokens", "4"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    work = tmp_path / "golden"
    shutil.copy(tmp_path / "picture.jpg", work / "picture.jpg")
    done = subprocess.run(
        command, cwd=work, env=env, capture_output=True, text=True, check=False, timeout=300, input="What is this?\n\n"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_evaluation_commands(tmp_path):
    """On the tiny world's export of the benchmarks, which have the real layouts."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("-m", "playground.tiny.export_eval", "--out", "playground/data/eval", "--images", "4", "--workers", "1")
    shutil.copytree(GOLDEN, tmp_path / "golden")
    for line in lines("eval"):
        words = shlex.split(line.replace("MODEL", "golden/llava_tiny"))[1:]
        out = run(*words, *(["--device", "cpu", "--workers", "0"] if "--model-path" in words else []))
    assert all(name in out for name in ("POPE", "GQA", "TextVQA", "MME", "SEED", "191.7", "| full"))
