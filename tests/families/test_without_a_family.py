"""Any one family's file may be removed: the others attach and run, and the error for its models says so."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "duet"
FILES = sorted(
    path.name
    for path in (PACKAGE / "families").glob("*.py")
    if "FAMILIES.register(" in path.read_text(encoding="utf-8")
)
FILES.remove("__init__.py")  # its docstring shows how to register

# One interpreter tries all copies, because loading torch is what takes time.
TRIAL = """
import importlib, json, sys
folders, tests, package = json.loads(sys.argv[1])
sys.path[:0] = ["", tests]
sys.path.insert(1, package)
import torch
import models, qwen_models
made = {}
for name, case in (models.CASES | qwen_models.CASES).items():
    model = case.build()
    made[name] = model, case.batch(model), case.config.to_dict()

def trial(folder):
    for name in [name for name in sys.modules if name.split(".")[0] == "duet"]:
        del sys.modules[name]
    sys.path[0] = folder
    duet = importlib.import_module("duet")
    assert duet.__file__.startswith(folder), duet.__file__
    out = {}
    for name, (model, inputs, config) in made.items():
        try:
            with duet.attach(model, duet.DuetConfig.from_dict(config)), torch.no_grad():
                out[name] = bool(model(**inputs).logits.isfinite().all())
        except ValueError as error:
            out[name] = str(error)
    return out

found = {}
for key, folder in folders.items():
    try:
        found[key] = trial(folder)
    except Exception as error:
        found[key] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    copies = {}
    for file in ["", *FILES]:
        copy = folder / (file or "whole")
        shutil.copytree(PACKAGE, copy / "duet", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        if file:
            (copy / "duet" / "families" / file).unlink()
        copies[file] = str(copy)
    argument = json.dumps([copies, str(Path(__file__).parent), str(ROOT)])
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRIAL, argument], capture_output=True, text=True, env=environment,
        cwd=folder,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_family_runs_from_the_whole_package(trials):
    assert set(trials[""].values()) == {True}
    assert {f"{name}.py" for name in trials[""]} == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_the_others_run_without(file, trials):
    found = dict(trials[file])
    message = found.pop(file.removesuffix(".py"))
    assert "does not know" in message and "docs/add-a-family.md" in message
    assert set(found.values()) == {True}
