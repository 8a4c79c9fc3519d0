"""Attach DUET to one model instance and detach it again, exactly. The only file that writes on foreign instances."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from duet import families, selftest
from duet.attachment import KEY, MISSING, Change, Handle, base_model, handle
from duet.config import CONFIG_KEY, DuetConfig

if TYPE_CHECKING:
    from duet.question import ClipText

logger = logging.getLogger(__name__)

__all__ = ["Handle", "attach", "base_model", "check_config", "detach", "handle"]


def attach(model: nn.Module, config: DuetConfig | None = None, *, text_encoder: ClipText | None = None) -> Handle:
    """Reduce visual tokens in one model instance.

    Nothing but this instance changes: the classes of the model, of the model without its head and of the decoder become
    subclasses of their own classes, and ``config.duet`` is set, so that ``save_pretrained`` stores the
    configuration with the weights. Parameters and ``state_dict`` keys stay as they are. docs/models.md says what every
    way into an attached model gives.

    Args:
        model: a Hugging Face vision-language model of a supported family (the base of a PEFT model, of a compiled or a
            data-parallel one is used).
        config: what to keep; None takes what the model's own ``config.json`` carries under ``"duet"``.
        text_encoder: CLIP's text tower for vision reducers that compare patches with the question
            (``duet.question.ClipText``); None compares them with the question's embeddings in the language model.

    Returns:
        A handle; ``with duet.attach(model, config):`` detaches at the end of the block.

    Raises:
        ValueError: unsupported model, attached already, no configuration, one that does not fit the model, or an
            inner ``forward`` that was replaced before.
    Source: DUET-VLM Sec. 3.
    """
    model = base_model(model)
    if handle(model) is not None:
        raise ValueError("DUET is already attached to this model; call duet.detach(model) first")
    family = families.find(model)
    config = DuetConfig.from_model_config(model.config) if config is None else DuetConfig.require(config)
    if config is None:
        raise ValueError(
            "no configuration: pass a DuetConfig, for example DuetConfig.preset('llava-1.5-7b', tokens=192)"
        )
    facts = check_config(model, config)
    parts = family.parts(model)
    for module, _ in parts:
        if module is not model:  # whatever was put on the whole model calls the inner one, which reduces
            _check_forward(module)
    selftest.ensure()
    attached = Handle(model, config.for_depth(facts.num_layers), facts, family, text_encoder, type(model).__name__)
    attached._stored_config = vars(model.config).get(CONFIG_KEY, MISSING)
    setattr(model.config, CONFIG_KEY, config.to_dict())
    vars(model)[KEY] = attached
    attached._changes = [_change(module, mixin, attached) for module, mixin in parts]
    logger.info("%r", attached)
    return attached


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach`` exactly: same classes, same ``__dict__`` keys, same outputs to the bit.

    A ``forward`` that somebody wrapped in between stays, and runs the model as it is without DUET.

    Returns:
        The model.

    Raises:
        ValueError: DUET is not attached.
    """
    model = base_model(model)
    attached = handle(model)
    if attached is None:
        raise ValueError("DUET is not attached to this model")
    model = attached.model
    for change in attached._changes:
        _undo(change)
    vars(model).pop(KEY, None)
    if attached._stored_config is MISSING:
        delattr(model.config, CONFIG_KEY)
    else:
        setattr(model.config, CONFIG_KEY, attached._stored_config)
    return model


def check_config(model: nn.Module, config: DuetConfig) -> families.ModelFacts:
    """Raise ValueError if a configuration cannot work with a model; the one check, whoever sets it.

    Returns:
        The sizes of the model that it was checked against.
    """
    family = families.find(model)
    facts = family.facts(model)
    config = DuetConfig.require(config)
    family.check_config(model, config)
    counted = replace(config, per="pass") if facts.unit == "image" else config  # one pass is the picture
    counted.validate(facts.patches, facts.num_layers, facts.class_token)
    return facts


def _check_forward(module: nn.Module) -> None:
    """Refuse a module whose own ``forward`` was replaced by something that would go past the reduction."""
    found = vars(module).get("_old_forward", vars(module).get("forward"))
    if found is None or _is_own(found, module) or _dispatches(found):
        return
    raise ValueError(
        f"the forward of this {type(module).__name__} was replaced (wrapped or compiled) before duet.attach, and would "
        "go past the reduction. Take the wrapper off (del module.forward), attach, and wrap afterwards; "
        "module.compile() replaces nothing and may come before or after"
    )


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Return whether this is nothing else than what the class says."""
    own = type(module).forward
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is own


def _dispatches(forward: Any) -> bool:
    """Return whether a wrapper ends in a method of an earlier attachment, which does what the present one says."""
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        if getattr(forward, "_duet_dispatches", False):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _change(module: nn.Module, mixin: type, attached: Handle) -> Change:
    """Give a module a class that puts ``mixin`` before its own."""
    host = type(module)
    change = Change(module, host, _reduced_class(host, mixin))
    own = vars(module).get("forward")
    if own is not None and "_old_forward" not in vars(module) and _is_own(own, module):
        change.hidden = vars(module).pop("forward")  # it would hide the one of the new class
    module.__class__ = change.reduced
    vars(module)[KEY] = attached
    if "_old_forward" in vars(module):
        # accelerate's device_map hooks keep the host's bound forward here and call it after moving the inputs
        change.hooked = vars(module)["_old_forward"]
        _set_hooked_forward(module, MethodType(change.reduced.forward, module))  # type: ignore[attr-defined]
    return change


def _undo(change: Change) -> None:
    module, held = change.module, vars(change.module)
    if type(module) is change.reduced:  # else somebody has put a class on top, whose methods fall through by themselves
        module.__class__ = change.host
    ours = change.reduced.forward  # type: ignore[attr-defined]
    if change.hooked is not MISSING:
        if "_old_forward" in held and getattr(held["_old_forward"], "__func__", None) is ours:
            _set_hooked_forward(module, change.hooked)
        elif getattr(held.get("forward"), "__func__", None) is ours:  # the hook was taken off in between
            held["forward"] = change.hooked
    if change.hidden is not MISSING and "forward" not in held:
        held["forward"] = change.hidden
    held.pop(KEY, None)


def _set_hooked_forward(module: nn.Module, forward: Callable) -> None:
    """Let accelerate's hook call ``forward``, and let ``generate`` read its signature through the hook."""
    vars(module)["_old_forward"] = forward
    vars(module)["forward"].__wrapped__ = forward


@cache
def _reduced_class(host: type, mixin: type) -> type:
    """Return the class of an attached module; it has the host's name, for saved configurations.

    Its methods do what the mixin says while a handle is there, and what the host says otherwise: whoever kept one of
    them (a wrapper, a hook) may go on calling it.
    """
    namespace: dict[str, Any] = {
        "__module__": host.__module__,
        "__doc__": mixin.__doc__,
        "_duet_host": host,
        "__reduce_ex__": _pickled,
    }
    methods: dict[str, Any] = {}
    for kind in reversed(mixin.__mro__[:-1]):
        methods |= {name: value for name, value in vars(kind).items() if isinstance(value, FunctionType)}
    for name, method in methods.items():
        if name == "forward":
            method = _with_signature_of(host.forward, method)  # type: ignore[attr-defined]
        namespace[name] = _while_attached(getattr(host, name), method)
    reduced = type(host.__name__, (mixin, host), namespace)
    reduced._duet_mixin = mixin  # type: ignore[attr-defined]
    return reduced


def _pickled(self: Any, protocol: Any) -> Any:
    """Let copies, ``pickle`` and ``torch.save`` build the class again, which has no name of its own to be found by."""
    kind = type(self)
    made = object.__reduce_ex__(self, max(2, int(protocol)))
    if "_duet_host" not in vars(kind):  # somebody's class on top
        return made
    return (_unpickled, (kind._duet_host, kind._duet_mixin), *made[2:])


def _unpickled(host: type, mixin: type) -> Any:
    kind = _reduced_class(host, mixin)
    return object.__new__(kind)


def _while_attached(plain: Callable, reduced: Callable) -> Callable:
    @wraps(reduced)
    def method(self, *args, **kwargs):
        return (reduced if KEY in vars(self) else plain)(self, *args, **kwargs)

    if hasattr(reduced, "__signature__"):
        method.__signature__ = reduced.__signature__  # type: ignore[attr-defined]
    method._duet_dispatches = True  # type: ignore[attr-defined]
    return method


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
        if len(args) > len(positional):
            raise TypeError(f"forward takes at most {len(positional)} positional arguments, got {len(args)}")
        return reduced_forward(self, **dict(zip(positional, args, strict=False)), **kwargs)

    parameters = sorted((host | own).values(), key=lambda parameter: parameter.kind)
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward
