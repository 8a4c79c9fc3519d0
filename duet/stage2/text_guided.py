"""DUET-VLM Sec. 3.2: rank visual tokens by the attention that text rows pay to them.

Shapes: B batch, L sequence, R query rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.budget import kept_tokens
from duet.queries import marked_indices
from duet.signals import DecoderSignals
from duet.stage2 import LANGUAGE_REDUCERS, Decision, Stage, keep_best
from duet.tokens import on_device, top_indices

if TYPE_CHECKING:
    from duet.config import DuetConfig

OPTIONS = {
    "causal": True,  # False: rows attend up to the last of them, as in the released code for Qwen
    "recount": False,  # True counts as that code does after the first stage, see ``_recounted``
}


@LANGUAGE_REDUCERS.register("text_guided", options=OPTIONS)
@torch.no_grad()
def text_guided(stage: Stage, config: DuetConfig) -> Tensor | Decision:
    """Return the attention that each position receives from the query rows, evaluated with the next layer's weights.

    ``config.queries`` chooses the rows. Shapes: returns [B, L] in fp32, averaged over heads and rows; ranking is
    detached. Source: DUET-VLM Sec. 3.2; with the last row and no stage 1 this is PyramidDrop (arXiv 2410.17247).
    """
    if config.option("recount"):
        return _recounted(stage, config)
    return _score(stage, config, stage.state.queries, stage.state.rows)


def _score(stage: Stage, config: DuetConfig, queries: Tensor, most: int | None) -> Tensor:
    signals = stage.next_signals()
    rows, counted = marked_indices(queries, most)
    if config.queries == "salient":
        rows, counted = salient_rows(signals, rows, counted, config.salient_tokens)
    elif isinstance(config.queries, tuple):
        rows, counted = _chosen_rows(rows, counted, config.queries)
    return signals.received(rows, counted, bool(config.option("causal")))


def _recounted(stage: Stage, config: DuetConfig) -> Decision:
    """Keep what the released Qwen code keeps, which takes the kept number for the entering one after each stage.

    From the second stage on it looks at too few tokens, keeps a share of a share of them, and takes the others for
    text: they stay, and rank where all text does. A stage that keeps nothing is not asked and drops everything.
    """
    visual = stage.state.visual
    looked, kept = [], []
    for before, entering in zip(stage.before, stage.entered.visual.sum(1).tolist(), strict=True):
        seen = counted = entering
        for layer, ratio in config.schedule.items():
            if layer <= stage.layer:
                following = kept_tokens(counted, ratio)
                if layer == stage.layer:
                    looked.append(min(seen, before))
                    kept.append(min(following, before))
                counted, seen = following, kept_tokens(following, ratio)
    first = visual & (visual.cumsum(1) <= on_device(looked, visual.device).unsqueeze(1))
    others = visual & ~first
    score = _score(
        stage, config, stage.state.queries | others if config.queries == "all" else stage.state.queries, None
    )
    left = [before - seen for before, seen in zip(stage.before, looked, strict=True)]
    return Decision(keep_best(score, first, kept) | others, [a + b for a, b in zip(kept, left, strict=True)])


def salient_rows(signals: DecoderSignals, rows: Tensor, counted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` text tokens that receive most text-to-text attention, plus the last one."""
    received = signals.received_among(rows, counted)
    last = counted.sum(1, keepdim=True).clamp(min=1) - 1
    received = received.masked_fill(~counted, -1.0).scatter(1, last, 2.0)
    picked = top_indices(received, min(count + 1, rows.shape[1])).sort(dim=1).values
    return rows.gather(1, picked), counted.gather(1, picked)


def _chosen_rows(rows: Tensor, counted: Tensor, indices: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the rows with the given indices; a sample that has none of them uses its last row."""
    total = counted.sum(1, keepdim=True)
    wanted = on_device(indices, rows.device).expand(rows.shape[0], -1)
    wanted = torch.where(wanted < 0, wanted + total, wanted)
    inside = (wanted >= 0) & (wanted < total)
    inside[:, 0] |= ~inside.any(1)
    wanted = torch.where(inside & (wanted >= 0) & (wanted < total), wanted, total - 1).clamp(min=0)
    return rows.gather(1, wanted), inside & counted.gather(1, wanted)
