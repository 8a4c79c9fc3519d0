"""LLaVA's switch to xformers' attention; here it says that torch's SDPA, which has the same kernel, is used."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

_INSTEAD = "attn_implementation='sdpa', the default, is torch's memory-efficient attention, which came from xformers"


def xformers_forward(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse: a `LlamaAttention.forward` of `transformers` 4 cannot run inside `transformers` 5.

    Raises:
        NotImplementedError: always; it names the way that works.
    """
    raise NotImplementedError(f"LLaVA's patched attention needs transformers 4; {_INSTEAD}")


def replace_llama_attn_with_xformers_attn() -> None:
    """Change nothing, and warn that SDPA is used."""
    warnings.warn(f"replace_llama_attn_with_xformers_attn() has no effect: {_INSTEAD}", stacklevel=2)
