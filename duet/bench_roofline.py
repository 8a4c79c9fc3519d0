"""What the arithmetic and the memory of a machine allow: the prediction that ``duet.bench`` puts next to each time.

A piece of work takes at least the longer of its FLOPs at the machine's best rate and its bytes (operands read once,
results written once) at its memory's rate. Both rates are measured at the start of a run. Norms, rotations and
activations are not billed, so a real program stays below 100 %.

Shapes: B batch, N patches, L positions of the language model, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from duet.budget import DecoderShape
from duet.probe import seconds_of

if TYPE_CHECKING:
    from duet.config import DuetConfig

BACKWARD = 2.0  # forwards that a backward through trained weights costs
OPTIMIZER_PASSES = 7  # AdamW reads weight, gradient and two moments, and writes all but the gradient


@dataclass(frozen=True)
class Work:
    """FLOPs (multiply and add count as two) and elements moved."""

    flops: float
    elements: float

    def times(self, factor: float) -> Work:
        """Return the same work ``factor`` times."""
        return Work(self.flops * factor, self.elements * factor)


def product(rows: int, inner: int, columns: int) -> Work:
    """Return the work of [rows, inner] x [inner, columns]."""
    return Work(2 * rows * inner * columns, rows * inner + inner * columns + rows * columns)


def attention(batch: int, tokens: int, query_width: int, key_width: int, causal: bool = False) -> Work:
    """Return the work of fused attention among ``tokens`` positions; widths are heads times head width."""
    pairs = tokens * (tokens + 1) if causal else 2 * tokens * tokens
    return Work(2 * batch * pairs * query_width, batch * tokens * 2 * (query_width + key_width))


def decoder_layer(shape: DecoderShape, batch: int, tokens: int, causal: bool = True) -> list[Work]:
    """Return the work of one decoder layer over [B, tokens]: projections, attention, SwiGLU."""
    query, kv, rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, batch * tokens
    return [
        product(rows, shape.width, query + 2 * kv),
        attention(batch, tokens, query, kv, causal),
        product(rows, query, shape.width),
        product(rows, shape.width, 2 * shape.mlp_width),
        product(rows, shape.mlp_width, shape.width),
    ]


def decode_layer(shape: DecoderShape, batch: int, held: int) -> list[Work]:
    """Return the work of one decoder layer for one new token of each sample, with ``held`` positions in the cache."""
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    cached = Work(4 * batch * (held + 1) * query, 2 * batch * held * kv)
    return [
        product(batch, shape.width, query + 2 * kv),
        cached,
        product(batch, query, shape.width),
        product(batch, shape.width, 2 * shape.mlp_width),
        product(batch, shape.mlp_width, shape.width),
    ]


def column_mass(batch: int, patches: int, width: int, readers: int = 0) -> list[Work]:
    """Return the work of stage 1's ranking: every score once, from queries and keys that the tower has made."""
    readers = min(readers or patches, patches)
    return [Work(2 * batch * readers * patches * width, batch * (readers * width + patches * (width + 1)))]


def text_rows(shape: DecoderShape, batch: int, tokens: int) -> list[Work]:
    """Return the work of one stage-2 ranking by one row: the keys of all positions, and their scores."""
    kv = shape.kv_heads * shape.head_dim
    return [product(batch * tokens, shape.width, kv), Work(2 * batch * tokens * shape.width, batch * tokens * kv)]


def flops(works: Sequence[Work]) -> float:
    """Return the FLOPs of pieces of work."""
    return sum(work.flops for work in works)


@dataclass(frozen=True)
class Machine:
    """What was measured on a device: FLOP/s of its best matrix product and bytes per second of a copy."""

    flops: float
    bandwidth: float

    def seconds(self, works: Sequence[Work], element_size: int) -> float:
        """Return the least time for pieces of work that follow each other."""
        rates = self.flops, self.bandwidth / element_size
        return sum(max(work.flops / rates[0], work.elements / rates[1]) for work in works)

    def facts(self) -> dict[str, str]:
        """Return the two rates for a report."""
        return {
            "best matrix product": f"{self.flops / 1e9:.0f} GFLOP/s",
            "best copy": f"{self.bandwidth / 1e9:.1f} GB/s (read plus written)",
        }


def calibrate(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Machine:
    """Measure the two rates of a device; a second or two."""
    sizes = (256,) if quick else (4096, 8192) if device.type == "cuda" else (1024, 2048)
    rate = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rate = max(rate, 2 * size**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device))
    count = 2**20 if quick else 2**28 if device.type == "cuda" else 2**26
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    return Machine(rate, 2 * 4 * count / _best(lambda: target.copy_(source), device))


def _best(run: Callable[[], Any], device: torch.device, times: int = 8) -> float:
    return min([seconds_of(run, device) for _ in range(times)][2:])


def predicted_flops(
    shape: Any, case: Any, config: DuetConfig | None, untouched: bool = False, causal: bool = False
) -> dict[str, float]:
    """FLOPs of the vision part, of the decoder's layers and of the head (multiply and add count as two).

    In a training step the tower runs forward only, the projector costs 2.5 times its forward (nothing asks for the
    gradient of the features) and the language model three times. The decoder's attention is billed as the full square,
    or with ``causal`` as the triangle that is computed.

    Args:
        shape: ``bench_shapes.Shape`` or ``QwenShape``.
        case: ``bench.Case``.
        config: what is kept; None keeps all.
        untouched: the model as the library runs it.
        causal: see above.
    """
    parts = sections(shape, case, config, untouched, causal)
    train = case.kind == "train"
    passes = 3 if train else 1
    return {
        "vision": flops(parts["tower"]) + flops(parts["projector"]) * (2.5 if train else 1),
        "decoder": flops(parts["decoder"]) * passes,
        "head": flops(parts["head"]) * passes,
    }


def sections(
    shape: Any, case: Any, config: DuetConfig | None, untouched: bool = False, causal: bool = True
) -> dict[str, list[Work]]:
    """Return the work of each section of a forward pass; only DUET's own rankings are known for the two stages."""
    from duet.config import DuetConfig

    config, decoder, batch = config or DuetConfig.none(), shape.decoder(), case.batch
    counts = [case.text + n for n in config.tokens_per_layer(shape.patches, shape.layers)]
    # With labels a Hugging Face model returns the logits of every position that reaches the head.
    rows = batch * (counts[-1] if case.kind == "train" else 1)
    by_rows = config.stage2 == "text_guided"
    stages = [counts[layer - 1] for layer, ratio in config.for_depth(shape.layers).schedule.items() if ratio > 0]
    clustered = config.stage1 == "local_cluster" and config.variant == "paper"
    readers = config.option("readers") if clustered else 0
    return {
        "tower": shape.tower_work(batch, untouched),
        "stage1": column_mass(batch, shape.tower_patches, shape.tower_width, readers) if clustered else [],
        "projector": shape.projector_work(batch, config.entering_tokens(shape.patches)),
        "decoder": [work for n in counts for work in decoder_layer(decoder, batch, n, causal)],
        "stage2": [work for n in stages for work in text_rows(decoder, batch, n)] if by_rows else [],
        "head": [product(rows, decoder.width, decoder.vocabulary)],
    }


def possible_seconds(
    machine: Machine,
    shape: Any,
    case: Any,
    config: DuetConfig | None,
    trained: int,
    element_size: int,
    untouched: bool = False,
) -> dict[str, float]:
    """Return the least seconds of every section that the machine allows, 0 where nothing is known.

    Args:
        machine: its rates.
        shape, case, config, untouched: as for ``predicted_flops``.
        trained: parameters that the optimizer changes.
        element_size: bytes of a weight.
    """  # fmt: skip
    from duet.config import DuetConfig

    parts = sections(shape, case, config, untouched)
    out = {name: machine.seconds(works, element_size) for name, works in parts.items()}
    if case.kind == "train":
        language = BACKWARD * (out["decoder"] + out["head"]) + 1.5 * out["projector"]
        return out | {
            "backward": language,
            "optimizer": OPTIMIZER_PASSES * trained * element_size / machine.bandwidth,
        }
    decoder = shape.decoder()
    held = [case.text + n for n in (config or DuetConfig.none()).tokens_per_layer(shape.patches, shape.layers)]
    works = [work for n in held for work in decode_layer(decoder, case.batch, n)]
    works.append(product(case.batch, decoder.width, decoder.vocabulary))
    return out | {"decode": machine.seconds(works, element_size)}
