"""How a command line ends."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_status(function: Callable[[], object]) -> int:
    """Run a program's work; returns 0, or 1 with a line `error: ...` for what its user can mend."""
    try:
        function()
    except (ImportError, OSError, ValueError, NotImplementedError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
