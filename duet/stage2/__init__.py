"""Language reducers: which visual tokens stay, decided inside the decoder. One file in this package is one method.

A reducer is a callable ``score(layer, state, rotary, config) -> [B, L]`` registered by name with
``@LANGUAGE_REDUCERS.register("name")``; the decoder loop keeps the best-scored visual tokens of each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from duet._registry import Registry

if TYPE_CHECKING:
    from duet.config import DuetConfig
    from duet.tokens import TokenState

LanguageReducer = Callable[[nn.Module, "TokenState", tuple[Tensor, Tensor], "DuetConfig"], Tensor]
LANGUAGE_REDUCERS: Registry[LanguageReducer] = Registry("language reducer", "duet.stage2")
