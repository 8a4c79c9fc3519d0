"""Which parameters learn, and at which rate."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

PARTS = {
    "mm_projector": ("mm_projector", "multi_modal_projector", "merger", "deepstack_merger_list"),
    "vision_tower": ("vision_tower", "image_tower", "video_tower", "visual"),
}
"""What each part is called in LLaVA and in transformers; a projector inside of a tower is a projector."""


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to: `mm_projector`, `vision_tower` or `language`."""
    keys = set(name.split("."))
    return next((part for part, names in PARTS.items() if keys & set(names)), "language")


def numel(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also when ZeRO-3 keeps only a slice of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    decay_names: Iterable[str],
    *,
    weight_decay: float,
    learning_rate: float,
    projector_lr: float | None = None,
    tower_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Sort trainable parameters into the optimizer's groups.

    Args:
        named: names and parameters; those that do not require gradients are left out.
        decay_names: names that weight decay applies to.
        weight_decay: for those; 0 for the others.
        learning_rate: for everything without a rate of its own.
        projector_lr: for `mm_projector`; None means `learning_rate`.
        tower_lr: for an unfrozen tower; None means `learning_rate`.

    Returns:
        Groups with `params`, `weight_decay`, `lr` and a `name`; none is empty.

    Raises:
        ValueError: nothing is trainable.

    Source: LLaVA's trainer: (rest, projector) x (decay, no decay).
    """
    rates = {"mm_projector": projector_lr, "vision_tower": tower_lr, "language": None}
    decayed = set(decay_names)
    members: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        own = part if rates[part] is not None else "base"
        members[own, name in decayed].append(parameter)
    if not members:
        raise ValueError(
            "no parameter is trainable: check --tune_mm_mlp_adapter, --freeze_mm_mlp_adapter, --freeze_backbone"
        )
    groups = []
    for own in ("base", "mm_projector", "vision_tower"):
        for decays in (True, False):
            if members[own, decays]:
                groups.append(
                    {
                        "params": members[own, decays],
                        "weight_decay": weight_decay if decays else 0.0,
                        "lr": learning_rate if own == "base" else rates[own],
                        "name": own if decays else f"{own}_no_decay",
                    }
                )
    return groups


def learning_rates(groups: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Current learning rates by the groups' names, for the log; groups without a name are `base`."""
    rates: dict[str, float] = {}
    for group in groups:
        own = str(group.get("name", "base")).removesuffix("_no_decay")
        rates["lr" if own == "base" else f"lr_{own}"] = float(group["lr"])
    return rates


def trainable_table(model: nn.Module) -> str:
    """Table of how many parameters learn in each part of the model."""
    total: dict[str, int] = defaultdict(int)
    learns: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        part = part_of(name) + (" (LoRA)" if "lora_" in name else "")
        total[part] += numel(parameter)
        learns[part] += numel(parameter) if parameter.requires_grad else 0
    lines = [f"{'part':<22}{'parameters':>16}{'trainable':>16}"]
    lines += [f"{part:<22}{total[part]:>16,}{learns[part]:>16,}" for part in sorted(total)]
    lines.append(f"{'all':<22}{sum(total.values()):>16,}{sum(learns.values()):>16,}")
    return "\n".join(lines)


def frozen_digest(model: nn.Module, part: str = "vision_tower") -> str | None:
    """Fingerprint of the frozen parameters of one part, to prove that training left them alone.

    Args:
        model: any model; parameters that ZeRO-3 has split are read as the slice that this rank holds.
        part: `vision_tower`, `mm_projector` or `language`.

    Returns:
        A hex digest; None when the part has no frozen parameter.
    """
    digest = hashlib.sha256()
    seen = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or part_of(name) != part:
            continue
        seen = True
        held = getattr(parameter, "ds_tensor", parameter).detach()
        # The sum of raw bytes is cheap on any device; positions matter through a second, weighted sum.
        raw = held.contiguous().view(-1).view(torch.uint8).to(torch.int64)
        weights = torch.arange(raw.numel(), device=raw.device) % 65521 + 1
        digest.update(f"{name}:{int(raw.sum())}:{int((raw * weights).sum())};".encode())
    return digest.hexdigest() if seen else None
