"""Arithmetic of token budgets: tokens per layer, averages, solvers, FLOPs and KV bytes.

Only counts enter here, never tensors, so that a plan can be printed before any weight is loaded.
``schedule`` maps a number of decoder layers to a keep ratio: after that many layers have run,
``floor(ratio * entering)`` visual tokens stay. Ratios are relative to what entered layer 1 (DUET-VLM Table 12-14).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ROUNDING = 1e-6  # 0.29 * 100 is 28.999999999999996 in binary; a floor must not lose a token to that


def kept_tokens(entering: int, ratio: float) -> int:
    """Return ``floor(ratio * entering)``, the visual tokens that a stage keeps."""
    return math.floor(ratio * entering + _ROUNDING)


def tokens_per_layer(entering: int, schedule: Mapping[int, float], depth: int) -> list[int]:
    """Return the visual tokens that each of ``depth`` decoder layers sees.

    Args:
        entering: visual tokens that enter the first layer.
        schedule: layers that have run -> keep ratio.
        depth: number of decoder layers.
    """
    counts, current = [], entering
    for layer in range(depth):
        if layer in schedule:
            current = kept_tokens(entering, schedule[layer])
        counts.append(current)
    return counts


def average_tokens(entering: int, schedule: Mapping[int, float], depth: int) -> float:
    """Return the mean over layers of the visual tokens that a layer sees: 307 entering gives 191.75 for Table 12."""
    return sum(tokens_per_layer(entering, schedule, depth)) / depth


def solve_entering(target: float, schedule: Mapping[int, float], depth: int) -> int:
    """Return the entering count whose average is nearest to ``target`` (the smaller one on a tie).

    Raises:
        ValueError: the target is not positive.
    """
    if target <= 0:
        raise ValueError(f"the wanted average must be positive, got {target}")
    factor = average_tokens(10**6, schedule, depth) / 10**6
    guess = round(target / factor)
    near = range(max(1, guess - 3), guess + 4)
    return min(near, key=lambda n: (abs(average_tokens(n, schedule, depth) - target), n))


def solve_split(entering: int, patches: int, cluster_width: int, contextual_share: float = 0.15) -> tuple[int, int]:
    """Split an entering count into dominant and contextual tokens.

    The share defaults to the 85:15 that Table 15 uses; it shrinks where the residual patches cannot fill
    ``cluster_width`` members for every contextual token without sharing.

    Raises:
        ValueError: more tokens are asked for than there are patches.
    """
    if entering > patches:
        raise ValueError(f"cannot keep {entering} of {patches} patches; ask for at most {patches} entering tokens")
    contextual = round(entering * contextual_share)
    while contextual > 0 and contextual * cluster_width > patches - (entering - contextual):
        contextual -= 1
    return entering - contextual, contextual


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder, as far as its cost depends on them (widths in elements)."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def from_config(cls, config: object) -> DecoderShape:
        """Read the sizes from a Hugging Face text configuration."""
        heads = int(config.num_attention_heads)  # type: ignore[attr-defined]
        width = int(config.hidden_size)  # type: ignore[attr-defined]
        return cls(
            layers=int(config.num_hidden_layers),  # type: ignore[attr-defined]
            width=width,
            mlp_width=int(config.intermediate_size),  # type: ignore[attr-defined]
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or width // heads),
            vocabulary=int(config.vocab_size),  # type: ignore[attr-defined]
        )

    def layer_flops(self, tokens: int, causal: bool = False) -> int:
        """Return the FLOPs of one layer over ``tokens`` positions: projections, attention, SwiGLU.

        Multiply and add count as two. Attention is billed as the full square, the convention of the field (FastV and
        its followers count multiply-adds: 4nd^2 + 2n^2d, and 3ndm for a gated MLP), or with ``causal`` as the triangle
        that a causal kernel computes.
        """
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = tokens * self.width * (2 * query + 2 * kv)
        attention = (tokens * (tokens + 1) if causal else 2 * tokens * tokens) * query
        mlp = 3 * tokens * self.width * self.mlp_width
        return 2 * (projections + attention + mlp)

    def prefill_flops(self, positions_per_layer: Sequence[int], head_positions: int = 1, causal: bool = False) -> int:
        """Return the FLOPs of a prefill whose layer ``l`` sees ``positions_per_layer[l]`` positions (text included)."""
        head = 2 * head_positions * self.width * self.vocabulary
        return sum(self.layer_flops(n, causal) for n in positions_per_layer) + head

    def kv_bytes(self, positions_per_layer: Sequence[int], bytes_per_element: int = 2) -> int:
        """Return the bytes of the KV cache after that prefill."""
        return sum(positions_per_layer) * 2 * self.kv_heads * self.head_dim * bytes_per_element


def vision_flops(patches: int, width: int, mlp_width: int, layers: int, class_token: bool = True) -> int:
    """Return the FLOPs of ``layers`` ViT blocks over one image (multiply and add count as two)."""
    n = patches + int(class_token)
    return layers * 2 * (4 * n * width * width + 2 * n * n * width + 2 * n * width * mlp_width)
