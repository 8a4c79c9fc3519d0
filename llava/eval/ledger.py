"""How many visual tokens every decoder layer saw, and what that cost: measured while answering, averaged afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import torch

from duet import DuetConfig
from duet.budget import DecoderShape, vision_flops
from duet.stage1 import VISION_REDUCERS
from duet.tracing import Trace
from llava.model.anyres import Tiling, TokenCounter

Pairs = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ModelShape:
    """Sizes that the cost of a sample depends on.

    Attributes:
        decoder: of the language model.
        width, mlp_width: of the vision tower.
        blocks: tower blocks that run before the features are taken.
        image_size, patch_size: of the tower, in pixels.
        kv_bytes: bytes of one number in the KV cache.
    """

    decoder: DecoderShape
    width: int
    mlp_width: int
    blocks: int
    image_size: int
    patch_size: int
    kv_bytes: int

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """Read the sizes of a LLaVA model."""
        tower = model.get_vision_tower()
        config, layer = tower.config, tower.select_layer
        blocks = layer if layer >= 0 else config.num_hidden_layers + 1 + layer
        return cls(
            DecoderShape.from_config(model.config), config.hidden_size, config.intermediate_size, blocks,
            config.image_size, config.patch_size, model.dtype.itemsize,
        )  # fmt: skip

    @property
    def patches(self) -> int:
        """Patches of one tower pass without reduction."""
        return (self.image_size // self.patch_size) ** 2

    def tower_flops(self, reduction: DuetConfig | None) -> int:
        """FLOPs of one tower pass; fewer for a method that shrinks the picture or merges inside the tower."""
        counts = [self.patches] * self.blocks
        if reduction is not None and reduction.stage1 != "none" and not reduction.keeps_every_patch(self.patches):
            counts = self._block_patches(VISION_REDUCERS.get(reduction.stage1), reduction)
        return sum(vision_flops(count, self.width, self.mlp_width, 1) for count in counts)

    def _block_patches(self, reducer: Any, reduction: DuetConfig) -> list[int]:
        """Patches that each block of the tower sees with a method."""
        if hasattr(reducer, "patches_per_block"):
            return list(reducer.patches_per_block(self.patches, self.blocks, reduction))
        if hasattr(reducer, "resize"):
            blank = torch.zeros(1, 3, self.image_size, self.image_size)
            sides = reducer.resize(blank, reduction, self.patch_size).shape[-2:]
            return [math.prod(side // self.patch_size for side in sides)] * self.blocks
        return [self.patches] * self.blocks


def tiled_tokens(model: Any, sizes: Sequence[tuple[int, int]], counts: Sequence[int]) -> list[int] | None:
    """Visual tokens of each sample without reduction, border left out and newlines counted; None without tiles.

    Args:
        model: a LLaVA model.
        sizes: (width, height) of the pictures of all samples.
        counts: how many of them each sample has.
    """
    if getattr(model.config, "image_aspect_ratio", None) != "anyres":
        return None
    count = TokenCounter(Tiling.of(model.config, model.get_vision_tower().config), None)
    each = iter([count(size) for size in sizes])
    return [sum(islice(each, number)) for number in counts]


def sample_metadata(
    trace: Trace, patches: Sequence[int], limit: int | None, unreduced: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """What one batch's prefill saw, per sample.

    Args:
        trace: recorded around the batch's generation.
        patches: patches of each sample's pictures, before any reduction.
        limit: positions after which the model cuts a prompt, or None.
        unreduced: visual tokens without reduction, where they are not the patches; see `tiled_tokens`.

    Returns:
        Per sample `patches` (and `unreduced`), `visual` (pairs of visual tokens and the number of consecutive layers
        that saw them), `tokens` (the same of all tokens, text included), and `cut` if the prompt filled the limit. An
        empty dict each where nothing was recorded.
    """
    if not trace.passes:
        return [{} for _ in patches]
    segments, out = trace.passes[0], []
    for row, count in enumerate(patches):
        visual = [[int(segment.visual[row]), segment.stop - segment.start] for segment in segments]
        tokens = [[int(segment.tokens[row]), segment.stop - segment.start] for segment in segments]
        facts: dict[str, Any] = {"patches": count, "visual": visual, "tokens": tokens}
        if unreduced is not None:
            facts["unreduced"] = unreduced[row]
        if limit is not None and segments[0].tokens[row] >= limit:
            facts["cut"] = True
        out.append(facts)
    return out


def _per_layer(pairs: Pairs) -> list[int]:
    """One count per decoder layer."""
    return [count for count, layers in pairs for _ in range(layers)]


def _with_picture(metadata: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [facts for facts in metadata if facts.get("visual") and facts["visual"][0][0]]


def summarise(metadata: Sequence[dict[str, Any]], reduction: DuetConfig | None, depth: int) -> dict[str, Any]:
    """Average over the samples that had a picture.

    Args:
        metadata: what `sample_metadata` gave, of all samples.
        reduction: the reduction in force.
        depth: decoder layers.

    Returns:
        `samples` (with a picture), `tokens_per_layer`, `average_tokens` (None without such samples), `entering_tokens`
        and `retained_tokens` (in the first layer, and in the last one that has any), `untouched` (for every stage the
        samples in which it removed nothing although there was something), and `cut` (prompts that filled the model's
        context). The literature calls both the average and the
        retained count "192 tokens", so both are here.
    """
    seen = _with_picture(metadata)
    per_layer = [_per_layer(facts["visual"]) for facts in seen]
    means = [sum(column) / len(per_layer) for column in zip(*per_layer, strict=True)]
    untouched = {}
    if reduction is not None and reduction.stage1 != "none":
        untouched["stage 1"] = sum(
            row[0] == facts.get("unreduced", facts["patches"]) for row, facts in zip(per_layer, seen, strict=True)
        )
    for layer in reduction.for_depth(depth).schedule if reduction is not None else ():
        untouched[f"stage 2, layer {layer}"] = sum(row[layer - 1] == row[layer] > 0 for row in per_layer)
    retained = [next(count for count in reversed(row) if count) for row in per_layer]
    return {
        "samples": len(per_layer),
        "tokens_per_layer": [round(value, 3) for value in means],
        "average_tokens": round(sum(means) / len(means), 3) if means else None,
        "entering_tokens": round(means[0], 3) if means else None,
        "retained_tokens": round(fmean(retained), 3) if means else None,
        "untouched": untouched,
        "cut": sum(bool(facts.get("cut")) for facts in metadata),
    }


def costs(
    metadata: Sequence[dict[str, Any]], reduction: DuetConfig | None, shape: ModelShape
) -> dict[str, float | None]:
    """What a sample with a picture costs on average, from the tokens that each of its layers saw, text included.

    The question is billed as if it were asked alone: what is shared with other questions is counted for each. Ranking
    and merging are not billed; they show in measured time only.

    Returns:
        `prefill_flops` of the language model, `tower_flops` and `kv_bytes` (after the prefill); all None where no
        sample has a picture or the tokens were not recorded.
    """
    seen = [facts for facts in _with_picture(metadata) if "tokens" in facts]
    if not seen:
        return {"prefill_flops": None, "tower_flops": None, "kv_bytes": None}
    positions = [_per_layer(facts["tokens"]) for facts in seen]
    tower = shape.tower_flops(reduction)
    return {
        "prefill_flops": fmean(shape.decoder.prefill_flops(row) for row in positions),
        "tower_flops": fmean(tower * facts["patches"] / shape.patches for facts in seen),
        "kv_bytes": fmean(shape.decoder.kv_bytes(row, shape.kv_bytes) for row in positions),
    }
