"""What ``attach`` leaves with a model: the handle, and how to get at it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from duet.config import DuetConfig

if TYPE_CHECKING:
    from duet.families import Family, ModelFacts
    from duet.question import ClipText

KEY = "_duet"
"""Where the handle stands in the ``__dict__`` of the modules that it changed."""


class Missing(Enum):
    """Stands for what was not there; the same object in a copy."""

    MISSING = "missing"


MISSING = Missing.MISSING


@dataclass
class Change:
    """One module whose class was changed.

    Attributes:
        module: the module.
        host: its own class.
        reduced: the class that it got.
        hidden: what stood under ``forward`` in its ``__dict__`` and was only its own class's ``forward``.
        hooked: what accelerate's hook called.
    """

    module: nn.Module
    host: type
    reduced: type
    hidden: Any = MISSING
    hooked: Any = MISSING

    def __reduce__(self) -> tuple:
        """Leave out the reduced class, which has no name to be pickled by; its module brings it along."""
        return _change_again, (self.module, self.host, self.hidden, self.hooked)


def _change_again(module: nn.Module, host: type, hidden: Any, hooked: Any) -> Change:
    return Change(module, host, type(module), hidden, hooked)


@dataclass
class Handle:
    """An attachment; use it as a context manager, or call ``duet.detach``.

    Attributes:
        model: the instance that was changed.
        config: what is in force, with the schedule in the model's own layers.
        facts: sizes of the model.
        family: how DUET enters this kind of model.
        text_encoder: what reads questions for the vision reducers that listen to them.
    """

    model: Any
    config: DuetConfig
    facts: ModelFacts
    family: Family = field(repr=False)
    text_encoder: ClipText | None = field(default=None, repr=False)
    _name: str = ""
    _changes: list[Change] = field(default_factory=list, repr=False)
    _stored_config: Any = field(default=MISSING, repr=False)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        from duet.attach import detach

        detach(self.model)

    def __repr__(self) -> str:
        stages = [f"after layer {layer} keep {ratio:g}" for layer, ratio in self.config.schedule.items()]
        return (
            f"DUET on {self._name}: {self._tokens()} (stage 1: {self.config.stage1}, "
            f"{self.config.variant}){self._over_time()}, stages in the decoder: {', '.join(stages) or 'none'}"
            f"{self._average()}"
        )

    def _tokens(self) -> str:
        config, patches, unit = self.config, self.facts.patches, self.facts.unit
        if config.stage1 != "none" and config.per == "picture":
            return f"{config.dominant} + {config.contextual} visual tokens per image or video"
        if config.adaptive:
            return f"as many visual tokens per {unit} as it needs"
        if patches is not None:
            return f"{patches} -> {config.entering_tokens(patches)} visual tokens per {unit}"
        kept = "all" if config.stage1 == "none" else f"{config.dominant} + {config.contextual}"
        return f"{kept} visual tokens per frame, of as many as its size gives"

    def _over_time(self) -> str:
        keep = self.config.across_frames
        if keep is None:
            return ""
        return f", merged over time to {f'{keep:.0%}' if isinstance(keep, float) else keep} of a video's tokens"

    def _average(self) -> str:
        config, facts = self.config, self.facts
        if facts.patches is None or config.per == "picture" or config.adaptive:
            return ""
        average = config.average_tokens(facts.patches, facts.num_layers)
        return f"; {average:.2f} on average over {facts.num_layers} layers"


def base_model(model: nn.Module) -> Any:
    """Return the model inside of wrappers: PEFT's, ``torch.compile``'s, (Distributed)DataParallel's."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def handle(model: nn.Module) -> Handle | None:
    """Return the handle of a model that DUET is attached to, or None.

    Args:
        model: what ``attach`` was called with, a wrapper around it (PEFT, ``torch.compile``, DataParallel), or one of
            its parts that reduce (``model.model``, the decoder).
    """
    found = vars(base_model(model)).get(KEY)
    return found if isinstance(found, Handle) else None
