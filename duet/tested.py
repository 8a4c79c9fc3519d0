"""Which versions of the libraries were tested whose inner workings the packages rely on, and which are installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

RANGES = {
    "torch": ">=2.6,<2.15",
    "transformers": ">=5.17,<5.25",
    "accelerate": ">=1.10,<1.16",
    "deepspeed": ">=0.18,<0.20",
    "peft": ">=0.18,<0.22",
}
"""What pyproject.toml declares of them; a test compares the two."""


def installed(name: str) -> str | None:
    """Return a library's version: of what is imported, else of what would be; None where it is not installed."""
    imported = getattr(sys.modules.get(name), "__version__", None)
    if imported is not None:
        return str(imported)
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_tested(name: str, number: str) -> bool:
    """Return whether a version is inside of the tested range; builds of it (``+cu128``, ``+rocm7``) count as it."""
    try:
        return SpecifierSet(RANGES[name]).contains(Version(number), prereleases=True)
    except InvalidVersion:
        return False


def outside(names: Iterable[str] = tuple(RANGES)) -> dict[str, str]:
    """Return the libraries that are installed in a version that was not tested, with that version."""
    found = {name: installed(name) for name in names}
    return {name: number for name, number in found.items() if number is not None and not is_tested(name, number)}


def described(versions: dict[str, str]) -> str:
    """Return one phrase with libraries, versions and tested ranges."""
    return ", ".join(f"{name} {number} (tested: {RANGES[name]})" for name, number in versions.items())


def remedy(names: Iterable[str]) -> str:
    """Return what to type to get tested versions."""
    wishes = " ".join(f"'{name}{RANGES[name]}'" for name in names)
    return f"install tested versions: pip install {wishes} (in a checkout: make setup)"


def explained(error: Exception) -> str:
    """Return what to say of an import that failed: the versions, the error, and what to type."""
    names = ("torch", "transformers")
    untested = outside(names) or {name: installed(name) or "(not installed)" for name in names}
    return f"duet cannot be imported with {described(untested)}: {error}. Remedy: {remedy(untested)}"
