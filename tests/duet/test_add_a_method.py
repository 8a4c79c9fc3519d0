"""docs/add-a-method.md is true: its two files, outside of the packages, work by name everywhere."""

import csv
import re
import sys
from pathlib import Path

import pytest
import small
import torch

import duet
from duet import DuetConfig
from duet.methods import METHODS, solve
from duet.stage1 import VISION_REDUCERS
from duet.stage2 import LANGUAGE_REDUCERS
from llava import cli

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "eval"))
import runner_world  # noqa: E402

NAMES = ("my_vision", "my_language")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The guide's files, and registries that forget them afterwards."""
    text = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- file: (\w+)\.py -->\n```python\n(.*?)```", text, re.DOTALL)
    assert {name for name, _ in found} == set(NAMES)
    for registry in (VISION_REDUCERS, LANGUAGE_REDUCERS):
        registry.names()
        for store in ("_entries", "_options"):
            monkeypatch.setattr(registry, store, dict(getattr(registry, store)))
    methods = dict(METHODS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield [str(_written(tmp_path / f"{name}.py", [code for of, code in found if of == name])) for name in NAMES]
    METHODS.clear()
    METHODS.update(methods)
    for name in NAMES:
        sys.modules.pop(name, None)


def _written(path, parts):
    path.write_text("\n\n".join(parts))
    return path


def imports(files):
    return [part for file in files for part in ("--import", file)]


@torch.no_grad()
def test_by_name_through_attach(files):
    for file in files:
        cli.load_methods(file)
    config = DuetConfig(stage1="mine", stage2="theirs", dominant=12, contextual=0, schedule={3: 0.5})
    model = small.build()
    duet.attach(model, config)
    with duet.trace() as trace:
        logits = model(**small.mixed_batch("left")).logits
    assert logits.isfinite().all() and trace.images[0].source == list(range(0, 36, 3))
    assert [(segment.visual, segment.stop) for segment in trace.passes[0]] == [([12, 0, 24], 3), ([6, 0, 12], 6)]
    alone = model(**small.mixed_singles()[0]).logits[0, -1]
    assert torch.allclose(logits[0, -1], alone, atol=1e-5)
    duet.detach(model)


def test_its_options_and_its_row_are_known(files):
    for file in files:
        cli.load_methods(file)
    assert DuetConfig(stage1="mine", options={"offset": 2}).option("offset") == 2
    config = solve("mine-early", 128, 576, 32)
    assert (config.stage1, config.stage2, list(config.schedule)) == ("mine", "theirs", [2])
    assert abs(config.average_tokens(576, 32) - 128) <= 0.5


def test_by_name_on_the_command_line(files, tmp_path, monkeypatch):
    monkeypatch.setattr("llava.eval.tasks.pope.Pope.max_new_tokens", 2)
    world = runner_world.build_world(tmp_path / "world")
    some = ("--limit-pictures", 2)
    one = ("--reduce", "mine+theirs", "--dominant", 12, "--contextual", 0, "--name", "one")
    assert cli.main([*imports(files), "eval", *runner_world.flags(world, tmp_path / "a", *some, *one)]) == 0
    assert runner_world.only(tmp_path / "a", "*.result.json").parent.name == "one"
    several = ("--methods", "mine+theirs,mine+none,visionzip+theirs,mine-early", "--budgets", "12")
    assert cli.main([*imports(files), "compare", *runner_world.flags(world, tmp_path / "b", *some, *several)]) == 0
    with open(tmp_path / "b" / "compare.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"full", "mine+theirs", "mine+none", "visionzip+theirs", "mine-early"}
    assert all(abs(float(row["tokens"]) - 12) <= 0.5 for name, row in rows.items() if name != "full")
    assert rows["mine+theirs"]["run"].startswith("mine-") and "-theirs-" in rows["mine+theirs"]["run"]


def test_without_the_files_the_names_are_unknown():
    with pytest.raises(ValueError, match="unknown vision reducer 'mine'"):
        DuetConfig(stage1="mine")
    with pytest.raises(ValueError, match="unknown method 'mine-early'"):
        solve("mine-early", 128, 576, 32)
