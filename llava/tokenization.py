"""Load a tokenizer that gives the ids LLaVA's training saw.

LLaVA used the slow (sentencepiece) Llama tokenizer, which ``transformers`` 5 no longer has. The fast one differs in
one rule and in how it reads two settings:

* The slow one puts a word-start mark in front of a text even when the text begins with a space (``" a"`` gives two
  marks); the fast one then adds none. This changes the ids of ``"<image> <image>"``, for example.
* ``legacy`` (a mark after every special token, or only at the start of the text) is lost by ``save_pretrained``, so
  that a saved and loaded tokenizer would quietly change its ids.
* ``add_bos_token`` means True when an old folder does not mention it; the fast one takes False.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer

_WORD_START = "▁"


def load_tokenizer(path: str, model_max_length: int | None = None, padding_side: str = "right", **kwargs: Any) -> Any:
    """Load the tokenizer of a model folder or hub name.

    Args:
        path: Folder or hub name.
        model_max_length: Longest text in tokens; None keeps what the tokenizer's config says.
        padding_side: "right" for training, as in LLaVA.
        **kwargs: Passed to ``AutoTokenizer.from_pretrained``. ``use_fast`` is accepted and has no effect.

    Returns:
        A ``PreTrainedTokenizerFast``. For Llama tokenizers the ids are those of the slow one, for both settings of
        ``legacy``; every other tokenizer is returned as it is.
    """
    kwargs.pop("use_fast", None)
    if model_max_length is not None:
        kwargs["model_max_length"] = model_max_length
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side=padding_side, **kwargs)
    if not isinstance(tokenizer, LlamaTokenizer) and _was_llama(path, kwargs):
        # AutoTokenizer goes by the model type, and a llava-hf folder's is none of Llama's.
        tokenizer = LlamaTokenizer.from_pretrained(path, padding_side=padding_side, **kwargs)
    if isinstance(tokenizer, LlamaTokenizer) and tokenizer.add_prefix_space is not False:
        config = {**_read_json(path, "tokenizer_config.json", kwargs), **kwargs}
        backend = _read_json(path, "tokenizer.json", kwargs)
        _use_slow_rules(tokenizer, _legacy(config, backend))
        if config.get("add_bos_token") is None and not backend:
            tokenizer.add_bos_token = True
    return tokenizer


def _use_slow_rules(tokenizer: Any, legacy: bool) -> None:
    """Make the backend mark word starts as sentencepiece does.

    The first step turns spaces into marks, so the second one never finds a leading space and always adds its own; the
    third makes that a mark as well.
    """
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Replace(" ", _WORD_START)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="always" if legacy else "first", split=False),
            pre_tokenizers.Metaspace(replacement=_WORD_START, prepend_scheme="never", split=False),
        ]
    )
    tokenizer.legacy = legacy
    tokenizer.init_kwargs["legacy"] = legacy


def mark_words_after(tokenizer: Any, token: str) -> None:
    """Let the text behind each occurrence of an added token begin as a text of its own does.

    LLaVA cuts a prompt at its pictures and tokenises the pieces one by one, so that the slow rules put a word-start
    mark in front of each. Within one call of a tokenizer only the rules of ``legacy`` do that by themselves.

    Args:
        tokenizer: From `load_tokenizer`, a Llama tokenizer.
        token: Added with ``normalized=True``, so that it is looked for in what the normalizer gives.
    """
    if not isinstance(tokenizer, LlamaTokenizer) or tokenizer.legacy:
        return
    backend, name = tokenizer.backend_tokenizer, re.escape(token)
    mark = normalizers.Replace(Regex(rf"{name}(?!{name}|\z)"), token + _WORD_START)
    backend.normalizer = normalizers.Sequence([mark, backend.normalizer])


def _was_llama(path: str, kwargs: dict[str, Any]) -> bool:
    saved = _read_json(path, "tokenizer_config.json", kwargs)
    return str(saved.get("tokenizer_class", "")).startswith("LlamaTokenizer")


def _legacy(config: dict[str, Any], backend: dict[str, Any]) -> bool:
    """Find out which rule a saved tokenizer was used with.

    Its config says it, except in old files (where it means True) and in files that ``transformers`` 5 wrote (where
    ``tokenizer.json``, here ``backend``, still shows it).
    """
    if config.get("legacy") is not None:
        return bool(config["legacy"])
    if not backend:
        return True
    step = backend.get("pre_tokenizer") or {}
    return all(part.get("prepend_scheme") != "first" for part in step.get("pretokenizers", [step]))


def _read_json(path: str, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Read one file of a model folder or hub repository; an absent file gives an empty dict."""
    local = os.path.join(path, name)
    if not os.path.isdir(path):
        from transformers.utils.hub import cached_file

        known = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
        options = {key: kwargs[key] for key in known if key in kwargs}
        local = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options)
    if not local or not os.path.isfile(local):
        return {}
    with open(local, encoding="utf-8") as file:
        return json.load(file)
