"""Any one method's file may be removed: everything else is importable, configured and runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "duet"
FILES = sorted(
    path.relative_to(PACKAGE).as_posix()
    for folder in ("stage1", "stage2")
    for path in (PACKAGE / folder).glob("*.py")
    if path.name != "__init__.py"
)

# One interpreter tries all copies, because loading torch is what takes time.
TRIAL = """
import importlib, json, pkgutil, sys
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
tower = CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=24, patch_size=4)).eval()
decoder = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=8)).eval()
pixels, embeds = torch.randn(1, 3, 24, 24), torch.randn(1, 24, 16)
visual = torch.zeros(1, 24, dtype=torch.bool)
visual[:, 3:19] = True

def trial(folder):
    for name in [name for name in sys.modules if name.split(".")[0] == "duet"]:
        del sys.modules[name]
    sys.path[0] = folder
    duet = importlib.import_module("duet")
    for module in pkgutil.walk_packages(duet.__path__, "duet."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert duet.__file__.startswith(folder), duet.__file__
    from duet.methods import METHODS, BudgetError, solve
    from duet.stage1 import VISION_REDUCERS
    from duet.stage2 import LANGUAGE_REDUCERS
    solved = 0
    for name in METHODS:
        try:
            solve(name, 192, 576, 32)
            solved += 1
        except BudgetError:
            pass
    with torch.no_grad():
        for name in VISION_REDUCERS.names():
            if getattr(VISION_REDUCERS.get(name), "reads_question", False):
                continue
            config = duet.DuetConfig(stage1=name, dominant=9, contextual=3, schedule={})
            duet.encode_vision(tower, pixels, config=config, project=lambda x: x)
        for name in LANGUAGE_REDUCERS.names():
            config = duet.DuetConfig(stage1="none", stage2=name, schedule={2: 0.5})
            duet.run_decoder(decoder, embeds, visual_mask=visual, config=config)
    def parts(method):
        drops = method.schedule or "stage2" in method.options
        return [method.stage1, method.options.get("stage2", "text_guided") if drops else "none"]

    methods = {name: parts(method) for name, method in METHODS.items()}
    reducers = {"vision": VISION_REDUCERS.names(), "language": LANGUAGE_REDUCERS.names()}
    return {"methods": methods, "solved": solved, **reducers}

sys.path.insert(0, "")
out = {}
for key, folder in json.loads(sys.argv[1]).items():
    try:
        out[key] = trial(folder)
    except Exception as error:
        out[key] = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    copies = {}
    for number, file in enumerate(["", *FILES]):
        copy = folder / str(number)
        shutil.copytree(PACKAGE, copy / "duet", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        if file:
            (copy / "duet" / file).unlink()
        copies[file] = str(copy)
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, json.dumps(copies)],
        cwd=folder, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("file", FILES)
def test_everything_else_works(trials, file):
    whole, rest = trials[""], trials[file]
    assert "error" not in rest, f"without {file}: {rest['error']}"
    kind = "vision" if file.startswith("stage1") else "language"
    other = "language" if kind == "vision" else "vision"
    assert rest[other] == whole[other] and set(rest[kind]) <= set(whole[kind])
    removed = set(whole[kind]) - set(rest[kind])
    assert removed, f"{file} registers nothing, so it is no method: it belongs outside of this folder"
    lost = {name for name, parts in whole["methods"].items() if parts[kind == "language"] in removed}
    assert lost and set(rest["methods"]) == set(whole["methods"]) - lost
    assert rest["solved"] > 10


def test_the_whole_package_has_every_method(trials):
    assert "error" not in trials[""], trials[""]
    assert len(trials[""]["methods"]) > len(trials["stage2/sparsevlm.py"]["methods"])
