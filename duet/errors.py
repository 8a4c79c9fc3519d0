"""How a command ends when its user made a mistake: one line that says which, and an exit status.

``DUET_TRACEBACK=1`` in the environment also prints where the error was raised. What is no user's mistake (TypeError,
AssertionError, ...) keeps its traceback always.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, overload

P = ParamSpec("P")
TRACEBACK = "DUET_TRACEBACK"
INTERRUPTED = 130


class UserError(Exception):
    """A mistake in a request or in data, where no builtin kind of error fits; the message says what to do."""


MISTAKES = (UserError, OSError, ValueError, NotImplementedError, ImportError, FloatingPointError)
"""What a message alone is enough for: files, values, what is not supported or installed, numbers that blew up."""


def report(error: BaseException) -> None:
    """Write ``error: ...`` to standard error, and the traceback before it if the environment asks for that."""
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        traceback.print_exception(error)
    said = str(error).strip() or type(error).__name__
    if isinstance(error, UnicodeError | ImportError) and not isinstance(error, ModuleNotFoundError):
        said = f"{type(error).__name__}: {said}"
    sys.stdout.flush()
    sys.stderr.write(f"error: {said}\n")
    sys.stderr.flush()


@overload
def main_guard(function: Callable[P, int | None]) -> Callable[P, int]: ...
@overload
def main_guard(
    *, statuses: Mapping[type[BaseException], int]
) -> Callable[[Callable[P, int | None]], Callable[P, int]]: ...


def main_guard(function: Any = None, *, statuses: Mapping[type[BaseException], int] | None = None) -> Any:
    """Decorate a command's ``main``: it returns an exit status, and a user's mistake is a line instead of a traceback.

    Args:
        function: returns an exit status, or None for 0.
        statuses: exit statuses of kinds of errors; the first that fits counts, 1 where none does.
    """
    if function is None:
        return lambda main: _guarded(main, statuses or {})
    return _guarded(function, statuses or {})


def _guarded(function: Callable[..., int | None], statuses: Mapping[type[BaseException], int]) -> Callable[..., int]:

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> int:
        try:
            return function(*args, **kwargs) or 0
        except MISTAKES as error:
            if isinstance(error, BrokenPipeError):  # whoever read the output has enough of it
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
            report(error)
            return next((status for kind, status in statuses.items() if isinstance(error, kind)), 1)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted; the same command goes on from here where it keeps what is done\n")
            return INTERRUPTED

    return guarded
