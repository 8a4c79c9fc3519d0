"""Where files that a checkpoint names are: next to the checkpoint, below the working directory, or on the hub."""

from __future__ import annotations

import os


def is_hub_tower(name: str) -> bool:
    """Whether a tower name is one that LLaVA fetches from the hub."""
    return name.startswith(("openai", "laion")) or "ShareGPT4V" in name


def resolve_path(name: str, config=None) -> str | None:
    """Find a path that a config mentions.

    Args:
        name: An absolute path, or one relative to the checkpoint folder or to the working directory.
        config: A model config whose `_name_or_path` is the folder that it was read from, or None.

    Returns:
        The existing path, or None. The checkpoint folder is looked at before the working directory, so that a
        checkpoint can be moved together with its tower.
    """
    folder = getattr(config, "_name_or_path", "") or ""
    candidates = [name] if os.path.isabs(name) else [os.path.join(folder, name), name] if folder else [name]
    for candidate in candidates:
        if os.path.exists(candidate):
            return os.path.normpath(candidate)
    return None
