"""Projectors from the vision tower's width to the language model's."""

from __future__ import annotations

import re

from torch import Tensor, nn


class IdentityMap(nn.Module):
    """A projector that changes nothing; the widths must already agree."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Return `x` as it came."""
        return x

    @property
    def config(self) -> dict[str, str]:
        """What a model config stores for this projector."""
        return {"mm_projector_type": "identity"}


class SimpleResBlock(nn.Module):
    """A pre-norm residual block. LLaVA defines it and uses it nowhere; other people's code imports it.

    Shapes: [..., channels] -> [..., channels].
    """

    def __init__(self, channels: int):
        super().__init__()
        self.pre_norm = nn.LayerNorm(channels)
        self.proj = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, project, add."""
        x = self.pre_norm(x)
        return x + self.proj(x)


def build_vision_projector(config, delay_load: bool = False, **kwargs) -> nn.Module:
    """Build the projector that `config.mm_projector_type` names.

    Args:
        config: Has `mm_projector_type` (`linear`, `mlp{depth}x_gelu` or `identity`), `mm_hidden_size`, `hidden_size`.
        delay_load: Accepted for LLaVA's signature; has no effect.
        **kwargs: Accepted for LLaVA's signature.

    Returns:
        A module [B, K, mm_hidden_size] -> [B, K, hidden_size]. In an MLP the weights sit at the even indices.

    Raises:
        ValueError: Unknown projector type.

    Source: LLaVA's `build_vision_projector`.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if kind == "identity":
        return IdentityMap()
    match = re.match(r"^mlp(\d+)x_gelu$", str(kind))
    if match is None or int(match.group(1)) < 1:
        raise ValueError(
            f"unknown mm_projector_type {kind!r}: use 'linear', 'mlp2x_gelu' (any depth >= 1) or 'identity'"
        )
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(1, int(match.group(1))):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
