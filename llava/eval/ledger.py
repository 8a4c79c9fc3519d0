"""How many visual tokens every decoder layer saw: measured while answering, and averaged over samples afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from duet import DuetConfig
from duet.tracing import Trace


def sample_metadata(trace: Trace, patches: Sequence[int], limit: int | None) -> list[dict[str, Any]]:
    """What one batch's prefill saw, per sample.

    Args:
        trace: recorded around the batch's generation.
        patches: patches of each sample's pictures, before any reduction.
        limit: positions after which the model cuts a prompt, or None.

    Returns:
        Per sample `patches`, `visual` (pairs of visual tokens and the number of consecutive layers that saw them), and
        `cut` if the prompt filled the limit. An empty dict each where nothing was recorded.
    """
    if not trace.passes:
        return [{} for _ in patches]
    segments, out = trace.passes[0], []
    for row, count in enumerate(patches):
        visual = [[int(segment.visual[row]), segment.stop - segment.start] for segment in segments]
        facts: dict[str, Any] = {"patches": count, "visual": visual}
        if limit is not None and segments[0].tokens[row] >= limit:
            facts["cut"] = True
        out.append(facts)
    return out


def summarise(metadata: Sequence[dict[str, Any]], reduction: DuetConfig | None, depth: int) -> dict[str, Any]:
    """Average over the samples that had a picture.

    Args:
        metadata: what `sample_metadata` gave, of all samples.
        reduction: the reduction in force.
        depth: decoder layers.

    Returns:
        `samples` (with a picture), `tokens_per_layer`, `average_tokens` (None without such samples), `untouched` (for
        every stage the samples in which it removed nothing although there was something), and `cut` (prompts that
        filled the model's context).
    """
    per_layer = [
        [count for count, layers in facts["visual"] for _ in range(layers)]
        for facts in metadata
        if facts.get("visual") and facts["visual"][0][0]
    ]
    patches = [facts["patches"] for facts in metadata if facts.get("visual") and facts["visual"][0][0]]
    means = [sum(column) / len(per_layer) for column in zip(*per_layer, strict=True)]
    untouched = {}
    if reduction is not None and reduction.stage1 != "none":
        untouched["stage 1"] = sum(row[0] == count for row, count in zip(per_layer, patches, strict=True))
    for layer in reduction.for_depth(depth).schedule if reduction is not None else ():
        untouched[f"stage 2, layer {layer}"] = sum(row[layer - 1] == row[layer] > 0 for row in per_layer)
    return {
        "samples": len(per_layer),
        "tokens_per_layer": [round(value, 3) for value in means],
        "average_tokens": round(sum(means) / len(means), 3) if means else None,
        "untouched": untouched,
        "cut": sum(bool(facts.get("cut")) for facts in metadata),
    }
