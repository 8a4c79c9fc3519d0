"""`--dry_run` for Hugging Face models: shows records, takes one step, saves, checks the save, leaves nothing behind."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from llava.train import checkpoints
from llava.train.arguments import RunArguments
from llava.train.callbacks import StopSignal
from llava.train.dry_run import FOLDER, supervised_texts
from llava.train.hf_chat import Chat
from llava.train.records import record_id
from llava.utils import rank0_print


def describe_sample(chat: Chat, record: dict[str, Any], inputs: dict[str, Any]) -> str:
    """One record as training sees it."""
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    visual = sum(token in chat.visual_ids for token in ids.tolist())
    text = chat.tokenizer.decode([token for token in ids.tolist() if token not in chat.visual_ids])
    pixels = {name: tuple(value.shape) for name, value in inputs.items() if name.startswith("pixel")}
    head = f"record {record_id(record)}: {len(ids)} tokens, {visual} of them of pictures {pixels or ''}"
    learned = [f"  supervised {piece!r}" for piece in supervised_texts(chat.tokenizer, ids, labels)]
    return "\n".join([head, f"  text       {text!r}", *learned])


def dry_run(args: RunArguments, model: Any, chat: Chat, data: dict[str, Any]) -> None:
    """Show records, take one step, save, and check what was saved.

    Raises:
        whatever the real run would raise: bad records, a loss that is not finite, a folder that cannot be written.
    """
    from llava.train.train_hf import make_trainer

    training, dataset = args.training, data["train_dataset"].dataset
    rank0_print(f"dry run: {len(dataset)} records")
    for index in range(min(training.dry_run_records, len(dataset))):
        record = dataset.list_data_dict[index]
        rank0_print(describe_sample(chat, record, dataset.build(record)["inputs"]))
    target = Path(training.output_dir) / FOLDER
    training.output_dir, training.max_steps = str(target), 1
    training.save_strategy, training.save_steps = "steps", 1
    trainer = make_trainer(args, model, chat.processor, data, StopSignal())
    begin = time.perf_counter()
    try:
        result = trainer.train()
        trainer.accelerator.wait_for_everyone()
        saved = target / "checkpoint-1"
        if training.process_index == 0:
            defect = checkpoints.defect_of(saved)
            if defect:
                raise checkpoints.CheckpointError(f"{saved}: {defect}")
            size = checkpoints.folder_bytes(saved) / 1e6
            rank0_print(f"one step: loss {result.training_loss:.4f}, {time.perf_counter() - begin:.1f} s with one save")
            rank0_print(f"one checkpoint: {size:.1f} MB ({trainer.save_kind()}), complete")
        trainer.accelerator.wait_for_everyone()
    finally:
        trainer.run_log.close()
        if training.process_index == 0:
            shutil.rmtree(target, ignore_errors=True)
    rank0_print("dry run: everything works")
