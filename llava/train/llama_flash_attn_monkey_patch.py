"""LLaVA's switch to FlashAttention for old versions of `transformers`; here it says what to use instead.

In `transformers` 5 attention is chosen by `attn_implementation`, and the method that LLaVA replaced is no longer
called in that form. Padding, masks and key-value caches go with the choice, so there is nothing left to patch.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

_INSTEAD = "pass attn_implementation='flash_attention_2' (flash-attn installed) or 'sdpa', the default"


def forward(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse: a `LlamaAttention.forward` of `transformers` 4 cannot run inside `transformers` 5.

    Raises:
        NotImplementedError: always; it names the way that works.
    """
    raise NotImplementedError(f"LLaVA's patched attention needs transformers 4; {_INSTEAD}")


def _prepare_decoder_attention_mask(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse, as `forward`."""
    raise NotImplementedError(f"LLaVA's patched attention masks need transformers 4; {_INSTEAD}")


def replace_llama_attn_with_flash_attn() -> None:
    """Change nothing, and warn that models keep the attention that they are loaded with."""
    warnings.warn(f"replace_llama_attn_with_flash_attn() has no effect; {_INSTEAD}", stacklevel=2)
