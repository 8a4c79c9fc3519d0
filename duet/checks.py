"""What the values of a configuration may be: every refusal is a ``ValueError`` that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NoReturn

LARGEST = 2**31 - 1
"""No count, layer or row index is larger: what is lies past every model, and past what an int32 index holds."""
_LARGEST_NUMBER = 2**63 - 2  # of a seed or an option; one more is added to a seed, in int64
_LAYER = re.compile(r"[0-9]{1,10}")
_SHOWN = 100


class FrozenDict(dict):
    """A dictionary that cannot be changed in place; it compares, copies, pickles and serialises as a plain one.

    ``dict(frozen)`` and ``frozen | other`` are plain dictionaries, which can be changed.
    """

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "a DuetConfig cannot be changed in place; make another one with dataclasses.replace(config, ...)"
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict]]:
        return type(self), (dict(self),)


def shown(value: object) -> str:
    """Return a value for a message: one line of moderate length, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of more digits than Python prints
        return f"an unprintable {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def check_count(name: str, value: object, least: int, most: int = LARGEST) -> None:
    """Refuse what is no integer from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")


def check_seed(value: object) -> None:
    """Refuse what no random number can start from."""
    check_count("seed", value, least=0, most=_LARGEST_NUMBER)


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse what is none of the known words."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")


def check_name(name: str, value: object) -> None:
    """Refuse what is no text; whether something has that name is for its registry to say."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a name, for example 'none', got {shown(value)}")


def clean_counts_or_shares(dominant: object, contextual: object) -> tuple[int | float, int | float]:
    """Return ``dominant`` and ``contextual``: both counts, or both shares of the patches; 0 may be either."""
    for name, value in (("dominant", dominant), ("contextual", contextual)):
        if not isinstance(value, float):
            check_count(name, value, least=0)
        elif not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be a count (an integer) or a share between 0 and 1, got {shown(value)}")
    assert isinstance(dominant, int | float) and isinstance(contextual, int | float)
    counts = [value for value in (dominant, contextual) if not isinstance(value, float)]
    if len(counts) < 2 and (any(counts) or not 0 < dominant + contextual <= 1):
        raise ValueError(
            f"dominant and contextual must both be counts or both be shares that add up to at most 1, got "
            f"{dominant!r} and {contextual!r}"
        )
    return _plain(dominant), _plain(contextual)


def clean_across_frames(value: object) -> int | float | None:
    """Return ``across_frames``: None, a count, or a share."""
    if isinstance(value, float):
        if not 0.0 < value < 1.0:
            raise ValueError(
                f"across_frames must be a count, a share between 0 and 1, or None to merge none, got {shown(value)}"
            )
        return _plain(value)
    if value is not None:
        check_count("across_frames", value, least=1)
    return value  # type: ignore[return-value]


def clean_queries(queries: object, known: tuple[str, ...]) -> str | tuple[int, ...]:
    """Return ``queries``: one of the known words, or row indices as a tuple."""
    if isinstance(queries, str):
        check_choice("queries", queries, known)
        return queries
    if not isinstance(queries, tuple | list) or not queries or not all(map(_is_row, queries)):
        raise ValueError(
            f"queries must be one of {', '.join(known)}, or a non-empty tuple of row indices (integers from "
            f"{-LARGEST} to {LARGEST}), got {shown(queries)}"
        )
    return tuple(queries)


def _is_row(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def clean_schedule(schedule: object) -> FrozenDict:
    """Return the schedule with integer layers in ascending order; a layer may be spelt as JSON spells it, "16"."""
    if not isinstance(schedule, Mapping):
        raise ValueError(
            f"schedule must map layers to keep ratios, for example {{16: 0.5, 24: 0.0}}, got {shown(schedule)}"
        )
    found: dict[int, float] = {}
    for key, value in schedule.items():
        layer = _layer(key)
        if layer in found:
            raise ValueError(
                f"schedule must map layers to keep ratios, got layer {layer} twice: {shown(dict(schedule))}"
            )
        found[layer] = _ratio(layer, value)
    previous = 1.0
    for layer, ratio in sorted(found.items()):
        if ratio > previous:
            raise ValueError(
                f"schedule: keep ratio {ratio} at layer {layer} is larger than {previous} before it; ratios are "
                "relative to the tokens that entered the first layer, so they cannot grow"
            )
        previous = ratio
    return FrozenDict(sorted(found.items()))


def _layer(key: object) -> int:
    spelt = isinstance(key, str) and _LAYER.fullmatch(key) is not None
    if not spelt and (isinstance(key, bool) or not isinstance(key, Integral)):
        raise ValueError(f"schedule must map layers to keep ratios; a layer is a whole number, got {shown(key)}")
    layer = int(key)  # type: ignore[call-overload]
    if not 1 <= layer <= LARGEST:
        raise ValueError(f"schedule layer {shown(layer)} must be at least 1 (a stage acts after that many layers) and "
                         f"at most {LARGEST}")  # fmt: skip
    return layer


def _ratio(layer: int, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(
            f"schedule must map layers to keep ratios; the ratio at layer {layer} must be a number, got {shown(value)}"
        )
    number: Any = value
    if not 0 <= number <= 1:
        raise ValueError(f"schedule: keep ratio {shown(value)} at layer {layer} must lie in [0, 1]")
    return float(number) + 0.0  # -0.0 is 0.0, in digests too


def clean_options(options: object, known: Mapping[str, Any], methods: str) -> FrozenDict:
    """Return the options in alphabetical order.

    Args:
        options: what was given.
        known: what the chosen methods declare, with defaults.
        methods: the chosen methods, for the message.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"options must map names to values, got {shown(options)}")
    unknown = sorted(name if isinstance(name, str) else shown(name) for name in options if name not in known)
    if unknown:
        raise ValueError(
            f"unknown option(s) {', '.join(unknown)} for {methods}; known: {', '.join(sorted(known)) or 'none'}"
        )
    return FrozenDict({name: _clean_option(name, options[name], known[name]) for name in sorted(options)})


def _clean_option(name: str, value: Any, default: Any) -> Any:
    """Return the value if it is of the default's type, or one of its choices."""
    if isinstance(default, tuple):
        check_choice(f"option {name}", value, default)
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER:
        raise ValueError(f"option {name} must be a number of at most 63 bits, got {shown(value)}")
    if isinstance(default, float) and number:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(
            f"option {name} must be of type {type(default).__name__}, as its default {default!r}, got {shown(value)}"
        )
    return value


def check_depth(schedule: Mapping[int, float], num_layers: int) -> None:
    """Refuse a stage that does not lie before the last of ``num_layers`` layers."""
    beyond = [layer for layer in schedule if layer >= num_layers]
    if beyond:
        raise ValueError(
            f"schedule layer {beyond[0]} is beyond the model: a stage must act before the last of {num_layers} layers "
            f"(1 to {num_layers - 1}); set depth=<layers the schedule was written for> to rescale it"
        )


def _plain(value: int | float) -> int | float:
    """Return a builtin number: numpy's float64 is a float, too, and -0.0 is 0.0."""
    return float(value) + 0.0 if isinstance(value, float) else value
