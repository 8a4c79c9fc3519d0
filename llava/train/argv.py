"""Command lines as groups of a flag and its values."""

from __future__ import annotations


def split_flags(argv: list[str]) -> list[list[str]]:
    """Group a command line into [flag, value, value, ...] lists; `--flag=value` becomes two items."""
    groups: list[list[str]] = []
    for item in argv:
        if item.startswith("--"):
            name, equals, value = item.partition("=")
            groups.append([name, value] if equals else [name])
        elif groups:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups
