"""Next-token loss with logits only where a label is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duet.tokens import IGNORE_INDEX


def causal_lm_loss(
    hidden_BLD: Tensor, labels_BL: Tensor, lm_head: nn.Module, num_items_in_batch: int | Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of the next token, in fp32.

    The head runs on supervised positions only; the result equals that of full logits.

    Args:
        hidden_BLD: output of the decoder's final norm, [B, L, D].
        labels_BL: [B, L], -100 where nothing is predicted; position ``t`` is predicted from ``t - 1``.
        lm_head: maps [n, D] to [n, V].
        num_items_in_batch: divide the sum by this number instead of by the number of labels here.

    Returns:
        A scalar. Without any label it is zero and still connected to ``hidden``, so that no rank skips its backward.
    """
    targets = labels_BL[:, 1:]
    supervised = targets != IGNORE_INDEX
    picked = hidden_BLD[:, :-1][supervised]
    if picked.shape[0] == 0:
        return lm_head(hidden_BLD[:1, :1]).float().sum() * 0.0
    total = nn.functional.cross_entropy(lm_head(picked).float(), targets[supervised].to(picked.device), reduction="sum")
    count = picked.shape[0] if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)
