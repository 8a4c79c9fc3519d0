"""What transformers calls differently from release to release, asked of the installed one; shared by duet and llava.

From 5.24 on the key-value cache is ``cache`` in forward calls, layers, mask functions and outputs; before it was
``past_key_values``. From 5.24 on outputs carry what the vision tower gave as ``image_outputs``, before as
``image_hidden_states``. Nothing here compares version numbers: names are read from the classes and functions.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any, get_args

import torch
import transformers
from torch import Tensor, nn
from transformers import modeling_outputs
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

CACHE_NAMES = ("cache", "past_key_values")
_PICTURE_FIELDS = ("image_outputs", "video_outputs", "image_hidden_states", "video_hidden_states")


def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


CACHE = next(name for name in CACHE_NAMES if name in _field_names(BaseModelOutputWithPast))
"""What ``generate`` and the model classes of the installed release call the key-value cache."""

WITHOUT_USE = frozenset({"token_type_ids", "mm_token_type_ids", "tokenizer", "assistant_tokenizer"})
"""What carries nothing that a decoder with pictures reads, and reaches ``forward`` all the same: tokenizers and
processors give the first two to every model, and ``generate`` hands on the tokenizer that its stop strings need."""

MULTIMODAL_OUTPUT: type = getattr(
    modeling_outputs, "MultimodalCausalLMOutputWithPast", modeling_outputs.CausalLMOutputWithPast
)
"""What models with pictures return that have no output class of their own."""


@lru_cache(maxsize=256)
def _check_layer(kind: type) -> None:
    if CACHE not in inspect.signature(kind.forward).parameters:  # type: ignore[attr-defined]
        raise ValueError(
            f"{kind.__name__}.forward takes no argument {CACHE!r}, which transformers {transformers.__version__} gives "
            "the key-value cache to layers as: the model's code is for another release of transformers"
        )


def check_layer(layer: nn.Module) -> None:
    """Check that a decoder layer takes the cache under its present name; ``**kwargs`` would swallow it.

    Raises:
        ValueError: it does not, because the model's code was written for another release.
    """
    if not torch.compiler.is_compiling():
        _check_layer(type(layer))


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Take the key-value cache out of keyword arguments, whichever name it has.

    Returns:
        The cache, or None.

    Raises:
        ValueError: two different caches, one under each name.
    """
    found = [kwargs.pop(name) for name in CACHE_NAMES if name in kwargs]
    given = [cache for cache in found if cache is not None]
    if len(given) > 1 and given[0] is not given[1]:
        raise ValueError("cache and past_key_values are two names of one argument; pass one of them")
    return given[0] if given else None


def cache_of(output: Any) -> Any:
    """Return the key-value cache that an output of the installed release carries, or None."""
    return getattr(output, CACHE)


def build_output(kind: type, cache: Any = None, pictures: Mapping[str, Tensor] | None = None, **values: Any) -> Any:
    """Make a model output from the fields that its class declares.

    Args:
        kind: a dataclass of ``transformers.modeling_outputs`` or of a model.
        cache: the key-value cache.
        pictures: by kind ("image", "video"), the tokens [tokens, D] that pictures became.
        **values: fields by name.

    Raises:
        TypeError: a value has no field.
    """
    for name, tokens in (pictures or {}).items():
        names = _field_names(kind)
        if f"{name}_outputs" in names:
            values[f"{name}_outputs"] = BaseModelOutputWithPooling(pooler_output=tokens)  # type: ignore[arg-type]
        elif f"{name}_hidden_states" in names:
            values[f"{name}_hidden_states"] = tokens
    return kind(**{CACHE: cache}, **values)


def pictures_of(output: Any) -> dict[str, Any]:
    """Return the fields of an output that hold what pictures became."""
    return {name: output[name] for name in _PICTURE_FIELDS if name in output}


@lru_cache(maxsize=256)
def declared_output(kind: type) -> type:
    """Return the output class that a model class declares for its ``forward``.

    Raises:
        ValueError: it declares none.
    """
    declared = inspect.signature(kind.forward).return_annotation  # type: ignore[attr-defined]
    for found in (declared, *get_args(declared)):
        if isinstance(found, type) and issubclass(found, ModelOutput):
            return found
    raise ValueError(f"{kind.__name__}.forward does not declare which ModelOutput it returns")


def refuse_unknown(given: Iterable[str], known: Iterable[str], function: str) -> None:
    """Refuse keyword arguments that nobody reads: what carries state (a cache, positions, masks) must not get lost.

    Args:
        given: names that are left over.
        known: names that the function takes.
        function: how to call it in the message.

    Raises:
        TypeError: there is one.
    """
    unknown = sorted(given)
    if not unknown:
        return
    close = difflib.get_close_matches(unknown[0], sorted(known), n=1, cutoff=0.8)
    hint = f"; did you mean {close[0]!r}?" if close else "; it would have no effect, so leave it out"
    raise TypeError(f"{function} got an unexpected keyword argument {unknown[0]!r}{hint}")
