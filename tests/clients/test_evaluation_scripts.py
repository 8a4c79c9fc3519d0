"""LLaVA's evaluation scripts run without arguments, and with another model; every command they give can be read.

A stand-in for the interpreter writes down what it is called with.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "v1_5" / "eval"
DEFAULT = "liuhaotian/llava-v1.5-13b"
OURS = ("all", "gqa", "mme", "msrvtt", "msvd", "pope", "seed", "sqa", "textvqa", "tgif")
LLAVAS = {
    "vqav2": ["llava.eval.model_vqa_loader", "scripts/convert_vqav2_for_submission.py"],
    "vizwiz": ["llava.eval.model_vqa_loader", "scripts/convert_vizwiz_for_submission.py"],
    "mmbench": ["llava.eval.model_vqa_mmbench", "scripts/convert_mmbench_for_submission.py"],
    "mmbench_cn": ["llava.eval.model_vqa_mmbench", "scripts/convert_mmbench_for_submission.py"],
    "mmvet": ["llava.eval.model_vqa", "scripts/convert_mmvet_for_eval.py"],
    "llavabench": ["llava.eval.model_vqa", "llava.eval.eval_gpt_review_bench", "llava.eval.summarize_gpt_review"],
    "qbench": ["llava.eval.model_vqa_qbench"],
    "qbench_zh": ["llava.eval.model_vqa_qbench"],
}
STAND_IN = """#!{python}
import json, pathlib, sys
words = sys.argv[1:]
with open({out!r}, "a") as file:
    file.write(json.dumps(words) + "\\n")
if "--answers-file" in words:
    answers = pathlib.Path(words[words.index("--answers-file") + 1])
    answers.parent.mkdir(parents=True, exist_ok=True)
    answers.write_text(words[words.index("--chunk-idx") + 1] if "--chunk-idx" in words else "")
raise SystemExit({status} if {failing!r} in words else 0)
"""


def commands_of(name, folder, *arguments, status=0, failing="", **environment):
    """The commands that a script gives to its interpreter, and how it ends."""
    out, python = folder / "commands.jsonl", folder / "python"
    out.unlink(missing_ok=True)
    python.write_text(STAND_IN.format(python=sys.executable, out=str(out), status=status, failing=failing))
    python.chmod(0o755)
    dropped = ("MODEL_PATH", "CKPT", "CUDA_VISIBLE_DEVICES")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env |= {"DUET_PYTHON": str(python), "EVAL_ROOT": str(folder / "eval"), "NUM_DEVICES": "1"} | environment
    done = subprocess.run(
        ["bash", str(FOLDER / f"{name}.sh"), *arguments], env=env, cwd=folder, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    return [json.loads(line) for line in out.read_text().splitlines()], done


def value(words, flag):
    """A flag's value; of several the last one, as argparse takes it."""
    return words[len(words) - 1 - words[::-1].index(flag) + 1]


def read(words, monkeypatch):
    """Let the module or script that a command names read its flags."""
    if words[0] == "-m":
        module, flags = importlib.import_module(words[1]), words[2:]
    else:
        monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        module, flags = importlib.import_module(Path(words[0]).stem), words[1:]
    for name in ("make_parser", "get_args", "parse_args"):
        function = getattr(module, name, None)
        if function is not None:
            return function().parse_args(flags) if name == "make_parser" else function(flags)
    return None


@pytest.mark.parametrize("name", OURS)
def test_our_scripts_have_llavas_model_inside(name, tmp_path, monkeypatch):
    (words,), done = commands_of(name, tmp_path)
    assert done.returncode == 0, done.stderr
    args = read(["-m", "llava.eval.__main__", *words[2:]], monkeypatch)
    assert words[:2] == ["-m", "llava.eval"] and args.model_path == DEFAULT
    (words,), _ = commands_of(name, tmp_path, "--model-path", "other", MODEL_PATH="third")
    assert read(["-m", "llava.eval.__main__", *words[2:]], monkeypatch).model_path == "other"
    (words,), _ = commands_of(name, tmp_path, MODEL_PATH="third")
    assert read(["-m", "llava.eval.__main__", *words[2:]], monkeypatch).model_path == "third"


@pytest.mark.parametrize(("name", "called"), LLAVAS.items(), ids=LLAVAS)
def test_llavas_scripts_run_without_arguments(name, called, tmp_path, monkeypatch):
    commands, done = commands_of(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [words[1] if words[0] == "-m" else words[0] for words in commands] == called
    for words in commands:
        read(words, monkeypatch)
    assert value(commands[0], "--model-path") == DEFAULT
    commands, _ = commands_of(name, tmp_path, "--model-path", "models/mine", "--device", "cpu")
    assert value(commands[0], "--model-path") == "models/mine" and value(commands[0], "--device") == "cpu"
    if len(commands) > 1:
        assert any("mine" in word for word in commands[-1])


def test_the_parts_of_vqav2_are_joined_in_order(tmp_path):
    commands, done = commands_of("vqav2", tmp_path, CUDA_VISIBLE_DEVICES="3,5")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "eval" / "vqav2" / "answers" / "llava_vqav2_mscoco_test-dev2015" / "llava-v1.5-13b"
    assert (folder / "merge.jsonl").read_text() == "01"
    assert sorted(value(words, "--chunk-idx") for words in commands[:2]) == ["0", "1"]
    assert {value(words, "--num-chunks") for words in commands[:2]} == {"2"}


def test_a_failed_part_is_not_submitted(tmp_path):
    commands, done = commands_of("vqav2", tmp_path, status=2, failing="--chunk-idx")
    assert done.returncode == 1 and "part 0 of 1 failed" in done.stderr and len(commands) == 1
    commands, done = commands_of("vizwiz", tmp_path, status=2, failing="llava.eval.model_vqa_loader")
    assert done.returncode == 2 and len(commands) == 1


def test_qbench_takes_its_split_first(tmp_path):
    (words,), _ = commands_of("qbench", tmp_path, "test", "--model-path", "m")
    assert value(words, "--questions-file").endswith("/llvisionqa_test.json") and value(words, "--model-path") == "m"
    (words,), _ = commands_of("qbench_zh", tmp_path)
    assert value(words, "--questions-file").endswith("/质衡-问答-验证集.json") and value(words, "--lang") == "zh"
