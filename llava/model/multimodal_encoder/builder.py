"""Choose the vision tower class that a config asks for."""

from __future__ import annotations

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, CLIPVisionTowerS2
from llava.model.paths import is_hub_tower, resolve_path


def vision_tower_name(cfg) -> str | None:
    """Return the tower's name or path from a model config or from training arguments."""
    return getattr(cfg, "mm_vision_tower", None) or getattr(cfg, "vision_tower", None)


def build_vision_tower(vision_tower_cfg, **kwargs) -> CLIPVisionTower:
    """Build the vision tower that a config names.

    Args:
        vision_tower_cfg: A model config (`mm_vision_tower`) or training arguments (`vision_tower`).
        **kwargs: Passed to the tower, among them `delay_load`.

    Returns:
        The tower. With `delay_load=True` its modules exist whenever the geometry is known, with random weights.

    Raises:
        ValueError: The name is neither an existing path nor a known kind of CLIP tower.

    Source: LLaVA's `build_vision_tower`.
    """
    name = vision_tower_name(vision_tower_cfg)
    known_geometry = getattr(vision_tower_cfg, "mm_vision_config", None) is not None
    if not name or not (known_geometry or resolve_path(name, vision_tower_cfg) or is_hub_tower(name)):
        raise ValueError(
            f"unknown vision tower {name!r}: give the path of a CLIP vision model folder, or a hub name that starts "
            "with 'openai/' or 'laion/' (or contains 'ShareGPT4V')"
        )
    if getattr(vision_tower_cfg, "s2", False):
        return CLIPVisionTowerS2(name, args=vision_tower_cfg, **kwargs)
    return CLIPVisionTower(name, args=vision_tower_cfg, **kwargs)
