"""The trainer: LLaVA's sampler and optimizer groups, complete checkpoints, and figures for every step."""

from __future__ import annotations

import inspect
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

import duet
from duet.attach import base_model
from llava import sanity
from llava.constants import IGNORE_INDEX
from llava.model.checkpoints import load_partial, read_tensors, to_own_key
from llava.train import checkpoints
from llava.train.lora import get_mm_adapter_state_maybe_zero_3, load_adapter, maybe_zero_3
from llava.train.meter import StepMeter
from llava.train.optim import parameter_groups, part_of
from llava.train.other_ranks import for_these_ranks, keep_groups, restore_groups
from llava.train.resume import lacking, shards
from llava.train.run_folder import SETTINGS
from llava.train.run_log import RunLog, draw_kept_tokens
from llava.train.sampler import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)
from llava.train.stopping import shield_workers

__all__ = [
    "LLaVATrainer",
    "LengthGroupedSampler",
    "get_length_grouped_indices",
    "get_mm_adapter_state_maybe_zero_3",
    "get_modality_length_grouped_indices",
    "maybe_zero_3",
    "split_to_even_chunks",
]

logger = logging.getLogger(__name__)

SAMPLE_IDS = "sample_ids"
ADAPTER_FILE = "adapter_model.safetensors"


class NonFiniteLossError(FloatingPointError):
    """The loss of a batch is NaN or infinite; the message names its samples."""


class LLaVATrainer(Trainer):
    """Hugging Face's trainer with LLaVA's recipe.

    Logits and labels are paired as the model hands them out: pictures stretch the caller's labels, and a reduction
    shortens them, so `label_smoothing_factor`, `compute_loss_func` and `compute_metrics` get the labels of the output.

    Args:
        run_log: where figures go; default: nowhere.
        image_processor: needed to draw images in the log.
        tokenizer: older name of `processing_class`.
        *args, **kwargs: of `transformers.Trainer`.

    Raises:
        ValueError: two different tokenizers were given.
    """

    # The base class allows for None and for wrappers that do not occur here.
    args: Any
    model: Any
    model_wrapped: Any
    train_dataset: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        run_log: RunLog | None = None,
        image_processor: Any = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None and kwargs.setdefault("processing_class", tokenizer) is not tokenizer:
            raise ValueError("tokenizer and processing_class are two names of one argument; pass one of them")
        super().__init__(*args, **kwargs)
        self._skips_logits = "skip_logits" in inspect.signature(base_model(self.model).forward).parameters
        self._paired_labels: torch.Tensor | None = None
        # LLaVA averages over each device's tokens; the model's **kwargs would make the Trainer use the global count.
        self.model_accepts_loss_kwargs = getattr(self.args, "loss_normalization", "per_device") == "global"
        self.run_log = run_log or RunLog("", {}, active=False)
        self.stopped_at: int | None = None
        self.resumed_at: int | None = None
        self.image_processor = image_processor
        self.meter = StepMeter()
        self.meter.watch_model(self.model)
        self.rates: dict[str, float] = {}

    @property
    def tokenizer(self) -> Any:
        """Older name of `processing_class`."""
        return self.processing_class

    # ---- order of the data and groups of the optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not getattr(self.args, "group_by_modality_length", False):
            return super()._get_train_sampler(dataset)
        return LengthGroupedSampler(
            self.args.train_batch_size,
            world_size=self.args.world_size * self.args.gradient_accumulation_steps,
            lengths=dataset.modality_lengths,
            group_by_modality=True,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            pool=getattr(self.args, "length_pool", 1),
        )

    def get_train_dataloader(self) -> Any:
        """The loader of the training data; stop signals do not end the processes that it starts."""
        return shield_workers(super().get_train_dataloader())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer with separate rates for the projector and an unfrozen tower."""
        if self.optimizer is not None:
            return self.optimizer
        target: Any = self.model if model is None else model
        groups = parameter_groups(
            target.named_parameters(),
            self.get_decay_parameter_names(target),
            weight_decay=self.args.weight_decay,
            learning_rate=self.args.learning_rate,
            projector_lr=getattr(self.args, "mm_projector_lr", None),
            tower_lr=getattr(self.args, "mm_vision_tower_lr", None),
        )
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, target)
        self.optimizer = kind(groups, **options)
        if "bitsandbytes" in str(kind) and options.get("optim_bits") == 8:
            self._keep_embeddings_in_32_bit(target)
        self.meter.watch_optimizer(self.optimizer)
        return self.optimizer

    @staticmethod
    def _keep_embeddings_in_32_bit(model: nn.Module) -> None:
        from bitsandbytes.optim.optimizer import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})

    # ---- one step

    def is_over(self) -> bool:
        """True when every step of the run has been taken."""
        return 0 < self.state.max_steps <= self.state.global_step

    def _will_log(self) -> bool:
        every = self.state.logging_steps or 0
        return every > 0 and (self.state.global_step + 1) % every == 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the batches of one optimizer step, and time it."""
        if self.is_over():
            # transformers would take one more step before it looks at the limit.
            self.control.should_training_stop = True
            return [], None
        self.meter.measure(self._will_log())
        self.meter.start("data")
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self.meter.stop("data")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward, timed."""
        self.meter.start("language")
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.meter.stop("language")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one batch.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        inputs = dict(inputs)
        ids = inputs.pop(SAMPLE_IDS, None)
        draw = self._draws_now(model)
        with duet.trace(images=draw) as trace:
            result = self._loss(model, inputs, return_outputs, num_items_in_batch)
        loss: torch.Tensor = result[0] if isinstance(result, tuple) else result
        if not math.isfinite(loss.item()):
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, rank {self.args.process_index}, for "
                f"the samples {ids}. Look at these records, lower the learning rate, or train in bf16 or fp32 instead "
                "of fp16"
            )
        if model.training and trace.passes:
            self.meter.count_pass(trace.passes[0])
        if draw:
            self._draw(inputs.get("images"), trace.images)
        return result

    def _loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any) -> Any:
        """Loss, or (loss, outputs); logits are made only where somebody is going to read them."""
        has_labels = inputs.get("labels") is not None
        if has_labels and (self.label_smoother is not None or self.compute_loss_func is not None):
            outputs: Any = model(**inputs)
            loss = self._paired_loss(outputs, inputs["labels"], num_items_in_batch)
        elif return_outputs:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            skips = {"skip_logits": True} if has_labels and self._skips_logits else {}
            return super().compute_loss(model, {**inputs, **skips}, False, num_items_in_batch)
        self._paired_labels = getattr(outputs, "labels", None)
        return (loss, outputs) if return_outputs else loss

    def _paired_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """Loss of `compute_loss_func` or of label smoothing, on the labels that stand beside the logits."""
        paired: torch.Tensor = labels if getattr(outputs, "labels", None) is None else outputs.labels
        supervised = (paired[:, 1:] != IGNORE_INDEX).sum()
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, paired, num_items_in_batch=num_items_in_batch)
        elif not supervised:
            return outputs.logits.sum() * 0.0  # a mean over nothing would be NaN
        else:
            smoother: Any = self.label_smoother
            loss = smoother(outputs, paired, shift_labels=True)
            if num_items_in_batch is not None:
                loss = loss * supervised / num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.args.n_gpu if self.args.n_gpu > 1 else self.accelerator.num_processes)
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """One step of an evaluation; `compute_metrics` gets logits with the labels that stand beside them."""
        if prediction_loss_only and self._skips_logits and self.label_smoother is None and not self.compute_loss_func:
            inputs = {**inputs, "skip_logits": True}
        if ignore_keys is None:
            ignore_keys = list(getattr(self.model.config, "keys_to_ignore_at_inference", ()))
        self._paired_labels = None
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, [*ignore_keys, "cache", "past_key_values", "labels"]
        )
        return loss, logits, labels if labels is None or self._paired_labels is None else self._paired_labels.detach()

    def _draws_now(self, model: nn.Module) -> bool:
        every = getattr(self.args, "image_log_steps", 0)
        first = self.state.global_step != getattr(self, "_drawn_at", -1)
        due = every > 0 and self.state.global_step % every == 0 and first
        return bool(due and model.training and self.run_log.active and self.image_processor is not None)

    def _draw(self, images: Any, records: list[Any]) -> None:
        self._drawn_at = self.state.global_step
        if images is None:
            return
        folder = self.run_log.output_dir / "overlays"
        step = self.state.global_step
        paths = draw_kept_tokens(
            images, records, self.image_processor, folder, f"step_{step:06d}", self.args.image_log_count
        )
        self.run_log.pictures(step, paths)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add rates, tokens, times and memory to what is logged."""
        if "loss" in logs and self.meter.sums["steps"] > 0:
            row = self.meter.vector()
            gathered: Any = self.accelerator.gather(row.to(self.args.device).float().unsqueeze(0))
            rows = gathered.double().cpu()
            logs |= {name: round(value, 6) for name, value in self.meter.summary(rows).items()}
            self.meter.reset()
            # The Trainer logs one rate; the projector's own has to be visible next to it.
            logs |= {name: rate for name, rate in self.rates.items() if name != "lr"}
        super().log(logs, start_time)

    # ---- saving

    def save_kind(self) -> str:
        """What a save writes: `adapter`, `projector` or `full`."""
        if getattr(self.args, "lora_enable", False):
            return "adapter"
        learns = {part_of(name) for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        only_projector = getattr(self.args, "tune_mm_mlp_adapter", False) and "vision_tower" not in learns
        return "projector" if only_projector else "full"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model of this run in LLaVA's files. Every rank has to call it.

        Raises:
            NonFiniteWeights: on every rank, if the weights of any are NaN or infinite; nothing is written then.
        """
        if not _internal_call:
            self._require_finite_weights()
        folder = Path(output_dir or self.args.output_dir)
        kind = self.save_kind()
        if kind == "full":
            super().save_model(str(folder), _internal_call)
            return
        if kind == "adapter":
            checkpoints.save_adapter(self.model, folder, write=self.args.should_save)
        else:
            state = checkpoints.projector_state(self.model, getattr(self.args, "use_im_start_end", False))
            if self.args.should_save:
                checkpoints.save_projector(state, folder)
                self.model.config.save_pretrained(folder)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _require_finite_weights(self) -> None:
        """Stop all ranks where a step made weights NaN although its loss was finite; what is saved stays."""
        names = sanity.non_finite_weights(self.model)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            every: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(every, names)
            names = list(dict.fromkeys(name for own in every for name in own))
        sanity.refuse_non_finite(names, f"step {self.state.global_step}, nothing is saved")

    def _save_checkpoint(self, model: nn.Module, trial: Any, metrics: Any = None) -> None:
        """Save everything that resuming needs; only then does it count, and only then are older checkpoints deleted.

        `metrics` is what older trainers passed here; today's reads them from its state.
        """
        del metrics
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.state.global_step == self.resumed_at:
            return  # no step was taken since: what is saved is this
        self._require_finite_weights()
        begin = time.perf_counter()
        # What an interrupted save left behind must not be mixed with the new files.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                settings = Path(self.args.output_dir) / SETTINGS
                if settings.is_file():
                    shutil.copyfile(settings, folder / SETTINGS)
                checkpoints.mark_complete(
                    folder, step=self.state.global_step, kind=self.save_kind(), world_size=self.args.world_size
                )
                checkpoints.rotate(self.args.output_dir, limit, keep=folder)
        except Exception as err:
            if not checkpoints.looks_like_write_failure(err):
                raise
            raise checkpoints.save_failure(folder, err) from err
        finally:
            self.args.save_total_limit = limit
            self.meter.since += time.perf_counter() - begin

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Frozen weights are loaded at the start of a run; with them a stage-1 state would be as large as the LLM.
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=self._has_frozen())
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _has_frozen(self) -> bool:
        return any(not parameter.requires_grad for parameter in self.model.parameters())

    # ---- resuming

    def weight_names(self) -> list[str] | None:
        """Files of a checkpoint that hold what learns; None for a whole model, in one file or in shards."""
        kind = self.save_kind()
        if kind == "full":
            return None
        if kind == "projector":
            return [checkpoints.PROJECTOR_FILE]
        others = any(value.requires_grad and "lora_" not in name for name, value in self.model.named_parameters())
        return [ADAPTER_FILE, checkpoints.NON_LORA_FILE] if others else [ADAPTER_FILE]

    def needs(self, folder: Path) -> list[str]:
        """What a checkpoint lacks for this run; see `resume.lacking`."""
        found = lacking(folder, self.weight_names(), self.is_deepspeed_enabled)
        ranks = self.args.world_size
        if not found and not (folder / ("rng_state.pth" if ranks == 1 else f"rng_state_{ranks - 1}.pth")).is_file():
            logger.warning(
                "%s has no random state for %d ranks: dropout draws other numbers from here on", folder, ranks
            )
        return found

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        with for_these_ranks(Path(resume_from_checkpoint), self.args) as place:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            groups = keep_groups(self.optimizer)
            path, _ = self.model_wrapped.load_checkpoint(place, load_module_strict=not self._has_frozen())
        if path is None:
            raise checkpoints.CheckpointError(f"{resume_from_checkpoint} has no DeepSpeed state that can be read")
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        if str(place) != resume_from_checkpoint:
            restore_groups(self.optimizer, groups, self.lr_scheduler)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target: Any = self.model if model is None else model
        folder = Path(resume_from_checkpoint)
        kind = self.save_kind()
        if kind == "adapter":
            load_adapter(target, folder)
            return
        files = shards(folder) if kind == "full" else [folder / checkpoints.PROJECTOR_FILE]
        loaded: set[str] = set()
        for file in files:
            tensors = {to_own_key(key): value for key, value in read_tensors(str(file)).items()}
            loaded.update(load_partial(target, tensors, str(file)))
        learns = {name for name, parameter in target.named_parameters() if parameter.requires_grad}
        if learns - loaded:
            raise checkpoints.CheckpointError(
                f"{folder}: {len(learns - loaded)} weights that are trained are in no file of this checkpoint, e.g. "
                f"{min(learns - loaded)}"
            )
