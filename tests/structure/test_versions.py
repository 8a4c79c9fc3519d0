"""What may be installed: declared ranges, the locked versions, and the sets that CI tests."""

import re
import sys

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from structure_helpers import ROOT

from duet import tested

sys.path.insert(0, str(ROOT / "scripts" / "lib"))

import test_sets

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = [
    Requirement(text)
    for text in [
        *PROJECT["dependencies"],
        *(one for group in PROJECT["optional-dependencies"].values() for one in group),
    ]
]
LOCKS = sorted((ROOT / "scripts" / "lib").glob("locked-*.txt"))
INSIDE = ("torch", "transformers", "accelerate", "deepspeed", "peft")  # whose inner workings the packages rely on


def pins(lock):
    lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.+!]+", line) for line in lines), "names, ==, versions only"
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_libraries_that_we_reach_into_have_a_floor_and_a_ceiling():
    for name in INSIDE:
        operators = sorted(one.operator for wish in DECLARED if wish.name == name for one in wish.specifier)
        assert operators == ["<", ">="], name


def test_everything_declared_has_a_floor():
    assert not [str(wish) for wish in DECLARED if ">=" not in {one.operator for one in wish.specifier}]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_locked_versions_are_declared_ones(lock):
    locked = pins(lock)
    for wish in DECLARED:
        name = wish.name.lower()
        if name in locked:
            assert wish.specifier.contains(locked[name]), f"{lock.name}: {name}=={locked[name]}, declared {wish}"
    missing = {one.name for one in test_sets.declared()} - set(locked)
    assert not missing, f"{lock.name} leaves {missing} open; run `make lock`"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_leaves_torch_to_the_user(lock):
    """Neither torch nor what its builds bring or pin: the file serves every accelerator."""
    found = pins(lock)
    assert not [
        n for n in found if re.match(r"torch|triton|nvidia|cuda|pytorch|sympy$|mpmath$|networkx$|setuptools$", n)
    ]


def test_there_is_a_lock_for_linux():
    assert "locked-linux-py3.11.txt" in [path.name for path in LOCKS]


def test_the_sets_run_files_that_exist():
    assert not [name for name in test_sets.TESTS if not (ROOT / name).is_file()]


def test_the_lowest_set_takes_the_floors_and_the_newest_the_ranges():
    lowest, newest = test_sets.wanted("lowest"), test_sets.wanted("newest")
    floors = {wish.name: one.version for wish in DECLARED for one in wish.specifier if one.operator == ">="}
    for one in test_sets.declared():
        assert f"{one.name}=={floors[one.name]}" in lowest
        assert one.text in newest
    assert {"transformers", "accelerate", "deepspeed", "peft"} <= set(test_sets.wanted("canary"))
    assert not [wish for wish in [*lowest, *newest, *test_sets.wanted("canary")] if wish.startswith("torch")]


def test_without_a_registry_the_canary_says_so_and_fails_nothing(monkeypatch, capsys, tmp_path):
    def refuse(*_):
        raise RuntimeError("no route to the registry")

    monkeypatch.setattr(test_sets.Overlay, "__init__", refuse)
    test_sets.canary(tmp_path, [])
    assert "canary: could not be tried (no route to the registry)" in capsys.readouterr().out


def test_the_tested_torch_is_inside_of_the_range():
    (version,) = re.findall(r"torch==([\d.]+)\}", (ROOT / "scripts" / "lib" / "setup.sh").read_text(encoding="utf-8"))
    (wish,) = [wish for wish in DECLARED if wish.name == "torch"]
    assert wish.specifier.contains(version)


def test_the_doctor_judges_by_what_is_declared():
    assert set(tested.RANGES) == set(INSIDE)
    for name, text in tested.RANGES.items():
        assert [wish.specifier for wish in DECLARED if wish.name == name] == [SpecifierSet(text)], name
