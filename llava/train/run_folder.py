"""What an output folder holds: the settings and records that its run was begun with, and whether the run is over."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from llava.train import runtime
from llava.train.checkpoints import (
    RUN_MARKER,
    CheckpointError,
    checkpoints,
    checksums,
    defect_of,
    names_files,
    write_json_atomically,
)
from llava.train.folder_lock import exclusive
from llava.train.resume import ANEW
from llava.train.run_log import jsonable

logger = logging.getLogger(__name__)

SETTINGS = "run_settings.json"
HARMLESS = frozenset((
    "attn_implementation", "cache_dir", "dataloader_num_workers", "disable_tqdm", "dry_run", "dry_run_records",
    "eval_data_path", "feature_cache", "gradient_checkpointing", "image_log_count", "image_log_steps",
    "lazy_preprocess", "logging_nan_inf_filter", "logging_steps", "max_zero_label_share", "monitor_grads",
    "monitor_grads_every", "mpt_attn_impl", "on_bad_sample", "output_dir", "raise_on_nan_grad", "report_to",
    "resume_from_checkpoint", "run_name", "save_only_model", "save_steps", "save_strategy", "save_total_limit",
    "scan_images", "tf32", "z3_leaf_modules",
))  # fmt: skip
"""Flags that may change between two starts of one run without changing what it computes."""
DATA_PLACES = ("data_path", "image_folder", "video_folder")
MODEL_PLACES = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "lora_weight_path", "chat_template")
# Of Hugging Face's many training flags those that decide what is computed.
DECISIVE = frozenset((
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps",
    "optim", "optim_args", "seed", "data_seed", "bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha",
    "dataloader_drop_last",
))  # fmt: skip


def agreed(decide: Callable[[], Any]) -> Any:
    """Decide on the first rank; every rank gets the answer, or the same error.

    Raises:
        CheckpointError: what `decide` raised.
    """
    box: list[Any] = [None, None]
    if runtime.is_rank0():
        try:
            box[0] = decide()
        except CheckpointError as err:
            box[1] = err
        except OSError as err:
            box[1] = CheckpointError(f"{err.filename or 'the output folder'} cannot be read or written: {err}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def in_own_folder(args: Any, work: Callable[[], bool]) -> bool:
    """Run a training in its output folder unless it is over, is somebody else's, or was begun with other settings.

    Args:
        args: all flags of the run.
        work: trains; returns whether a signal stopped it.

    Returns:
        What `work` returned; False for a run that is over.

    Raises:
        CheckpointError: the folder is in use, cannot be written, or holds a run with other settings.
    """
    training = args.training
    with contextlib.ExitStack() as stack:
        agreed(lambda: stack.enter_context(exclusive(training.output_dir)))
        training.begun_with = settings_of(args)  # now: building the model fills flags in
        if training.dry_run:
            return work()
        if agreed(lambda: begin(args)):
            if runtime.is_rank0():
                logger.warning("the run in %s is finished: nothing is trained; %s", training.output_dir, ANEW)
            return False
        return work()


def begin(args: Any) -> bool:
    """Look at what the output folder holds, before anything is built; returns whether its run is over.

    Raises:
        CheckpointError: it, or the checkpoint to be resumed from, was made with other settings.
    """
    training = args.training
    folder, requested = Path(training.output_dir), str(training.resume_from_checkpoint)
    if training.save_only_model:
        logger.warning(
            "--save_only_model True: checkpoints hold weights only, so a run that is interrupted cannot go on from them"
        )
    over = folder / RUN_MARKER
    if requested.lower() == "false":
        over.unlink(missing_ok=True)
        set_aside(folder)
        return False
    places = [folder] if over.is_file() or checkpoints(folder) else []
    if requested.lower() not in ("none", "true"):
        places.append(Path(requested))
    for place in places:
        changed = changes(read_settings(place).get("flags", {}), training.begun_with)
        refuse(place, changed)
    if not over.is_file():
        return False
    defect = defect_of(folder, marker=RUN_MARKER) if names_files(over) else None
    if defect is None:
        return True
    if not checkpoints(folder):
        raise CheckpointError(
            f"the run in {folder} is finished, but {defect}, and there is no checkpoint to write it again from. "
            f"Restore it; {ANEW}"
        )
    logger.warning("%s is finished, but %s: its last checkpoint is used to write it again", folder, defect)
    over.unlink()
    return False


def set_aside(folder: Path) -> None:
    """Rename the checkpoints of an earlier run, so that no later start takes one of them for this run's."""
    for path in checkpoints(folder):
        names = (path.with_name(f"{path.name}.old{number}") for number in itertools.count(1))
        kept = next(name for name in names if not name.exists())
        path.rename(kept)
        logger.warning("the run begins anew: %s is kept as %s", path, kept.name)


def refuse(place: Path, changed: list[str]) -> None:
    """Raise CheckpointError when settings changed."""
    if changed:
        raise CheckpointError(
            f"{place} holds a run with other settings ({'; '.join(changed)}). Give the former ones to go on, or give "
            f"this run its own --output_dir; {ANEW}"
        )


def check_data(args: Any, dataset: Any) -> None:
    """Compare the records with those that the run was begun with, and keep the settings in the folder.

    Args:
        args: all flags of the run.
        dataset: the training records, without those that were left out.

    Raises:
        CheckpointError: the records are others, so that their order would be another one, too.
    """
    agreed(lambda: _check_data(args, dataset))


def _check_data(args: Any, dataset: Any) -> None:
    training = args.training
    folder, requested = Path(training.output_dir), str(training.resume_from_checkpoint)
    data = data_of(args, dataset)
    explicit = requested.lower() not in ("none", "true", "false")
    begun = [folder] if checkpoints(folder) and requested.lower() != "false" else []
    for place in [*begun, *([Path(requested)] if explicit else [])]:
        old = read_settings(place).get("data", {})
        if old and (old["sha256"], old["records"]) != (data["sha256"], data["records"]):
            told = (f"{one['data_path']} ({one['records']} records, {one['sha256'][:8]})" for one in (old, data))
            refuse(place, [f"data_path: {' -> '.join(told)}"])
        for name in DATA_PLACES:
            if old and old.get(name) != data.get(name):
                logger.warning("%s: %s -> %s, with the same records; going on", name, old.get(name), data.get(name))
    write_json_atomically(folder / SETTINGS, {"flags": training.begun_with, "data": data})


def data_of(args: Any, dataset: Any) -> dict[str, Any]:
    """What the records are: a checksum of the files they come from, their number, and where they lie."""
    total = hashlib.sha256()
    for name in dict.fromkeys(origin.file for origin in dataset.origins):
        with open(name, "rb") as file:
            while block := file.read(1 << 24):
                total.update(block)
    places = {name: _resolved(getattr(args.data, name, None)) for name in DATA_PLACES}
    return places | {"sha256": total.hexdigest(), "records": len(dataset.list_data_dict)}


def settings_of(args: Any) -> dict[str, Any]:
    """The flags that decide what a run computes; how the global batch is divided among ranks does not."""
    training = args.training
    theirs = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    found: dict[str, Any] = {}
    for group in (args.model, args.data, training, args.reduction):
        for field in dataclasses.fields(group):
            ignored = HARMLESS.union(DATA_PLACES, theirs - DECISIVE if group is training else ())
            if field.name not in ignored:
                value = getattr(group, field.name)
                found[field.name] = _resolved(value) if field.name in MODEL_PLACES else value
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    found["global_batch"] = batch
    found["deepspeed"] = _content(training.deepspeed) if training.deepspeed else None
    if getattr(args.reduction, "reduction_config", None):
        found["reduction_config"] = _content(args.reduction.reduction_config)
    return json.loads(json.dumps(jsonable(found)))


def _content(source: Any) -> Any:
    """A JSON file's content, so that neither its name nor its layout counts."""
    if not isinstance(source, (str, os.PathLike)) or not os.path.isfile(source):
        return source
    return _read(Path(source))


def _resolved(value: Any) -> Any:
    """A path in full, so that the directory that a run is started from does not count."""
    if isinstance(value, str) and value and os.path.exists(value):
        return os.path.realpath(value)
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_settings(folder: Path) -> dict[str, Any]:
    """What a run or a checkpoint was begun with; empty where that is not known."""
    return _read(folder / SETTINGS)


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings with another value, as `name: old -> new`; a flag that only one version knows does not count."""
    return [f"{name}: {old[name]} -> {new[name]}" for name in sorted(set(old) & set(new)) if old[name] != new[name]]


def mark_finished(folder: Path, summary: dict[str, Any]) -> None:
    """Say that a run is over, and which files it left."""
    kept = ("*.safetensors", "*.bin", "*.index.json", "adapter_config.json")
    found = sorted({path.name for pattern in kept for path in folder.glob(pattern) if path.name != "training_args.bin"})
    sizes = {name: (folder / name).stat().st_size for name in found}
    files = {"files": sizes, "sha256": checksums(folder, found)} if found else {}
    write_json_atomically(folder / RUN_MARKER, summary | files)
