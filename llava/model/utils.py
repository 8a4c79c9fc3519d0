"""LLaVA's check for checkpoints of its first months, whose config.json calls them a plain Llama."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

UPGRADE = {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}


def auto_upgrade(config: str) -> None:
    """Upgrade the config.json of a first-generation checkpoint, if its owner says yes at the terminal.

    `load_pretrained_model` goes by the files and needs no upgrade; `AutoModelForCausalLM` does.

    Args:
        config: checkpoint folder. Anything else, such as a hub name, is left alone.

    Raises:
        ValueError: the folder needs it, and nobody can be asked or the answer is no.
    """
    path = Path(os.path.expanduser(config)) / "config.json"
    if "llava" not in str(config).lower() or not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if "llava" in content.get("model_type", ""):
        return
    if content.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type {content.get('model_type')!r} is no LLaVA model and cannot become one")
    wanted = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in UPGRADE.items())
    if not sys.stdin.isatty():
        raise ValueError(f"{path} is from LLaVA's first version; to upgrade it, write {wanted} into it")
    sys.stderr.write(f"{path} is from LLaVA's first version. Write {wanted} into it? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ValueError(f"{path} was left as it is; it needs {wanted}")
    part = path.with_name("config.json.part")
    part.write_text(json.dumps(content | UPGRADE, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
    logger.info("upgraded %s", path)
