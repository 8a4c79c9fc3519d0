"""Which call of a whole model is under way, for its inner parts; each thread and task has its own."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from duet.attachment import KEY


@dataclass
class Generation:
    """A ``generate`` that is under way: the length of its first pass, which is that of the prompt."""

    prompt_length: int | None = None


@dataclass(frozen=True)
class Call:
    """A call of a whole model that is under way, for its inner parts.

    Attributes:
        model: which model.
        labels: what came with the call.
        foreign: a ``forward`` that somebody put on runs; it may pair what the inner model gives with its own positions.
        generation: the ``generate`` that the call belongs to.
    """

    model: Any
    labels: Tensor | None = None
    foreign: bool = False
    generation: Generation | None = None


_CALL: ContextVar[Call | None] = ContextVar("duet_call", default=None)


class called:
    """Say which call of a whole model runs in this context; no generator, because compiled steps pass through here."""

    def __init__(self, model: Any, **changes: Any) -> None:
        self._call = None if torch.compiler.is_compiling() else _call_of(model, changes)

    def __enter__(self) -> None:
        if self._call is not None:
            self._token = _CALL.set(self._call)

    def __exit__(self, *error: object) -> None:
        if self._call is not None:
            _CALL.reset(self._token)


def _call_of(model: Any, changes: dict[str, Any]) -> Call:
    call = _CALL.get()
    return replace(call if call is not None and call.model is model else Call(model), **changes)


def caller_of(part: Any) -> Call:
    """Return the call of a whole model that a part is run for.

    The copies that DataParallel makes of a model call copies of its parts.
    """
    call = None if torch.compiler.is_compiling() else _CALL.get()
    if call is not None and vars(call.model).get(KEY) is vars(part)[KEY]:
        return call
    return Call(vars(part)[KEY].model)
