"""Checkpoints that are either whole or recognised as broken, for every kind of run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava.train.lora import get_mm_adapter_state_maybe_zero_3, get_peft_state_non_lora_maybe_zero_3

logger = logging.getLogger(__name__)

MARKER = "checkpoint_complete.json"
RUN_MARKER = "run_complete.json"
PROJECTOR_BIN = "mm_projector.bin"
PROJECTOR_FILE = "mm_projector.safetensors"
NON_LORA_FILE = "non_lora_trainables.bin"


class CheckpointError(RuntimeError):
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


def refuse_deepspeed_state(folder: Path) -> None:
    """Say so if a run without DeepSpeed is about to resume one with it.

    Raises:
        CheckpointError: the folder holds DeepSpeed's state only.
    """
    if not (folder / "optimizer.pt").is_file() and list(folder.glob("global_step*")):
        raise CheckpointError(f"{folder} was saved by a run with --deepspeed; resume it with --deepspeed")


def mark_complete(folder: Path, **facts: Any) -> None:
    """Write the marker that makes a checkpoint count; it lists every file and its size. Call it last, on one rank."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(MARKER, None)
    write_json_atomically(folder / MARKER, {"files": files, "time": time.time(), **facts})


def defect_of(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint; None when it is whole."""
    marker = folder / MARKER
    if not marker.is_file():
        return f"it has no {MARKER}: the run ended while it was being saved"
    try:
        files = json.loads(marker.read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, KeyError, OSError) as err:
        return f"{MARKER} cannot be read ({err})"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def last_complete(output_dir: str | Path) -> Path | None:
    """Newest whole checkpoint; broken ones are reported and passed over."""
    for folder in reversed(checkpoints(output_dir)):
        defect = defect_of(folder)
        if defect is None:
            return folder
        logger.warning("%s is not used: %s", folder, defect)
    return None


def resolve_resume(output_dir: str | Path, requested: str | bool | None) -> Path | None:
    """Choose the checkpoint to go on from.

    Args:
        output_dir: of the run; its newest whole checkpoint is used when nothing else is requested.
        requested: `--resume_from_checkpoint`: a folder, True, or None; False starts from the beginning.

    Returns:
        The folder, or None to start from the beginning.

    Raises:
        CheckpointError: the requested folder is missing or broken.
    """
    text = str(requested).lower()
    if text == "false":
        return None
    if requested is None or text == "true":
        return last_complete(output_dir)
    folder = Path(str(requested))
    if not folder.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint {folder}: there is no such folder")
    if (folder / MARKER).is_file():
        defect = defect_of(folder)
        if defect:
            raise CheckpointError(f"--resume_from_checkpoint {folder}: {defect}")
    elif not (folder / "trainer_state.json").is_file():
        raise CheckpointError(
            f"--resume_from_checkpoint {folder}: it has no trainer_state.json, so it is not a checkpoint"
        )
    return folder


def rotate(output_dir: str | Path, limit: int | None, keep: Path) -> None:
    """Delete broken checkpoints that are older than `keep`, and whole ones beyond the limit.

    Args:
        output_dir: of the run.
        limit: `--save_total_limit`; None or 0 keeps every whole one.
        keep: the checkpoint that was just completed.
    """
    older = [path for path in checkpoints(output_dir) if (step_of(path) or 0) < (step_of(keep) or 0)]
    broken = [path for path in older if defect_of(path) is not None]
    whole = [path for path in older if path not in broken]
    surplus = whole[: max(0, len(whole) + 1 - limit)] if limit else []
    for path in broken + surplus:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def exclusive(output_dir: str | Path, patience: float = 300.0) -> Iterator[None]:
    """Let only one run at a time write to an output folder; wait for one that is still saving.

    Args:
        output_dir: of the run.
        patience: seconds to wait.

    Raises:
        CheckpointError: another run still holds the folder.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as err:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{folder} is in use by another run; wait for it, or give this one its own --output_dir"
                    ) from err
                logger.warning("waiting for another run that still writes to %s", folder)
                time.sleep(2)
            except OSError as err:
                logger.warning("%s cannot be locked (%s): make sure that only one run uses it", folder, err)
                break
        yield


def folder_bytes(folder: Path) -> int:
    """Size of everything below a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def save_failure(folder: Path, err: BaseException) -> CheckpointError:
    """Remove a half-written checkpoint and describe what happened."""
    written = folder_bytes(folder) if folder.is_dir() else 0
    shutil.rmtree(folder, ignore_errors=True)
    root = folder.parent
    free = shutil.disk_usage(root).free if root.is_dir() else 0
    kept = last_complete(root)
    safe = f"{kept} is whole: the same command resumes from it" if kept else "no checkpoint was complete yet"
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
    model.config.save_pretrained(folder)
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
