"""Public names, signatures and flags change only on purpose, and say what they take."""

import importlib
import inspect
import json
import re

import interfaces
import pytest
import torch

import duet

FROZEN = json.loads(interfaces.FROZEN.read_text(encoding="utf-8"))
HINT = "if this is meant, run `python tests/structure/interfaces.py` and let the diff be reviewed"


@pytest.fixture(scope="module")
def now():
    return interfaces.current()


@pytest.mark.parametrize("name", sorted(FROZEN["duet"]))
def test_signatures_of_duet(name, now):
    assert now["duet"].get(name) == FROZEN["duet"][name], HINT


@pytest.mark.parametrize("group", sorted(FROZEN["flags"]))
def test_flags_and_their_defaults(group, now):
    assert now["flags"].get(group) == FROZEN["flags"][group], HINT


def test_nothing_public_is_missing_from_the_frozen_list(now):
    assert {part: sorted(now[part]) for part in now} == {part: sorted(FROZEN[part]) for part in FROZEN}, HINT


@pytest.mark.parametrize("module", sorted(FROZEN["llava"]))
def test_the_names_that_llava_clients_import(module):
    loaded = importlib.import_module(module)
    missing = [name for name in FROZEN["llava"][module] if not hasattr(loaded, name)]
    assert not missing, f"{module} lacks {missing}"


def tensor_functions():
    for name in duet.__all__:
        thing = getattr(duet, name)
        if inspect.isfunction(thing):
            annotations = " ".join(str(a) for a in thing.__annotations__.values())
            if "Tensor" in annotations or torch.Tensor in thing.__annotations__.values():
                yield name, thing


@pytest.mark.parametrize("name", duet.__all__)
def test_public_names_have_docstrings(name):
    text = inspect.getdoc(getattr(duet, name)) or ""
    assert len(text.split()) >= 8, f"duet.{name} says too little"


@pytest.mark.parametrize(("name", "function"), list(tensor_functions()))
def test_tensor_functions_state_shapes_errors_and_source(name, function):
    text = inspect.getdoc(function) or ""
    assert re.search(r"\[[A-Z0-9]", text), f"duet.{name} gives no shape such as [B, N, D]"
    if re.search(r"^\s+raise \w", inspect.getsource(function), re.MULTILINE):
        assert "Raises:" in text, f"duet.{name} raises and does not say so"
    assert "Source:" in text or name == "causal_lm_loss", f"duet.{name} does not say where in the paper it comes from"


def test_there_are_tensor_functions():
    assert {name for name, _ in tensor_functions()} >= {"encode_vision", "run_decoder", "causal_lm_loss"}
