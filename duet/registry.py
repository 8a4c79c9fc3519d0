"""A registry by name: one file in a package registers one entry, and nothing else has to change."""

from __future__ import annotations

import importlib
import pkgutil
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_NAME = re.compile(r"^[a-z][a-z0-9_.-]*$")


class Registry(Generic[T]):
    """Named entries of one kind, found by importing every module of a package.

    Args:
        kind: what an entry is, in words; used in error messages.
        package: the package whose modules register the entries; imported at the first look-up.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}
        self._options: dict[str, dict[str, Any]] = {}
        self._checks: dict[str, Callable[[Any], None]] = {}
        self._discovered = self._discovering = False
        self._lock = threading.RLock()  # threads that come at once wait until all is there

    def register(
        self, name: str, options: Mapping[str, Any] | None = None, check: Callable[[Any], None] | None = None
    ) -> Callable[[T], T]:
        """Return a decorator that stores its argument under ``name``.

        Args:
            name: lower case; words are joined by ``_``, ``-`` or ``.``.
            options: settings that only this entry knows (``DuetConfig.options``), each with its default: a number, a
                boolean, a string, or a tuple of strings of which the first is the default and the others may be chosen.
            check: raises ValueError for a ``DuetConfig`` that this entry cannot work with.

        Raises:
            ValueError: the name is malformed or already taken.
        """
        if not isinstance(name, str) or not _NAME.match(name):
            raise ValueError(f"{self.kind} name {name!r} must be lower case and start with a letter")

        def add(entry: T) -> T:
            if name in self._entries and self._entries[name] is not entry:
                raise ValueError(f"{self.kind} {name!r} is already registered by {self._entries[name]!r}")
            self._entries[name] = entry
            self._options[name] = dict(options or {})
            if check is not None:
                self._checks[name] = check
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the entry called ``name``.

        Raises:
            ValueError: there is none; the message lists the known names.
        """
        self._discover()
        if not isinstance(name, str) or name not in self._entries:
            raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}")
        return self._entries[name]

    def options(self, name: str) -> dict[str, Any]:
        """Return the options that the entry called ``name`` declares, as ``register`` got them.

        Raises:
            ValueError: there is no such entry.
        """
        self.get(name)
        return dict(self._options[name])

    def check(self, name: str, config: Any) -> None:
        """Raise ValueError if there is an entry called ``name`` and it cannot work with a configuration."""
        self._discover()
        if name in self._checks:
            self._checks[name](config)

    def names(self) -> list[str]:
        """Return all registered names in alphabetical order."""
        self._discover()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[T]:
        self._discover()
        return iter(list(self._entries.values()))

    def _discover(self) -> None:
        if self._discovered:
            return
        with self._lock:
            if self._discovered or self._discovering:
                return
            self._discovering = True
            try:
                package = importlib.import_module(self._package)
                for module in pkgutil.iter_modules(package.__path__):
                    importlib.import_module(f"{self._package}.{module.name}")
                self._discovered = True
            finally:
                self._discovering = False
