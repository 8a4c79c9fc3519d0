"""Call a vision tower whose forward may be another project's, so that stage 1 acts or its absence is an error."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


def run_tower(tower: Any, images: Tensor, further: dict[str, Any]) -> Any:
    """Encode pictures with what the tower's forward takes.

    Args:
        tower: `CLIPVisionTower`, or what another project put in its place.
        images: [B, 3, H, W].
        further: arguments beside the pictures (see `CLIPVisionTower.forward`), the reduction among them.

    Returns:
        What the tower's forward returns.

    Raises:
        ValueError: Stage 1 is in force, and this forward does not apply it.
    """
    reduction = further.get("reduction")
    names = inspect.signature(tower.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    if reduction is None or reduction.stage1 == "none":
        return tower(images, **{name: value for name, value in further.items() if takes_all or name in names})
    if not takes_all and not set(further) <= set(names):
        missing = sorted(set(further) - set(names))
        raise ValueError(f"{_whose(tower)} takes no {missing[0]!r}, so {_advice(reduction)}")
    features = tower(images, **further)
    patches = getattr(tower, "num_patches", 0)
    expected = reduction.adaptive or reduction.keeps_every_patch(patches) or set(further) & {"tiles", "layouts"}
    if not expected and isinstance(features, Tensor) and features.shape[1] >= patches > reduction.entering:
        raise ValueError(
            f"{_whose(tower)} returned all {features.shape[1]} tokens of a picture, so {_advice(reduction)}"
        )
    return features


def _whose(tower: Any) -> str:
    function = getattr(tower.forward, "__func__", tower.forward)
    return f"{type(tower).__name__}.forward (of {getattr(function, '__module__', None) or 'another project'})"


def _advice(reduction: Any) -> str:
    return (
        f"stage 1 ({reduction.stage1}) of the reduction cannot act there: hand `reduction` and the other arguments on "
        "to llava's own CLIPVisionTower.forward, or set a reduction with stage1='none', which drops tokens in the "
        "language model only"
    )
