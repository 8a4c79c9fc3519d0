"""`duet doctor` is green where all is right, and red by name where something is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_selftest import lose_the_cache

import duet.doctor
import llava.doctor
from duet import selftest
from llava import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(selftest, "_FAILURES", {})
    return tmp_path


def doctor(capsys):
    status = cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    return status, lines, [line for line in lines if line.startswith("FAIL")]


def test_all_is_green_here(capsys):
    status, lines, red = doctor(capsys)
    assert (status, red, lines[-1]) == (0, [], "doctor: all green")
    topics = {line[6:18].strip() for line in lines[:-1]}
    wanted = {"python", "torch", "transformers", "accelerate", "deepspeed", "peft", "devices", "kernels"}
    assert wanted | {"compile lock", "wandb", "disk", "self-test"} <= topics


def test_an_untested_version_is_red_and_named(monkeypatch, capsys):
    monkeypatch.setattr("transformers.__version__", "5.16.1")
    status, lines, red = doctor(capsys)
    assert status == 1 and lines[-1] == "doctor: 1 failed"
    assert "5.16.1 was not tested, >=5.17,<5.25 was" in red[0] and "pip install 'transformers>=5.17,<5.25'" in red[0]


def test_a_broken_decoder_is_red_and_named(monkeypatch, capsys):
    lose_the_cache(monkeypatch)
    status, _, red = doctor(capsys)
    assert status == 1 and len(red) == 2
    assert all("cached decoding" in line and "transformers" in line and "pip install" in line for line in red)


def test_a_verdict_that_was_kept_is_replaced(monkeypatch, capsys):
    monkeypatch.setattr("transformers.__version__", "5.16.1")
    with monkeypatch.context() as broken:
        lose_the_cache(broken)
        with pytest.raises(selftest.SelfTestError):
            selftest.ensure()
    doctor(capsys)
    selftest.ensure()


def test_the_library_has_a_doctor_of_its_own(capsys):
    assert duet.doctor.main([]) == 0
    assert "deepspeed" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_red(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (finding,) = duet.doctor.disk({"weights": tmp_path / "not" / "there"})
    assert finding.level == "FAIL" and str(tmp_path) in finding.text


@pytest.mark.parametrize("below", ["", "py311_cpu"])
def test_a_lock_that_a_killed_compile_left_is_told_from_one_that_is_held(own_folders, below):
    lock = own_folders / "extensions" / below / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    handle = os.open(lock, os.O_CREAT | os.O_EXCL)
    (held,) = llava.doctor.lock_findings(own_folders / "extensions")
    os.close(handle)
    (left,) = llava.doctor.lock_findings(own_folders / "extensions")
    assert str(lock) in held.text and "may be held" in held.text
    assert str(lock) in left.text and "was left by a compile that was killed" in left.text


def test_what_is_needed_to_compile_is_named(monkeypatch):
    monkeypatch.setattr(llava.doctor.shutil, "which", lambda name, **_: None)
    found = llava.doctor.deepspeed_findings()[0]
    assert found.level == "FAIL" and "ninja" in found.text and "C++ compiler" in found.text


def test_a_library_that_cannot_be_imported_is_named_with_the_remedy(tmp_path):
    """An old transformers beside new companions fails at its own import, before the doctor could look."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('huggingface-hub<2.0 is required')\n")
    (tmp_path / "transformers-5.16.1.dist-info").mkdir()
    (tmp_path / "transformers-5.16.1.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 5.16.1\n")
    done = subprocess.run(
        [sys.executable, "-m", "llava.cli", "doctor"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0
    assert "transformers 5.16.1 (tested: >=5.17,<5.25): huggingface-hub<2.0 is required. Remedy: install" in last
