"""What happens beside the training loop: signals, logs, and the check that frozen weights stayed frozen."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback

from llava.train.optim import frozen_digest, learning_rates
from llava.train.run_log import RunLog
from llava.train.stopping import EXIT_STOPPED as EXIT_STOPPED
from llava.train.stopping import LAUNCHER_PID as LAUNCHER_PID
from llava.train.stopping import StopSignal as StopSignal

logger = logging.getLogger(__name__)


class StopCallback(TrainerCallback):
    """Saves and stops at the step boundary after a stop signal."""

    def __init__(self, trainer: Any, stop: StopSignal) -> None:
        self.trainer = trainer
        self.stop = stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on there is something to save."""
        self.stop.armed = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a checkpoint and the end of the loop."""
        if self.stop.agreed(args.device):
            self.trainer.stopped_at = state.global_step
            control.should_save = True
            control.should_training_stop = True
        return control


class LogCallback(TrainerCallback):
    """Writes what the Trainer logs to the run's log, and counts steps."""

    def __init__(self, trainer: Any, run_log: RunLog, raise_on_nan_grad: bool = False) -> None:
        self.trainer = trainer
        self.run_log = run_log
        self.raise_on_nan_grad = raise_on_nan_grad

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Remember the rates of this step, before the scheduler changes them."""
        self.trainer.rates = learning_rates(optimizer.param_groups)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step."""
        self.trainer.meter.count_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line of figures.

        Raises:
            FloatingPointError: the gradient norm is not finite and the run was asked to stop then.
        """
        values = dict(logs or {})
        self.run_log.metrics(state.global_step, values)
        norm = values.get("grad_norm")
        if self.raise_on_nan_grad and norm is not None and not math.isfinite(float(norm)):
            raise FloatingPointError(f"the gradient norm is {norm} at step {state.global_step} (--raise_on_nan_grad)")


class EpochCallback(TrainerCallback):
    """Tells the sampler which epoch begins.

    accelerate does it too, except for a run on several ranks that resumes in the middle of a later epoch: there the
    sampler is wrapped once more, is not found, and would repeat the order of the first epoch.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Walk through the wrappers to the sampler."""
        layer: Any = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(layer, "batch_sampler"):
            layer = layer.batch_sampler
        sampler: Any = getattr(layer, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch or 0))


class FrozenCallback(TrainerCallback):
    """Makes sure that a frozen tower comes out of training as it went in."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.before: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the fingerprint, after DeepSpeed has chosen the weights' type."""
        self.before = frozen_digest(self.model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare.

        Raises:
            RuntimeError: a frozen weight of the tower changed.
        """
        if frozen_digest(self.model) != self.before:
            raise RuntimeError(
                "frozen weights of the vision tower changed during training: do not use this checkpoint, and report "
                "which flags were used"
            )
