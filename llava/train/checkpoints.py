"""Checkpoints that are either whole or recognised as broken, for every kind of run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from duet.errors import UserError
from llava.train.lora import get_mm_adapter_state_maybe_zero_3, get_peft_state_non_lora_maybe_zero_3

logger = logging.getLogger(__name__)

MARKER = "checkpoint_complete.json"
RUN_MARKER = "run_complete.json"
PROJECTOR_BIN = "mm_projector.bin"
PROJECTOR_FILE = "mm_projector.safetensors"
NON_LORA_FILE = "non_lora_trainables.bin"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written or read; the message says what is safe and what to do."""


def write_json_atomically(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees either all of it or nothing."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def step_of(folder: Path) -> int | None:
    """Step of a folder named `checkpoint-N`; None for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match.group(1)) if match else None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All `checkpoint-N` folders, oldest first."""
    root = Path(output_dir)
    found = [path for path in root.glob("checkpoint-*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files below a folder, by name; several are read at a time."""

    def digest(name: str) -> str:
        total = hashlib.sha256()
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 24):
                total.update(block)
        return total.hexdigest()

    names = list(names)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by name."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def mark_complete(folder: Path, **facts: Any) -> None:
    """Write the marker that makes a checkpoint count: every file with size and checksum. Call it last, on one rank."""
    files = sizes(folder)
    files.pop(MARKER, None)
    content = {"files": files, "sha256": checksums(folder, files), "time": time.time()}
    write_json_atomically(folder / MARKER, content | facts)


def read_marker(path: Path) -> dict[str, Any]:
    """Read the marker of a checkpoint or of a finished run.

    Returns:
        What it says; `files` maps names to sizes, and `sha256`, where it is there, the same names to checksums.

    Raises:
        CheckpointError: it cannot be read, or says nothing about files.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path.name} cannot be read ({err})") from err
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path.name} names no files")
    sums = content.get("sha256", dict.fromkeys(files))
    if not isinstance(sums, dict) or set(sums) != set(files):
        raise CheckpointError(f"{path.name} has checksums of other files than it names")
    return content


def names_files(path: Path) -> bool:
    """Whether the marker of a finished run says which files it left; older ones do not, nor do damaged ones."""
    try:
        return bool(read_marker(path))
    except CheckpointError:
        return False


def defect_of(folder: Path, contents: bool = True, marker: str = MARKER) -> str | None:
    """Say what is wrong with a checkpoint; None when it is whole.

    Args:
        folder: the checkpoint.
        contents: read every file and compare checksums; False compares sizes only.
        marker: name of the marker.
    """
    if not (folder / marker).is_file():
        return f"it has no {marker}: the run ended while it was being saved"
    try:
        said = read_marker(folder / marker)
        found = sizes(folder)
        for name, size in said["files"].items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != size:
                return f"{name} has {found[name]} bytes instead of {size}"
        expected: dict[str, str] = said.get("sha256", {}) if contents else {}
        actual = checksums(folder, expected)
    except (CheckpointError, OSError) as err:
        return str(err)
    return next(
        (f"{name} has other contents than were saved" for name in actual if actual[name] != expected[name]), None
    )


def last_complete(output_dir: str | Path, contents: bool = True) -> Path | None:
    """Newest whole checkpoint; broken ones are reported and passed over. `contents` as in `defect_of`."""
    for folder in reversed(checkpoints(output_dir)):
        defect = defect_of(folder, contents)
        if defect is None:
            return folder
        logger.warning("%s is not used: %s", folder, defect)
    return None


def rotate(output_dir: str | Path, limit: int | None, keep: Path) -> None:
    """Delete broken checkpoints that are older than `keep`, and whole ones beyond the limit.

    Args:
        output_dir: of the run.
        limit: `--save_total_limit`; None or 0 keeps every whole one.
        keep: the checkpoint that was just completed.
    """
    older = [path for path in checkpoints(output_dir) if (step_of(path) or 0) < (step_of(keep) or 0)]
    broken = [path for path in older if defect_of(path, contents=False) is not None]
    whole = [path for path in older if path not in broken]
    surplus = whole[: max(0, len(whole) + 1 - limit)] if limit else []
    for path in broken + surplus:
        shutil.rmtree(path, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """Size of everything below a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def save_failure(folder: Path, err: BaseException) -> CheckpointError:
    """Remove a half-written checkpoint and describe what happened."""
    written = folder_bytes(folder) if folder.is_dir() else 0
    shutil.rmtree(folder, ignore_errors=True)
    root = folder.parent
    free = shutil.disk_usage(root).free if root.is_dir() else 0
    kept = last_complete(root, contents=False)
    safe = f"{kept} is whole: the same command goes on from it" if kept else "no checkpoint was complete yet"
    return CheckpointError(
        f"could not save {folder} ({err}). {written / 1e6:.1f} MB had been written and were removed; that disk has "
        f"{free / 1e9:.2f} GB free now. Free some space or choose another --output_dir; {safe}."
    )


def looks_like_write_failure(err: BaseException) -> bool:
    """True for what a full disk, a quota or a file-size limit raise through Python, torch and safetensors."""
    if isinstance(err, OSError):
        return True
    words = (
        "no space left",
        "file too large",
        "disk quota",
        "os error 28",
        "os error 27",
        "i/o error",
        "failed writing",
        "write failed",
    )
    text = str(err).lower()
    return any(word in text for word in words) or "unexpected pos" in text


def projector_state(model: torch.nn.Module, with_embeddings: bool = False) -> dict[str, torch.Tensor]:
    """State that stage 1 saves, under LLaVA's key names. Every rank has to call it under ZeRO-3."""
    keys = ["mm_projector", "vision_resampler", "image_newline"] + (
        ["embed_tokens", "embed_in"] if with_embeddings else []
    )
    state = get_mm_adapter_state_maybe_zero_3(model.named_parameters(), keys)
    return {re.sub(r"^(base_model\.model\.)+", "", name): value for name, value in state.items()}


def save_projector(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a projector in both forms: safetensors, and `mm_projector.bin` for LLaVA's own loaders."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: value.contiguous() for name, value in state.items()}
    save_file(contiguous, folder / PROJECTOR_FILE, metadata={"format": "pt"})
    torch.save(contiguous, folder / PROJECTOR_BIN)


def save_adapter(model: Any, folder: Path, write: bool) -> None:
    """Write a LoRA run: adapter, projector and config. Every rank has to call it under ZeRO-3.

    Args:
        model: the PEFT model.
        folder: target.
        write: True on the rank that writes.

    Source: LLaVA's `adapter_model`, `non_lora_trainables.bin`, `config.json`.
    """
    lora = {
        name: value
        for name, value in get_mm_adapter_state_maybe_zero_3(model.named_parameters(), _adapter_keys(model)).items()
    }
    rest = get_peft_state_non_lora_maybe_zero_3(model.named_parameters())
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = deepcopy(model.config)
    vars(config).pop("quantization_config", None)  # how the base is held here, not what adapter and projector need
    config.save_pretrained(folder)
    model.save_pretrained(folder, state_dict=lora)
    torch.save(rest, folder / NON_LORA_FILE)


def _adapter_keys(model: Any) -> list[str]:
    bias = model.peft_config[model.active_adapter].bias
    return ["lora_"] if bias == "none" else ["lora_", "bias"]


def safe_save_model_for_hf_trainer(trainer: Any, output_dir: str) -> None:
    """Write the final files of a run (LLaVA's name).

    Stage 1 in a folder that is itself called `checkpoint-N` goes to `PARENT/mm_projector/checkpoint-N.bin`, where
    LLaVA's scripts look for it. Every rank has to call it.
    """
    folder = Path(output_dir)
    if getattr(trainer.args, "tune_mm_mlp_adapter", False) and step_of(folder) is not None:
        state = projector_state(trainer.model, getattr(trainer.args, "use_im_start_end", False))
        if trainer.args.should_save:
            trainer.model.config.save_pretrained(folder)
            target = folder.parent / "mm_projector"
            target.mkdir(parents=True, exist_ok=True)
            torch.save(state, target / f"{folder.name}.bin")
        return
    trainer.save_model(str(folder))
