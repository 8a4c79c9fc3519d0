"""What an answer depends on, as one record with a short digest that goes into file names."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from llava.eval.tasks.base import Question
from llava.model.paths import resolve_path

PROTOCOL = 2
"""Raise it when the same model and questions would give other prompts, pictures or scores."""

_MODEL_FILES = re.compile(
    r"(config|adapter_config|preprocessor_config|processor_config|generation_config|added_tokens|vocab)\.json"
    r"|(tokenizer|special_tokens).*|merges\.txt"
    r"|(model|pytorch_model|adapter_model|mm_projector|non_lora_trainables).*\.(safetensors|bin|index\.json)"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Settings:
    """What an answer depends on. Batch size, processes and library versions do not belong here.

    Attributes:
        benchmark: its name.
        questions: digest of all questions, see `questions_digest`.
        model: fingerprint of the model's files, see `model_fingerprint`.
        reduction: the token reduction as a dict, or None.
        template: the conversation template.
        decoding: arguments of `generate`.
        dtype: the weights' type, and quantisation.
        attention: the decoder's attention implementation.
        visuals: how pictures or videos become pixels.
        protocol: `PROTOCOL`.
    """

    benchmark: str
    questions: str
    model: str
    reduction: dict[str, Any] | None
    template: str
    decoding: dict[str, Any]
    dtype: str
    attention: str
    visuals: str
    protocol: int = PROTOCOL

    @property
    def digest(self) -> str:
        """12 hexadecimal characters."""
        return _digest(json.dumps(asdict(self), sort_keys=True))

    @property
    def stem(self) -> str:
        """The first part of every file name of this benchmark with these settings."""
        return f"{self.benchmark}-{self.digest}"


def questions_digest(questions: Sequence[Question], root: Path) -> str:
    """Digest of what is asked: keys, texts, and the places of the pictures below `root`."""
    lines = ([q.key, q.text, [os.path.relpath(path, root) for path in q.visuals]] for q in questions)
    return _digest("\n".join(json.dumps(line) for line in lines))


def model_fingerprint(model_path: str, model_base: str | None = None, config: Any = None) -> str:
    """Digest of all files that a model is made from: its own, its base's and its vision tower's.

    A folder is read in whole (about a second per gigabyte); a model from the hub is known by its commit.

    Args:
        model_path: checkpoint folder or hub name.
        model_base: language model below a LoRA or projector folder.
        config: the loaded model's config, which names its vision tower.
    """
    parts = [f"model {_fingerprint(model_path)}"]
    base = model_base or _base_of_adapter(model_path)
    parts += [f"base {_fingerprint(base)}"] if base else []
    tower = getattr(config, "mm_vision_tower", None) or ""
    path = resolve_path(tower, config) if tower else None
    # A path that is gone: the checkpoint holds the tower's weights itself, or it could not have been loaded.
    parts += [f"tower {_fingerprint(path or tower)}"] if path or (tower and not os.path.isabs(tower)) else []
    return _digest("\n".join(parts))


def _base_of_adapter(path: str) -> str | None:
    file = Path(path) / "adapter_config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") if file.is_file() else None


def _fingerprint(path: str) -> str:
    if not os.path.isdir(path):
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        found = (cached_file(path, name, **quiet) for name in ("config.json", "adapter_config.json"))
        folder = next((os.path.dirname(file) for file in found if file), None)
        if folder is None or _COMMIT.fullmatch(os.path.basename(folder)):
            return f"{path}@{folder and os.path.basename(folder)}"
        path = folder
    return _hash_files(sorted(file for file in Path(path).iterdir() if _MODEL_FILES.fullmatch(file.name)))


def _hash_files(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
