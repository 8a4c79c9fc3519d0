"""A result looks at itself: NaN, empty or identical answers, and scores at chance are no results but a broken run.

A finding is a sentence. It is stored with what was computed, shown in the tables, and makes the command that computed
it end with `BROKEN`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from duet.errors import UserError

BROKEN = 3
"""Exit status of a command whose result is written and broken."""
FEW_ANSWERS = 20
"""Fewer answers may all be the same, or all be empty, by chance."""
FEW_MARKS = 60
"""Fewer questions say nothing about chance."""
SHORT_RUN = 100
"""A training of fewer steps is a trial: nothing is expected of it."""
MOSTLY = 0.9
"""Answering everything alike is right where this share of the true answers is alike."""
_SURE = 2.33  # one-sided 99 %
_SHOWN = 5

CAUSES = (
    "Likely causes: weights of a run that diverged (look at its losses), a library that changed how generation uses "
    "the cache (`duet doctor` says whether this installation is right), another conversation template than in "
    "training, or float16 that overflows (try --dtype bfloat16 or float32)."
)


class BrokenResult(UserError):
    """What was computed is written, and no result; the message says why."""


class NonFiniteWeights(FloatingPointError):
    """Weights are NaN or infinite; the message names them."""


def non_finite_weights(model: nn.Module) -> list[str]:
    """Return the names of floating-point weights that hold NaN or infinity; of partitioned ones, this rank's part."""
    return [name for name, tensor in _floating(model) if not bool(torch.isfinite(tensor).all())]


def _floating(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        held: Any = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's ZeRO-3 keeps a part of each here
        if isinstance(held, Tensor) and held.is_floating_point() and held.device.type != "meta":
            yield name, held.detach()


def require_finite_weights(model: nn.Module, whose: str) -> None:
    """Refuse a model whose weights are not all finite.

    Args:
        model: the model.
        whose: what the weights are of, for the message.

    Raises:
        NonFiniteWeights: some are NaN or infinite; the message names the first of them.
    """
    refuse_non_finite(non_finite_weights(model), whose)


def refuse_non_finite(names: Sequence[str], whose: str) -> None:
    """Raise for weights that `non_finite_weights` found.

    Raises:
        NonFiniteWeights: there are any.
    """
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise NonFiniteWeights(
            f"{whose}: {len(names)} weights are NaN or infinite (not finite): {', '.join(names[:_SHOWN])}{more}. "
            "The run that made them diverged; take an older checkpoint, lower the learning rate, or train in bf16"
        )


class Watch(LogitsProcessor):
    """Notes which rows of a generation had NaN logits; it changes nothing and waits for no device until it is asked."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        bad = (torch.isnan(scores) | torch.isposinf(scores)).any(-1)
        self._seen = bad if self._seen is None or len(self._seen) != len(bad) else self._seen | bad
        return scores

    def rows(self, count: int) -> list[bool]:
        """Return which of `count` prompts had them; with beams, a prompt's rows count together."""
        if self._seen is None:
            return [False] * count
        return self._seen.view(count, -1).any(1).tolist()


@dataclass(frozen=True)
class Group:
    """Questions that are scored together.

    Attributes:
        right: how many were answered rightly.
        count: of how many.
        chance: the share that guessing gets.
    """

    right: float
    count: int
    chance: float

    @property
    def at_chance(self) -> bool:
        """Whether so few right answers are what guessing, or less, gives."""
        expected = self.count * self.chance
        return self.right <= expected + _SURE * sqrt(expected * (1 - self.chance))


def guessing(truths: Sequence[str]) -> float:
    """Return the share that the best constant answer gets right."""
    return max(Counter(truths).values()) / len(truths)


def about_answers(answers: Sequence[str], share_right: float | None, non_finite: int = 0) -> list[str]:
    """Return what is wrong with answers to questions that differ.

    Args:
        answers: what the model said.
        share_right: the share of right ones; None where it is not known, and then identical answers are not judged.
        non_finite: how many answers came from NaN logits.
    """
    found = []
    if non_finite:
        found.append(f"{non_finite} of {len(answers)} answers come from logits that are NaN (not finite)")
    if len(answers) < FEW_ANSWERS:
        return found
    kinds = set(answers)
    if kinds == {""}:
        found.append(f"all {len(answers)} answers are empty")
    elif len(kinds) == 1 and share_right is not None and share_right < MOSTLY:
        found.append(f"all {len(answers)} answers are {answers[0][:60]!r}, whatever was asked")
    return found


def about_chance(groups: Mapping[str, Group]) -> list[str]:
    """Return what is wrong with a trained model's scores: every group at or below chance. Few questions say nothing."""
    if sum(group.count for group in groups.values()) < FEW_MARKS or not all(g.at_chance for g in groups.values()):
        return []
    shown = ", ".join(
        f"{name} {100 * group.right / group.count:.1f} % (chance {100 * group.chance:.1f} %)"
        for name, group in groups.items()
    )
    return [f"after training, everything is at or below chance: {shown}"]


def describe(findings: Sequence[str]) -> str:
    """Return the findings and what they may come from, for a message."""
    return "; ".join(findings) + ". " + CAUSES


def refuse(findings: Mapping[str, Sequence[str]]) -> None:
    """End a command whose results are written.

    Args:
        findings: by the name of the result.

    Raises:
        BrokenResult: there are any.
    """
    said = [f"{name}: {'; '.join(found)}" for name, found in findings.items() if found]
    if said:
        lines = "\n  ".join(said)
        raise BrokenResult(
            f"no result, something is broken (what was computed is written, and marked):\n  {lines}\n{CAUSES}"
        )
