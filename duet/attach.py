"""Attach DUET to one model instance and detach it again, exactly. The only file that writes on foreign instances."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import wraps
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from duet import families, selftest
from duet.config import CONFIG_KEY, DuetConfig

if TYPE_CHECKING:
    from duet.question import ClipText

logger = logging.getLogger(__name__)


class _Missing(Enum):
    """Stands for an attribute that was not there; the same object in a deep copy."""

    MISSING = "missing"


_MISSING = _Missing.MISSING


@dataclass
class Handle:
    """An attachment; use it as a context manager, or call ``detach``.

    Attributes:
        model: the instance that was changed.
        config: what is in force, with the schedule in the model's own layers.
        facts: sizes of the model.
        family: how DUET enters this kind of model.
        text_encoder: what reads questions for the vision reducers that listen to them.
    """

    model: Any
    config: DuetConfig
    facts: families.ModelFacts
    family: families.Family = field(repr=False)
    _host_class: type = field(repr=False)
    text_encoder: ClipText | None = field(default=None, repr=False)
    _stored_config: Any = field(default=_MISSING, repr=False)
    _hooked_forward: Any = field(default=_MISSING, repr=False)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        detach(self.model)

    def __repr__(self) -> str:
        stages = [f"after layer {layer} keep {ratio:g}" for layer, ratio in self.config.schedule.items()]
        return (
            f"DUET on {self._host_class.__name__}: {self._tokens()} (stage 1: {self.config.stage1}, "
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


def attach(model: nn.Module, config: DuetConfig | None = None, *, text_encoder: ClipText | None = None) -> Handle:
    """Reduce visual tokens in one model instance.

    Nothing but this instance changes: its class becomes a subclass of its own class, and ``config.duet`` is set, so
    that ``save_pretrained`` stores the configuration with the weights. Parameters and ``state_dict`` keys
    stay as they are.

    Args:
        model: a Hugging Face vision-language model of a supported family (a PEFT model's base is used).
        config: what to keep; None takes what the model's own ``config.json`` carries under ``"duet"``.
        text_encoder: CLIP's text tower for vision reducers that compare patches with the question
            (``duet.question.ClipText``); None compares them with the question's embeddings in the language model.

    Returns:
        A handle; ``with duet.attach(model, config):`` detaches at the end of the block.

    Raises:
        ValueError: unsupported model, attached already, no configuration, or one that does not fit the model.
    Source: DUET-VLM Sec. 3.
    """
    model = base_model(model)
    if _handle(model) is not None:
        raise ValueError("DUET is already attached to this model; call duet.detach(model) first")
    family = families.find(model)
    config = DuetConfig.from_model_config(model.config) if config is None else DuetConfig.require(config)
    if config is None:
        raise ValueError(
            "no configuration: pass a DuetConfig, for example DuetConfig.preset('llava-1.5-7b', tokens=192)"
        )
    facts = family.facts(model)
    family.check_config(model, config)
    counted = replace(config, per="pass") if facts.unit == "image" else config  # one pass is the picture
    counted.validate(facts.patches, facts.num_layers, facts.class_token)
    selftest.ensure()
    handle = Handle(model, config.for_depth(facts.num_layers), facts, family, type(model), text_encoder)
    handle._stored_config = vars(model.config).get(CONFIG_KEY, _MISSING)
    setattr(model.config, CONFIG_KEY, config.to_dict())
    model._duet = handle  # type: ignore[assignment]
    if family.mixin is not None:
        _insert_mixin(model, family.mixin, handle)
    logger.info("%r", handle)
    return handle


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach`` exactly: same class, same ``__dict__`` keys, same outputs to the bit.

    Returns:
        The model.

    Raises:
        ValueError: DUET is not attached.
    """
    model = base_model(model)
    handle = _handle(model)
    if handle is None:
        raise ValueError("DUET is not attached to this model")
    model.__class__ = handle._host_class
    if handle._hooked_forward is not _MISSING:
        _set_hooked_forward(model, handle._hooked_forward)
    del model.__dict__["_duet"]
    if handle._stored_config is _MISSING:
        delattr(model.config, CONFIG_KEY)
    else:
        setattr(model.config, CONFIG_KEY, handle._stored_config)
    return model


def _handle(model: nn.Module) -> Handle | None:
    return vars(model).get("_duet")


def base_model(model: nn.Module) -> Any:
    """Return the base model of a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _insert_mixin(model: nn.Module, mixin: type, handle: Handle) -> None:
    """Give the instance a class that puts ``mixin`` before its own; the host's name stays for saved configurations."""
    host = type(model)
    namespace = {"__module__": host.__module__, "__doc__": mixin.__doc__}
    namespace["forward"] = _with_signature_of(host.forward, mixin.forward)  # type: ignore[attr-defined]
    model.__class__ = type(host.__name__, (mixin, host), namespace)
    if "_old_forward" in vars(model):
        # accelerate's device_map hooks keep the host's bound forward here and call it after moving the inputs
        handle._hooked_forward = vars(model)["_old_forward"]
        _set_hooked_forward(model, MethodType(type(model).forward, model))  # type: ignore[attr-defined]


def _set_hooked_forward(model: nn.Module, forward: Callable) -> None:
    """Let accelerate's hook call ``forward``, and let ``generate`` read its signature through the hook."""
    model.__dict__["_old_forward"] = forward
    model.__dict__["forward"].__wrapped__ = forward


def _with_signature_of(host_forward: Callable, reduced_forward: Callable) -> Callable:
    """Return ``reduced_forward`` with the host's parameters and order, and its own further ones.

    ``generate`` and ``Trainer`` read from the signature which inputs a model takes. Features that ``generate`` would
    compute before the prefill are left out, because they are unreduced.
    """
    host = {name: p for name, p in inspect.signature(host_forward).parameters.items() if name != "mm_encoder_outputs"}
    positional = [name for name, p in host.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]
    own = {
        name: p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, p in inspect.signature(reduced_forward).parameters.items()
        if name not in host and p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }

    @wraps(reduced_forward)
    def forward(self, *args, **kwargs):
        return reduced_forward(self, **dict(zip(positional, args, strict=False)), **kwargs)

    parameters = sorted((host | own).values(), key=lambda parameter: parameter.kind)
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward
