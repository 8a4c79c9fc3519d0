"""Train any supported Hugging Face vision-language model with DUET on LLaVA's data, in full or with LoRA.

    python -m llava.train.train_hf --model_name_or_path llava-hf/llava-1.5-7b-hf --data_path data.json \
        --image_folder images --output_dir out --duet_tokens 192

under python, torchrun or deepspeed; `scripts/finetune_duet_hf.sh` and `scripts/finetune_duet_video.sh` start it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers

from duet.errors import main_guard
from llava.train import runtime
from llava.train.hf_arguments import parse_hf_arguments
from llava.train.hf_chat import Chat
from llava.train.hf_data import HfCollator, HfDataset, check_videos
from llava.train.hf_model import build, prepare_for_zero3, takes_videos
from llava.train.hf_trainer import HfTrainer
from llava.train.optim import trainable_table
from llava.train.run_folder import in_own_folder
from llava.train.stopping import StopSignal, exit_status
from llava.train.train import add_callbacks, check_data, fit, set_up_logging, start_log

# Named, because this module is `__main__` when it is started with `python -m`.
logger = logging.getLogger("llava.train.train_hf")


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Train as the command line says.

    Raises:
        SystemExit: code 143 when SIGTERM or SIGUSR1 ended the run after a checkpoint was saved.
    """
    set_up_logging()
    stop = StopSignal().install()
    runtime.leave(exit_status(run(parse_hf_arguments(argv), stop)))


def run(args: Any, stop: StopSignal | None = None) -> bool:
    """Build, check, train and save.

    Returns:
        True when the run was stopped by a signal (a checkpoint was saved), False when it finished, now or before.

    Raises:
        CheckpointError: the output folder is in use, cannot be written, or holds a run with other settings.
    """
    return in_own_folder(args, lambda: build_and_fit(args, stop or StopSignal()))


def build_and_fit(args: Any, stop: StopSignal) -> bool:
    """Do what `run` does, in a folder that is this run's own."""
    attention, notice = runtime.resolve_attention(args.model.attn_implementation)
    if notice:
        logger.warning(notice)
    transformers.set_seed(args.training.seed)
    model, chat = build(args, attention)
    logger.info("trainable parameters\n%s", trainable_table(model))
    data = load_data(args, chat, takes_videos(model.config))
    if args.training.dry_run:
        from llava.train.hf_dry_run import dry_run

        dry_run(args, model, chat, data)
        return False
    return fit(args, model, chat.processor, data, stop, make_trainer)


def load_data(args: Any, chat: Chat, videos: bool) -> dict[str, Any]:
    """Read the annotation files and look at every record before the first step.

    Raises:
        BadSampleError: bad records, and the policy is `error`.
        ImportError: there are videos, and PyAV is not installed.
    """
    from llava.train.samples import NamedCollator, NamedSamples

    args.data.bad_sample_file = str(Path(args.training.output_dir) / "bad_samples.jsonl")
    found: dict[str, Any] = {}
    kinds: list[str] = []
    for name, path in (("train_dataset", args.data.data_path), ("eval_dataset", args.data.eval_data_path)):
        if path is None and name == "eval_dataset":
            found[name] = None
            continue
        dataset = HfDataset(path, chat, args.data, videos)
        check_videos(dataset)
        check_data(args, dataset)
        kinds = list(dict.fromkeys([*kinds, *dataset.kinds]))
        found[name] = NamedSamples(dataset)
    # One rank alone needs no blank pictures, and is not slowed down by them.
    wanted = kinds if runtime.launched_world_size() > 1 else []
    found["data_collator"] = NamedCollator(HfCollator(chat, wanted, args.data.num_frames))
    return found


def make_trainer(args: Any, model: Any, processor: Any, data: dict[str, Any], stop: StopSignal) -> HfTrainer:
    """Put the trainer together with its log and callbacks."""
    training = args.training
    training.prediction_loss_only = True
    if training.deepspeed and training.hf_deepspeed_config.is_zero3():
        prepare_for_zero3(model, training, model.config.model_type)
    trainer = HfTrainer(model=model, processing_class=processor, args=training, run_log=start_log(args), **data)
    add_callbacks(trainer, stop)
    return trainer


if __name__ == "__main__":
    raise SystemExit(main())
