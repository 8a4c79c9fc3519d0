"""Command lines written for LLaVA and DUET scripts, made readable for today's `TrainingArguments`.

LLaVA's shell scripts were written for an older `transformers`; several of their flags are gone. They are mapped to
their successors here, or dropped with a notice, so that an existing script starts unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
}
DROPPED = {
    "overwrite_output_dir": "a run resumes from its last complete checkpoint; delete the folder to start again",
    "save_safetensors": "checkpoints are always safetensors",
    "logging_dir": "logs go to OUTPUT_DIR/train_log.jsonl",
    "local_rank": "",  # the launcher's environment already says it
    "fsdp_transformer_layer_cls_to_wrap": "the model names its own blocks",
}


def split_flags(argv: list[str]) -> list[list[str]]:
    """Group a command line into [flag, value, value, ...] lists; `--flag=value` becomes two items."""
    groups: list[list[str]] = []
    for item in argv:
        if item.startswith("--"):
            name, equals, value = item.partition("=")
            groups.append([name, value] if equals else [name])
        elif groups:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _true(values: list[str]) -> bool:
    return not values or values[0].lower() in {"true", "1", "yes", "t", "y"}


def _warmup_ratio(values: list[str]) -> list[str]:
    ratio = float(values[0])
    if not 0 <= ratio < 1:
        raise ValueError(
            f"--warmup_ratio {values[0]}: expected a share of all steps in [0, 1); use --warmup_steps for a count"
        )
    return ["--warmup_steps", values[0]]


def _group_by_length(values: list[str]) -> list[str]:
    return ["--train_sampling_strategy", "group_by_length"] if _true(values) else []


REWRITTEN: dict[str, Callable[[list[str]], list[str]]] = {
    "warmup_ratio": _warmup_ratio,
    "group_by_length": _group_by_length,
}


def normalise_argv(argv: list[str]) -> tuple[list[str], list[str]]:
    """Translate flags that `transformers` 5 removed.

    Args:
        argv: the command line without the program's name.

    Returns:
        The new command line, and one notice for every flag that was changed or dropped.

    Raises:
        ValueError: a removed flag has a value that its successor cannot express.

    Source: the flags of the public LLaVA-1.5, Video-LLaVA and DUET training scripts.
    """
    result: list[str] = []
    notices: list[str] = []
    for flag, *values in split_flags(argv):
        name = flag.removeprefix("--")
        if name in RENAMED:
            result += [f"--{RENAMED[name]}", *values]
            notices.append(f"--{name} is now --{RENAMED[name]}")
        elif name in REWRITTEN:
            replacement = REWRITTEN[name](values)
            result += replacement
            notices.append(f"--{name} is now {' '.join(replacement) or 'the default'}")
        elif name in DROPPED:
            if DROPPED[name]:
                notices.append(f"--{name} is ignored: {DROPPED[name]}")
        else:
            result += [flag, *values]
    return result, notices
