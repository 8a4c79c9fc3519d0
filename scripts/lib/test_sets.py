"""Test what depends on other libraries' inner workings with further sets of versions.

    python scripts/lib/test_sets.py [SET ...] [-- PYTEST OPTIONS]

SET is ``lowest`` (the floors of pyproject.toml), ``newest`` (the registry's newest inside of the declared ranges) or
``canary`` (its newest beyond them; says in a line how that went, and fails nothing); without one, all three. This
interpreter's environment is the locked set; the others lie over it and hold only what differs. torch is the same in
all of them: it is the user's choice, and a second build would be gigabytes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tomllib

from duet.errors import main_guard

ROOT = Path(__file__).resolve().parents[2]
# Contract of the families, golden data of both packages, generation, attaching, loading, adapters.
TESTS = (
    "tests/families/test_contract.py",
    "tests/duet/test_golden_parity.py",
    "tests/duet/test_attach.py",
    "tests/duet/test_selftest.py",
    "tests/model/test_golden_llava.py",
    "tests/model/test_generate.py",
    "tests/model/test_builder.py",
)
EXTRAS = ("train", "eval", "demo", "dev")
NOT_RUN = ("torch", "ruff", "pyright")
CANARY_SECONDS = 1200


@dataclass(frozen=True)
class Declared:
    """One requirement of pyproject.toml."""

    name: str
    text: str
    floor: str | None
    ceiling: str | None


def declared() -> list[Declared]:
    """The requirements of the packages with the extras that the tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    found = []
    for text in [*project["dependencies"], *(one for extra in EXTRAS for one in optional[extra])]:
        name, floor, ceiling = (re.search(pattern, text) for pattern in (r"^[\w-]+", r">=([\d.]+)", r"<([\d.]+)"))
        if name is None:
            raise ValueError(f"pyproject.toml: {text!r} does not start with a name")
        if name[0] not in NOT_RUN:
            found.append(Declared(name[0], text, floor and floor[1], ceiling and ceiling[1]))
    return found


def wanted(name: str) -> list[str]:
    """What to ask pip for."""
    everything = declared()
    if name == "lowest":
        return [f"{one.name}=={one.floor}" for one in everything if one.floor]
    if name == "newest":
        return ["--upgrade", "--upgrade-strategy=eager", *(one.text for one in everything)]
    return ["--upgrade", *(one.name for one in everything if one.ceiling)]


class Overlay:
    """An environment that sees the packages of this interpreter behind its own."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        site = next(folder.glob("lib/python*/site-packages"))
        behind = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (site / "behind.pth").write_text("\n".join(behind) + "\n", encoding="utf-8")
        self._constraint = folder / "torch.txt"
        self._constraint.write_text(f"torch=={version('torch')}\n", encoding="utf-8")
        self._report = folder / "report.json"

    def differences(self, requirements: list[str]) -> dict[str, str]:
        """Return name and version of what pip would have to install.

        Raises:
            RuntimeError: pip finds no solution, or no registry; the message is its last line.
        """
        self._pip("--dry-run", "--report", self._report, "-c", self._constraint, *requirements)
        report = json.loads(self._report.read_text(encoding="utf-8"))
        return {one["metadata"]["name"].lower(): one["metadata"]["version"] for one in report["install"]}

    def install(self, versions: dict[str, str]) -> None:
        """Put these versions in front."""
        self._pip("--no-deps", *(f"{name}=={number}" for name, number in versions.items()))

    def test(self, options: list[str], seconds: float | None = None) -> int:
        """Run the tests; returns pytest's exit status."""
        path = os.pathsep.join([str(self.python.parent), os.environ["PATH"]])
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
        command = [self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *options]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=seconds).returncode

    def versions(self) -> str:
        """What the tests see, of the libraries that have a ceiling."""
        names = [one.name for one in declared() if one.ceiling]
        code = (
            "import sys; from importlib.metadata import version;"
            "print(*(f'{name} {version(name)}' for name in sys.argv[1:]), sep=', ')"
        )
        command = [self.python, "-c", code, *names]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def _pip(self, *arguments: object) -> None:
        command = [self.python, "-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check"]
        done = subprocess.run([*command, *map(str, arguments)], check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or "pip failed").splitlines()[-1])


def say(name: str, line: str) -> None:
    """Report on a set."""
    print(f"test-sets: {name}: {line}", flush=True)


def run(name: str, folder: Path, options: list[str]) -> bool:
    """Test one set; returns whether it is fine."""
    overlay = Overlay(folder)
    found = overlay.differences(wanted(name))
    if not found:
        say(name, f"the same as here ({overlay.versions()}); not run again")
        return True
    overlay.install(found)
    say(name, ", ".join(f"{package} {number}" for package, number in sorted(found.items())))
    status = overlay.test(options)
    say(name, f"{'passed' if status == 0 else 'FAILED'} with {overlay.versions()}")
    return status == 0


def canary(folder: Path, options: list[str]) -> None:
    """Look beyond the declared ranges, and report."""
    try:
        overlay = Overlay(folder)
        found = overlay.differences(wanted("canary"))
        beyond = {one.name for one in declared() if one.ceiling} & set(found)
        if not beyond:
            say("canary", "the registry has nothing beyond the declared ranges")
            return
        overlay.install(found)
        status = overlay.test(options, CANARY_SECONDS)
        news = ", ".join(f"{package} {found[package]}" for package in sorted(beyond))
        verdict = "passed: the ceilings can be raised" if status == 0 else "FAILED: the ceilings are needed"
        say("canary", f"{verdict}; beyond the declared ranges: {news}")
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        say("canary", f"could not be tried ({error})")


@main_guard
def main() -> int:
    """Returns the exit status."""
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    names, options = arguments[:cut] or ["lowest", "newest", "canary"], arguments[cut + 1 :]
    if unknown := set(names) - {"lowest", "newest", "canary"}:
        print(f"error: there is no set {sorted(unknown)[0]!r}; there are lowest, newest and canary", file=sys.stderr)
        return 2
    fine = True
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            if name == "canary":
                canary(Path(scratch, name), options)
                continue
            try:
                fine &= run(name, Path(scratch, name), options)
            except RuntimeError as error:
                say(name, f"FAILED, cannot be installed: {error}")
                fine = False
    return int(not fine)


if __name__ == "__main__":
    raise SystemExit(main())
