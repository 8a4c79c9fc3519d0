"""How a command line ends whose work is a function of its own."""

from __future__ import annotations

from collections.abc import Callable

from duet.errors import main_guard


@main_guard
def exit_status(function: Callable[[], object]) -> None:
    """Run a program's work; returns 0, or 1 with a line `error: ...` for what its user can mend."""
    function()
