"""`--dry_run`: shows what training would see and do, takes one step, saves, reads back, and leaves nothing behind."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.checkpoints import read_tensors, to_own_key, weight_files
from llava.train import checkpoints
from llava.train.arguments import RunArguments
from llava.train.callbacks import StopSignal
from llava.train.meter import peak_memory_bytes
from llava.train.optim import numel
from llava.train.records import record_id
from llava.utils import rank0_print

FOLDER = "dry_run"


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Token ids as text, with `<image>` where an image goes."""
    parts: list[str] = []
    run: list[int] = []
    for token in [*ids, IMAGE_TOKEN_INDEX]:
        if token != IMAGE_TOKEN_INDEX:
            run.append(token)
            continue
        parts.append(tokenizer.decode(run))
        run = []
    return "<image>".join(parts)


def supervised_texts(tokenizer: Any, ids: torch.Tensor, labels: torch.Tensor) -> list[str]:
    """The stretches of a sample that the model learns to say."""
    texts: list[str] = []
    run: list[int] = []
    for token, label in zip([*ids.tolist(), 0], [*labels.tolist(), IGNORE_INDEX], strict=True):
        if label != IGNORE_INDEX:
            run.append(token)
        elif run:
            texts.append(decode(tokenizer, run))
            run = []
    return texts


def describe_sample(tokenizer: Any, record: dict[str, Any], sample: dict[str, Any]) -> str:
    """One record as training sees it."""
    ids, labels = sample["input_ids"], sample["labels"]
    images = sample.get("image")
    images = images if isinstance(images, list) else [] if images is None else [images]
    shapes = ", ".join("x".join(map(str, image.shape)) for image in images if image.any()) or "none"
    learned = int((labels != IGNORE_INDEX).sum())
    lines = [
        f"record {record_id(record)}: {len(ids)} tokens, {learned} supervised; images {shapes}",
        f"  text       {decode(tokenizer, ids.tolist())!r}",
    ]
    return "\n".join(lines + [f"  supervised {text!r}" for text in supervised_texts(tokenizer, ids, labels)])


def memory_estimate(model: torch.nn.Module, zero: int, world: int) -> dict[str, float]:
    """Bytes per rank that training holds besides activations.

    Args:
        model: any model; AdamW with an fp32 copy of weights that are narrower is assumed.
        zero: DeepSpeed stage, 0 for none.
        world: number of ranks.

    Returns:
        MB of `weights`, `gradients`, `optimizer` and their `sum`.
    """
    weights = gradients = optimizer = 0.0
    for parameter in model.parameters():
        count, width = numel(parameter), parameter.element_size()
        weights += count * width
        if parameter.requires_grad:
            gradients += count * width
            optimizer += count * (8 if width == 4 and zero == 0 else 12)
    weights /= world if zero >= 3 else 1
    gradients /= world if zero >= 2 else 1
    optimizer /= world if zero >= 1 else 1
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    return {name: value / 1e6 for name, value in (parts | {"sum": sum(parts.values())}).items()}


def compare_saved(trainer: Any, folder: Path) -> int:
    """Read a checkpoint back and compare it with the model.

    Returns:
        How many tensors were compared.

    Raises:
        CheckpointError: a tensor is unknown, has another shape, or other values (values are not compared under ZeRO-3,
            where no rank has them all).
    """
    kind = trainer.save_kind()
    own = dict(trainer.model.named_parameters())
    if kind == "adapter":
        rest = read_tensors(str(folder / checkpoints.NON_LORA_FILE))
        saved = {
            key.replace(".weight", ".default.weight"): value
            for key, value in load_file(folder / "adapter_model.safetensors").items()
        } | rest
    else:
        files = weight_files(str(folder)) if kind == "full" else [str(folder / checkpoints.PROJECTOR_FILE)]
        saved = {to_own_key(key): value for file in files for key, value in read_tensors(file).items()}
    for name, value in saved.items():
        parameter = own.get(name)
        if parameter is None:
            if name in dict(trainer.model.named_buffers()):
                continue
            raise checkpoints.CheckpointError(f"{folder}: {name} was saved, but the model has no such parameter")
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        split = hasattr(parameter, "ds_id")
        if shape != tuple(value.shape):
            raise checkpoints.CheckpointError(f"{folder}: {name} is {tuple(value.shape)}, the model has {shape}")
        if not split and not torch.equal(parameter.detach().cpu().to(value.dtype), value):
            raise checkpoints.CheckpointError(f"{folder}: {name} was read back with other values")
    return len(saved)


def dry_run(args: RunArguments, model: Any, tokenizer: Any, data: dict[str, Any]) -> None:
    """Show records, take one step, save, read back, and print estimates.

    Raises:
        whatever the real run would raise: bad records, a loss that is not finite, a folder that cannot be written.
    """
    from llava.train.train import make_trainer

    training = args.training
    dataset = data["train_dataset"].dataset
    rank0_print(
        f"dry run: {len(dataset)} records, template {getattr(model.config, 'conv_version', args.model.version)}"
    )
    for index in range(min(training.dry_run_records, len(dataset))):
        rank0_print(describe_sample(tokenizer, dataset.list_data_dict[index], dataset[index]))
    target = Path(training.output_dir)
    epochs, passes = training.num_train_epochs, training.gradient_accumulation_steps
    batch = training.per_device_train_batch_size * passes * training.world_size
    planned = training.max_steps if training.max_steps > 0 else int(-(-len(dataset) * epochs // batch))
    training.output_dir = str(target / FOLDER)
    training.max_steps, training.save_strategy, training.save_steps = 1, "steps", 1
    trainer = make_trainer(args, model, tokenizer, data, StopSignal())
    begin = time.perf_counter()
    try:
        result = trainer.train()
        seconds = time.perf_counter() - begin
        trainer.accelerator.wait_for_everyone()
        saved = target / FOLDER / "checkpoint-1"
        if training.process_index == 0:
            defect = checkpoints.defect_of(saved)
            if defect:
                raise checkpoints.CheckpointError(f"{saved}: {defect}")
            count = compare_saved(trainer, saved)
            size = checkpoints.folder_bytes(saved) / 1e6
            rank0_print(f"one step: loss {result.training_loss:.4f}, {seconds:.1f} s including the first-step set-up")
            rank0_print(f"one checkpoint: {size:.1f} MB written, {count} tensors read back and compared")
            rank0_print(f"the run would take {planned:,} steps of {batch} records")
            zero = training.hf_deepspeed_config.get_value("zero_optimization.stage", 0) if training.deepspeed else 0
            estimate = memory_estimate(model, zero, training.world_size)
            parts = ", ".join(f"{name} {value:,.1f}" for name, value in estimate.items())
            rank0_print(
                f"memory per rank in MB without activations: {parts}; measured peak {peak_memory_bytes() / 1e6:,.1f}"
            )
        trainer.accelerator.wait_for_everyone()
    finally:
        trainer.run_log.close()
        if training.process_index == 0:
            shutil.rmtree(target / FOLDER, ignore_errors=True)
    rank0_print("dry run: everything works")
