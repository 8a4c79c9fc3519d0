"""Models trained with several reductions from one start: runs, resuming, table, refusals."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from llava.eval.__main__ import main as evaluate
from llava.train import compare
from llava.train.arguments import parse_arguments
from llava.train.train import run as train_once

FLAGS = [
    "--max_steps",
    "2",
    "--logging_steps",
    "1",
    "--learning_rate",
    "1e-3",
    "--bf16",
    "False",
    "--dataloader_num_workers",
    "0",
]


class InProcess:
    """Carries out training and evaluation commands in the test's own process."""

    def __init__(self, devices):
        self.titles = commands

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, title, command):
        self.titles.append(title)
        module = next(part for part in command if part.startswith("llava."))
        arguments = command[command.index(module) + 1 :]
        if module == "llava.eval":
            return evaluate(arguments)
        assert module == "llava.train.train"
        train_once(parse_arguments(arguments))
        return 0


commands = []


@pytest.fixture
def small(world, tmp_path, monkeypatch):
    """The scripts' environment for the small world, and four held-out questions."""
    root = tmp_path / "eval" / "tiny"
    (root / "images" / "heldout").mkdir(parents=True)
    rows = []
    for number in range(4):
        name = f"images/heldout/{number}.png"
        Image.new("RGB", (60, 40), (50 * number, 90, 30)).save(root / name)
        rows.append({"id": f"q{number}", "image": name, "kind": "count", "question": "How many?", "answer": "a"})
    (root / "heldout.json").write_text(json.dumps(rows))
    settings = {
        "RECIPE": "7b", "LAUNCHER": "python", "NUM_DEVICES": "1", "DEEPSPEED_CONFIG": "none", "PER_DEVICE_BATCH": "2",
        "BASE_MODEL": world.model, "VISION_TOWER": world.tower, "FINETUNE_DATA": world.data[0],
        "FINETUNE_IMAGES": world.data[1], "PRETRAIN_DATA": world.captions[0], "PRETRAIN_IMAGES": world.captions[1],
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    commands.clear()
    return tmp_path


def arguments(folder, *own, flags=FLAGS):
    given = ["--root", str(folder / "eval"), "--out", str(folder / "out"), "--device", "cpu", "--workers", "0", *own]
    args = compare.make_parser().parse_args(given)
    args.flags = [*flags, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
    return args


def projector(small, world, monkeypatch):
    """A projector to start from, so that stage 1 need not run."""
    flags = [*FLAGS, "--output_dir", str(small / "stage1"), "--tune_mm_mlp_adapter", "True", "--version", "plain"]
    flags += ["--model_name_or_path", str(world.model), "--vision_tower", str(world.tower)]
    flags += ["--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", "-2", "--report_to", "none"]
    flags += ["--data_path", str(world.captions[0]), "--image_folder", str(world.captions[1])]
    train_once(parse_arguments(flags))
    monkeypatch.setenv("PROJECTOR", str(small / "stage1" / "mm_projector.bin"))


def test_every_run_is_trained_once_and_compared_with_full_tokens(small, world, monkeypatch):
    projector(small, world, monkeypatch)
    args = arguments(small, "--methods", "random", "--budgets", "12", "--seeds", "0,1")
    assert compare.run(args, InProcess) == 0
    assert [title.split(":")[0] for title in commands] == ["finetune", "evaluate"] * 4
    with open(small / "out" / "training.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["model"]) for row in rows] == [
        ("full", "seed0"), ("full", "seed1"), ("random", "seed0"), ("random", "seed1"),
    ]  # fmt: skip
    assert [float(row["tokens"]) for row in rows] == [36, 36, 12, 12]
    text = (small / "out" / "training.md").read_text()
    assert "| random | 12 |" in text and "not trained yet" not in text

    seeds = {}
    for path in sorted((small / "out").glob("seed*/random*/model-duet-finetune/config.json")):
        seeds[path.parents[2].name] = json.loads(path.read_text())["duet"]["seed"]
    assert seeds == {"seed0": 0, "seed1": 1}, "what a method draws follows the seed of the run"
    assert not list((small / "out").rglob("*.safetensors")), "weights are deleted after the evaluation"

    commands.clear()
    shutil.rmtree(next((small / "out" / "seed1").glob("random*")))
    assert compare.run(args, InProcess) == 0
    assert [title.split(":")[0] for title in commands] == ["finetune", "evaluate"], "only what is missing runs"


def test_parts_share_the_runs(small, world, monkeypatch):
    projector(small, world, monkeypatch)
    common = ["--methods", "random", "--budgets", "12", "--seeds", "0", "--keep-models"]
    assert compare.run(arguments(small, *common, "--part", "2/2"), InProcess) == 0
    assert len(commands) == 2 and not (small / "out" / "training.md").exists(), "no table without a baseline"
    weights = list((small / "out").glob("seed0/random*/*/model.safetensors"))
    assert len(weights) == 1
    with safe_open(weights[0], "pt") as file:
        assert len(list(file.keys())) > 10
    assert compare.run(arguments(small, *common, "--part", "1/2"), InProcess) == 0
    assert len(commands) == 4
    assert "| random | 12 |" in (small / "out" / "training.md").read_text()


def test_a_failed_training_stops_with_its_status(small, monkeypatch):
    monkeypatch.setenv("PROJECTOR", str(small / "none.bin"))

    class Fails(InProcess):
        def run(self, title, command):
            return 3

    Path(small / "none.bin").write_bytes(b"")
    assert compare.run(arguments(small, "--methods", "random", "--budgets", "12", "--seeds", "0"), Fails) == 1
    assert not list((small / "out").rglob(compare.DONE))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--methods", "nothing"], "unknown nothing"),
        (["--budgets", "40"], "has 36 visual tokens"),
        (["--part", "3/2"], "expected I/N"),
        (["--seeds", "x"], "whole numbers"),
    ],
)
def test_wrong_requests(small, own, message):
    methods = [] if "--methods" in own else ["--methods", "random"]
    budgets = [] if "--budgets" in own else ["--budgets", "12"]
    with pytest.raises(ValueError, match=message):
        compare.run(arguments(small, *own, *methods, *budgets), InProcess)
    assert not commands


def test_missing_data_is_said_before_anything_runs(small, monkeypatch, capsys):
    monkeypatch.setenv("FINETUNE_DATA", str(small / "none.json"))
    monkeypatch.setattr(sys, "argv", ["compare", "--out", str(small / "out"), "--methods", "random", "--budgets", "12"])
    assert compare.main() == 1
    assert "none.json" in capsys.readouterr().err


def test_a_run_that_is_too_short_to_time(tmp_path):
    log = tmp_path / "train_log.jsonl"
    log.write_text('{"kind": "metrics", "step": 1}\n')
    with pytest.raises(ValueError, match="no timed step"):
        compare.measured(log)
