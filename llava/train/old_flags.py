"""Training flags that `transformers` 5 removed, for scripts and code written before it.

They are fields, so that our own command line, any `HfArgumentParser` and keyword arguments understand them alike. Each
is carried over to its successor, or left out with a notice; afterwards it is None again.
Source: the flags of the public LLaVA-1.5, Video-LLaVA and DUET training scripts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

from llava.train import runtime

logger = logging.getLogger(__name__)

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy",
}
DROPPED = {
    "overwrite_output_dir": "a run resumes from its last complete checkpoint; delete the folder to start again",
    "save_safetensors": "checkpoints are always safetensors",
    "logging_dir": "logs go to OUTPUT_DIR/train_log.jsonl",
    "fsdp_transformer_layer_cls_to_wrap": "the model names its own blocks",
}


def _old(text: str) -> Any:
    return field(default=None, metadata={"help": text})


@dataclass
class OldFlags:
    """Flags of older `transformers`; goes before the class that has their successors."""

    evaluation_strategy: str | None = _old("older name of --eval_strategy")
    warmup_ratio: float | None = _old("share of all steps; --warmup_steps takes it, too")
    per_gpu_train_batch_size: int | None = _old("older name of --per_device_train_batch_size")
    per_gpu_eval_batch_size: int | None = _old("older name of --per_device_eval_batch_size")
    no_cuda: bool | None = _old("older name of --use_cpu")
    group_by_length: bool | None = _old("older name of --train_sampling_strategy group_by_length")
    overwrite_output_dir: bool | None = _old("accepted; a run resumes instead")
    save_safetensors: bool | None = _old("accepted; checkpoints are always safetensors")
    logging_dir: str | None = _old("accepted; logs go to the output folder")
    fsdp_transformer_layer_cls_to_wrap: str | None = _old("accepted; the model names its own blocks")

    def carry_over(self) -> None:
        """Give the successors of what was set, say so once on the first rank, and forget the old names.

        Raises:
            ValueError: a value that the successor cannot express, or another one was given for the successor.
        """
        for name in [item.name for item in fields(OldFlags) if getattr(self, item.name) is not None]:
            value = getattr(self, name)
            setattr(self, name, None)
            if name in DROPPED:
                _notice(f"--{name} is ignored: {DROPPED[name]}")
                continue
            new = RENAMED[name]
            carried = _in_new_words(name, value)
            if carried is None:
                continue
            default = next(item.default for item in fields(self) if item.name == new)
            if getattr(self, new) not in (default, carried):
                raise ValueError(f"--{name} {value} and --{new} {getattr(self, new)} contradict each other; give one")
            setattr(self, new, carried)
            _notice(f"--{name} {value} is now --{new} {carried}")


def _in_new_words(name: str, value: Any) -> Any:
    """Return the value of the successor, or None where the old flag asks for what is the default anyway."""
    if name == "warmup_ratio" and not 0 <= float(value) < 1:
        raise ValueError(
            f"--warmup_ratio {value}: expected a share of all steps in [0, 1); use --warmup_steps for a count"
        )
    if name == "group_by_length":
        return "group_by_length" if value else None
    return value


def _notice(text: str) -> None:
    if runtime.is_rank0():
        logger.warning(text)
