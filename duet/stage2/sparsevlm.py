"""SparseVLM (arXiv 2410.04417): the text that matches the picture rates it, and pruned tokens are recycled into few.

Shapes: B batch, L sequence, N visual tokens, T text tokens, R raters, H heads, M recycled tokens, C clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duet.queries import marked_indices
from duet.signals import DecoderSignals
from duet.stage2 import LANGUAGE_REDUCERS, Decision, Stage, keep_best
from duet.tokens import TokenState, gather_tokens, rank_descending, top_indices

if TYPE_CHECKING:
    from duet.config import DuetConfig

_LEAST_PRIOR = 0.1  # the release divides by a prior that comes near zero and below; ours stops here

OPTIONS = {
    "recycle": True,  # versions 1.0 and 1.5: merge part of the pruned tokens into new ones, which count
    "plus": False,  # version 2.0: correct attention for distance, and use the heads that look at the picture most
    "heads": 0,  # how many heads then; 0 is half of them (14 in the release, half of Qwen's)
    "scale": 0.0,  # version 1.0: each sample keeps scale * rank + bias tokens, at most what the schedule says
    "bias": 0.0,
}


@LANGUAGE_REDUCERS.register("sparsevlm", options=OPTIONS)
def sparsevlm(stage: Stage, config: DuetConfig) -> Decision:
    """Keep the tokens that the raters attend to in the layer that ran last, and recycle some of the others.

    Raters are the text tokens after the image that resemble its tokens more than average. Of the tokens that go, the
    best-scored three tenths are clustered, and each cluster's mean stays at the place of its centre, as one of the
    tokens that the schedule counts. (The release puts them after the last surviving visual token.)
    Source: SparseVLM Sec. 3 and its code, versions 1.0, 1.5 and 2.0; the clustering is DPC-KNN.
    """
    recycle = bool(config.option("recycle"))
    with torch.no_grad():
        signals = stage.last_signals()
        text = stage.state.text
        rated = raters(stage.entered).gather(1, stage.state.origin) & text
        rows, counted = marked_indices(torch.where(rated.any(1, keepdim=True), rated, text))
        if config.option("plus"):
            score = _corrected(signals, rows, counted, stage.state.visual, config.option("heads"))
        else:
            score = signals.received(rows, counted)
        kept = stage.kept
        if config.option("scale") > 0:
            ranks = _ranks(signals, rows, counted, stage.state.visual)
            wanted = [_adaptive(n, rank, config, recycle) for n, rank in zip(stage.before, ranks, strict=True)]
            kept = [min(most, number) for most, number in zip(kept, wanted, strict=True)]
    if recycle:
        return _recycle(stage, score, kept)
    return Decision(keep_best(score, stage.state.visual, kept), kept)


def raters(entered: TokenState) -> Tensor:
    """Mark the text tokens whose embeddings match the picture's more than average. Shapes: returns [B, L] bool.

    Every visual token spreads one vote over the text by softmaxed dot products; a text token rates if it gets more than
    the mean. Where none does (all are alike), all rate.
    """
    visual, is_visual = marked_indices(entered.visual)
    text, is_text = marked_indices(entered.text)
    logits = gather_tokens(entered.hidden, visual).float() @ gather_tokens(entered.hidden, text).float().transpose(1, 2)
    votes = logits.masked_fill(~is_text.unsqueeze(1), float("-inf")).softmax(-1) * is_visual.unsqueeze(-1)
    share = votes.sum(1) / is_visual.sum(1, keepdim=True).clamp(min=1)
    above = is_text & (share > share.sum(1, keepdim=True) / is_text.sum(1, keepdim=True).clamp(min=1))
    chosen = torch.where(above.any(1, keepdim=True), above, is_text)
    return torch.zeros_like(entered.text).scatter(1, text, chosen)


def _corrected(signals: DecoderSignals, rows: Tensor, counted: Tensor, visual: Tensor, heads: int) -> Tensor:
    """Return the raters' attention divided by the prior of positions, over the heads with most of it, [B, L]."""
    total = torch.zeros(())
    for index, mark, probabilities in signals.rows(rows, counted):
        prior = signals.position_prior(index).clamp(min=_LEAST_PRIOR).unsqueeze(1)
        total = total.to(prior.device) + (probabilities / prior * mark[:, None, :, None]).sum(2)
    mass = (total * visual.unsqueeze(1)).sum(-1)
    best = top_indices(mass, heads or max(1, mass.shape[1] // 2))
    return gather_tokens(total, best).mean(1) / counted.sum(1, keepdim=True).clamp(min=1)


def _ranks(signals: DecoderSignals, rows: Tensor, counted: Tensor, visual: Tensor) -> list[int]:
    """Return each sample's numerical rank of the raters' attention to visual tokens, [R, N], averaged over heads."""
    attention = torch.cat([probabilities.mean(1) for _, _, probabilities in signals.rows(rows, counted)], dim=1)
    matrices = (attention[row][counted[row]][:, visual[row]] for row in range(len(visual)))
    return [int(torch.linalg.matrix_rank(matrix)) if matrix.numel() else 0 for matrix in matrices]


def _adaptive(before: int, rank: int, config: DuetConfig, recycle: bool) -> int:
    """Return how many tokens a sample goes on with: ``min(int(scale * rank + bias), before - 1)`` and the recycled."""
    if rank >= before:
        return before
    survivors = max(0, min(int(config.option("scale") * rank + config.option("bias")), before - 1))
    return survivors + (recycled(before - survivors) if recycle else 0)


def recycled(pruned: int) -> int:
    """Return how many new tokens stand for ``pruned`` old ones: a tenth of three tenths, and one."""
    return (3 * pruned // 10 + 1) // 10 + 1 if pruned else 0


def survivors(before: int, total: int) -> int:
    """Return how many tokens survive as they are, so that ``total`` are left with the recycled ones."""
    fitting = (kept for kept in range(total, -1, -1) if kept + recycled(before - kept) <= total)
    return next(fitting, 0)


def _recycle(stage: Stage, score: Tensor, kept: list[int]) -> Decision:
    """Keep ``kept[b]`` tokens of each sample, recycled ones among them."""
    state = stage.state
    keep = torch.zeros_like(state.visual)
    merged_into = torch.full_like(state.origin, -1)
    order = rank_descending(score.masked_fill(~state.visual, float("-inf")))
    places: list[Tensor] = []
    tokens: list[Tensor] = []
    for row, (before, total) in enumerate(zip(stage.before, kept, strict=True)):
        alive = survivors(before, total)
        keep[row, order[row, :alive]] = True
        clusters = total - alive
        if not clusters:
            continue
        pool = order[row, alive : alive + 3 * (before - alive) // 10 + 1]
        hidden = state.hidden[row, pool]
        centres, assigned = density_peaks(hidden, clusters)
        means = hidden.float().new_zeros(clusters, hidden.shape[1]).index_add(0, assigned, hidden.float())
        means = means / assigned.bincount(minlength=clusters).unsqueeze(1)
        keep[row, pool[centres]] = True
        merged_into[row, pool] = pool[centres][assigned]
        places.append(pool[centres] + row * keep.shape[1])
        tokens.append(means.to(hidden.dtype))
    if not places:
        return Decision(keep, kept)
    flat = state.hidden.flatten(0, 1).index_put((torch.cat(places),), torch.cat(tokens))
    return Decision(keep, kept, flat.view_as(state.hidden), merged_into)


@torch.no_grad()
def density_peaks(hidden_MD: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster tokens around peaks of density (DPC-KNN), with as many neighbours as clusters.

    Shapes: hidden [M, D]; returns the centres [C] among the tokens and each token's cluster [M].
    Equal densities count in the order of the tokens (the release adds random noise instead).
    """
    points = hidden_MD.float()
    distance = torch.cdist(points[None], points[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
    distance = distance / points.shape[1] ** 0.5
    nearest = distance.sort(dim=1).values[:, :clusters]
    density = (-(nearest * nearest).mean(1)).exp()
    place = torch.empty_like(order := rank_descending(density[None])[0])
    place[order] = torch.arange(len(place), device=place.device)
    denser = place.unsqueeze(0) < place.unsqueeze(1)
    separation = torch.where(denser, distance, distance.max()).min(1).values
    centres = top_indices((density * separation)[None], clusters)[0]
    assigned = top_indices(-distance[:, centres], 1)[:, 0]
    assigned[centres] = torch.arange(len(centres), device=centres.device)
    return centres, assigned
