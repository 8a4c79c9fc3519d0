"""LLaVA's training entry: `python -m llava.train.train --flags`, under python, torchrun or deepspeed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from duet.errors import main_guard
from llava.train import checkpoints, run_folder, runtime, star
from llava.train.arguments import DataArguments, ModelArguments, RunArguments, TrainingArguments, parse_arguments
from llava.train.build import build, smart_tokenizer_and_embedding_resize
from llava.train.callbacks import EpochCallback, FrozenCallback, LogCallback, StopCallback
from llava.train.checkpoints import safe_save_model_for_hf_trainer
from llava.train.collator import DataCollatorForSupervisedDataset
from llava.train.dataset import LazySupervisedDataset, make_supervised_data_module
from llava.train.labels import (
    preprocess,
    preprocess_llama_2,
    preprocess_mpt,
    preprocess_multimodal,
    preprocess_plain,
    preprocess_v0,
    preprocess_v1,
)
from llava.train.llava_trainer import LLaVATrainer
from llava.train.lora import (
    find_all_linear_names,
    get_mm_adapter_state_maybe_zero_3,
    get_peft_state_maybe_zero_3,
    get_peft_state_non_lora_maybe_zero_3,
    maybe_zero_3,
)
from llava.train.optim import trainable_table
from llava.train.resume import resolve_resume
from llava.train.run_log import RunLog, describe_run
from llava.train.star import *  # noqa: F403 - LLaVA's clients take these names from here
from llava.train.stopping import StopSignal, exit_status

__all__ = [
    "DataArguments",
    "DataCollatorForSupervisedDataset",
    "LLaVATrainer",
    "LazySupervisedDataset",
    "ModelArguments",
    "TrainingArguments",
    "find_all_linear_names",
    "get_mm_adapter_state_maybe_zero_3",
    "get_peft_state_maybe_zero_3",
    "get_peft_state_non_lora_maybe_zero_3",
    "local_rank",
    "make_supervised_data_module",
    "maybe_zero_3",
    "preprocess",
    "preprocess_llama_2",
    "preprocess_mpt",
    "preprocess_multimodal",
    "preprocess_plain",
    "preprocess_v0",
    "preprocess_v1",
    "safe_save_model_for_hf_trainer",
    "smart_tokenizer_and_embedding_resize",
    "train",
]
__all__ += star.__all__

local_rank: int | None = None
"""This process's place on its machine, as LLaVA's module has it; None before `train` runs."""

# Named, because this module is `__main__` when it is started with `python -m`.
logger = logging.getLogger("llava.train.train")

LABEL_CHECKS = 20_000
"""How many records are tokenised before the first step."""


def train(attn_implementation: str | None = None) -> None:
    """Train as the command line says (LLaVA's entry point).

    Args:
        attn_implementation: default kernel; `--attn_implementation` wins.

    Raises:
        SystemExit: code 143 when SIGTERM or SIGUSR1 ended the run after a checkpoint was saved.
    """
    global local_rank
    set_up_logging()
    stop = StopSignal().install()
    args = parse_arguments()
    local_rank = args.training.local_process_index
    runtime.leave(exit_status(run(args, attn_implementation, stop)))


def set_up_logging() -> None:
    """Print this project's notices on the first rank, and only errors on the others."""
    level = logging.INFO if runtime.is_rank0() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("llava", "duet"):
        logging.getLogger(name).setLevel(level)
    # The tokenizer's own parallelism deadlocks in forked data-loader workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run(args: RunArguments, attn_implementation: str | None = None, stop: StopSignal | None = None) -> bool:
    """Build, check, train and save.

    Args:
        args: all flags.
        attn_implementation: default attention kernel.
        stop: watches for stop signals; default: nobody does.

    Returns:
        True when the run was stopped by a signal (a checkpoint was saved), False when it finished, now or before.

    Raises:
        CheckpointError: the output folder is in use, cannot be written, or holds a run with other settings.
    """
    return run_folder.in_own_folder(args, lambda: build_and_fit(args, attn_implementation, stop or StopSignal()))


def build_and_fit(args: RunArguments, attn_implementation: str | None, stop: StopSignal) -> bool:
    """Do what `run` does, in a folder that is this run's own."""
    attention, notice = runtime.resolve_attention(args.model.attn_implementation or attn_implementation)
    if notice:
        logger.warning(notice)
    transformers.set_seed(args.training.seed)
    model, tokenizer = build(args, attention)
    logger.info("trainable parameters\n%s", trainable_table(model))
    data = load_data(args, tokenizer)
    if args.training.dry_run:
        from llava.train.dry_run import dry_run

        dry_run(args, model, tokenizer, data)
        return False
    return fit(args, model, tokenizer, data, stop)


def load_data(args: RunArguments, tokenizer: Any) -> dict[str, Any]:
    """Read the annotation files and look at every record before the first step.

    Raises:
        BadSampleError: bad records, and the policy is `error`.
    """
    from llava.train.samples import NamedCollator, NamedSamples

    bad_list = Path(args.training.output_dir) / "bad_samples.jsonl"
    args.data.bad_sample_file = str(bad_list)
    module = make_supervised_data_module(tokenizer, args.data)
    for name in ("train_dataset", "eval_dataset"):
        if module[name] is not None:
            check_data(args, module[name])
            module[name] = NamedSamples(module[name])
    module["data_collator"] = NamedCollator(module["data_collator"])
    return module


def check_data(args: RunArguments, dataset: LazySupervisedDataset) -> None:
    """Scan one dataset on the first rank, and leave the bad records out everywhere or stop.

    Raises:
        BadSampleError: bad records under `--on_bad_sample error`, or more of them than `--max_zero_label_share` allows
            to have nothing to learn from.
    """
    from llava.train.preflight import scan
    from llava.train.records import BadSampleError

    report = None
    if runtime.is_rank0():
        folder = args.data.image_folder if dataset.multimodal else None
        report = scan(
            dataset.list_data_dict,
            folder,
            origins=dataset.origins,
            multimodal=dataset.multimodal,
            images=args.data.scan_images != "none",
            decode=args.data.scan_images == "decode",
            extra_check=dataset.check_fit,
            videos=dataset.videos,
            max_aspect_ratio=getattr(dataset, "max_aspect_ratio", None),
        )
        check_labels(dataset, report)
    box = [report]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(box, src=0)
    report = box[0]
    assert report is not None
    if report.ok:
        return
    if args.data.on_bad_sample == "error":
        report.raise_if_bad()
    if report.unlabelled > args.data.max_zero_label_share * report.records:
        raise BadSampleError(
            f"{report.unlabelled} of {report.records} records have nothing to learn from, more than "
            f"--max_zero_label_share {args.data.max_zero_label_share} allows.\n{report.summary()}",
            "no labels",
        )
    if runtime.is_rank0():
        logger.warning("left out bad records: %s", report.summary())
    dataset.drop(report)


def check_labels(dataset: LazySupervisedDataset, report: Any) -> None:
    """Tokenise records and add those that teach nothing to the report, whatever the reason.

    Up to `LABEL_CHECKS` records are tokenised, evenly spread over a larger set, where all of them would take minutes;
    each then stands for several in the report's estimate of how many teach nothing.
    """
    from llava.train.records import as_bad_sample

    bad = set(report.positions)
    good = [index for index in range(len(dataset)) if index not in bad]
    step = max(1, -(-len(good) // LABEL_CHECKS))
    for index in good[::step]:
        record = dataset.list_data_dict[index]
        try:
            dataset.encode(record)
        except Exception as err:
            report.bad.append(as_bad_sample(err).at(dataset.origins[index], record))
            report.positions.append(index)
            report.unlabelled += step


def make_trainer(
    args: RunArguments, model: Any, tokenizer: Any, data: dict[str, Any], stop: StopSignal
) -> LLaVATrainer:
    """Put the trainer together with its log and callbacks."""
    training = args.training
    training.prediction_loss_only = True
    trainer = LLaVATrainer(
        model=model,
        processing_class=tokenizer,
        args=training,
        run_log=start_log(args),
        image_processor=getattr(args.data, "image_processor", None),
        **data,
    )
    add_callbacks(trainer, stop)
    mark_zero3_leaves(training, model)
    return trainer


def start_log(args: RunArguments) -> RunLog:
    """Open the run's log, with the resolved configuration in it."""
    training = args.training
    return RunLog(
        training.output_dir,
        describe_run(args.to_dict()),
        wandb_wanted=training.log_to_wandb,
        run_name=training.run_name,
        active=training.process_index == 0,
    )


def add_callbacks(trainer: LLaVATrainer, stop: StopSignal) -> None:
    """Watch for signals, count epochs, keep frozen parts in evaluation mode, and log."""
    for callback in (
        StopCallback(trainer, stop),
        EpochCallback(),
        FrozenCallback(trainer.model),
        LogCallback(trainer, trainer.run_log, trainer.args.raise_on_nan_grad),
    ):
        trainer.add_callback(callback)


def mark_zero3_leaves(training: TrainingArguments, model: Any) -> None:
    """Let ZeRO-3 gather the vision tower as one unit: stage 1 reads its layers' weights outside their own forward."""
    if not (training.deepspeed and training.z3_leaf_modules and training.hf_deepspeed_config.is_zero3()):
        return
    from deepspeed.utils import set_z3_leaf_modules

    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    if any(isinstance(module, CLIPVisionTower) for module in model.modules()):
        set_z3_leaf_modules(model, [CLIPVisionTower])


def fit(
    args: RunArguments,
    model: Any,
    tokenizer: Any,
    data: dict[str, Any],
    stop: StopSignal,
    make: Callable[..., LLaVATrainer] = make_trainer,
) -> bool:
    """Train from the last complete checkpoint or from the start, and save the result.

    Returns:
        True when a signal stopped the run.
    """
    training = args.training
    check_output(args, model, tokenizer)
    run_folder.check_data(args, data["train_dataset"].dataset)
    trainer = make(args, model, tokenizer, data, stop)
    chosen = run_folder.agreed(
        lambda: resolve_resume(training.output_dir, training.resume_from_checkpoint, trainer.needs)
    )
    resume: Path | None = chosen
    if resume is not None:
        logger.info("resuming from %s", resume)
        trainer.run_log.write("resume", {"checkpoint": str(resume)})
        if resume.parent.resolve() == Path(training.output_dir).resolve():
            trainer.resumed_at = checkpoints.step_of(resume)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.save_state()
    stopped = trainer.stopped_at
    report_bad_samples(data["train_dataset"].dataset)
    if stopped is not None:
        trainer.run_log.write("stopped", {"step": stopped, "reason": stop.reason})
        trainer.run_log.close()
        if training.process_index == 0:
            next_start = "the same command resumes from it"
            if training.save_only_model:
                next_start = "it holds weights only (--save_only_model True), so no run can resume from it"
            logger.warning("%s: saved %s/checkpoint-%d; %s", stop.reason, training.output_dir, stopped, next_start)
        return True
    model.config.use_cache = True
    try:
        safe_save_model_for_hf_trainer(trainer, training.output_dir)
        if training.process_index == 0:
            run_folder.mark_finished(Path(training.output_dir), summary(trainer))
    except Exception as err:
        if not checkpoints.looks_like_write_failure(err):
            raise
        last = checkpoints.last_complete(training.output_dir, contents=False)
        raise checkpoints.CheckpointError(
            f"training finished, but the model could not be written to {training.output_dir} ({err}). Nothing is lost: "
            f"{last} is whole. Free some space and give the same command again"
        ) from err
    trainer.run_log.write("finished", {"step": trainer.state.global_step})
    trainer.run_log.close()
    return False


def summary(trainer: LLaVATrainer) -> dict[str, Any]:
    """What a finished run was like: steps, kind, median seconds of a step, peak memory of the fullest rank in MiB."""
    lines = [line for line in trainer.state.log_history if "seconds_per_step" in line]
    seconds = sorted(line["seconds_per_step"] for line in lines)
    return {
        "step": trainer.state.global_step,
        "kind": trainer.save_kind(),
        "seconds_per_step": seconds[len(seconds) // 2] if seconds else None,
        "peak_memory_mib": max((line["peak_memory_mb"] for line in lines), default=0.0) * 1e6 / 2**20 or None,
    }


def report_bad_samples(dataset: LazySupervisedDataset) -> None:
    """Say at the end how many records were left out or replaced."""
    bad = dataset.bad_sample_report()
    if bad and runtime.is_rank0():
        logger.warning(
            "%d bad records were left out or replaced; they are listed in %s", len(bad), dataset.bad_samples.path
        )


def check_output(args: RunArguments, model: Any, tokenizer: Any) -> None:
    """Write what is small before the first step, so that a folder or config that cannot be saved is found now.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(args.training.output_dir)
    if args.training.process_index != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
    except OSError as err:
        raise checkpoints.CheckpointError(f"--output_dir {folder} cannot be written: {err}") from err


main = main_guard(train)
"""The command: `train`, with a user's mistake as a line and an exit status."""

if __name__ == "__main__":
    raise SystemExit(main())
