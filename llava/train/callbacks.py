"""What happens beside the training loop: signals, logs, and the check that frozen weights stayed frozen."""

from __future__ import annotations

import logging
import math
import os
import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from llava.train.optim import frozen_digest, learning_rates
from llava.train.run_log import RunLog

logger = logging.getLogger(__name__)

EXIT_STOPPED = 143
"""Exit code of a run that SIGTERM ended after it had saved a checkpoint (128 + 15)."""


LAUNCHER_PID = "LLAVA_LAUNCHER_PID"
"""Environment variable: the process that started this run and that a run must not outlive."""


class StopSignal:
    """Turns SIGTERM into a request that is honoured at the next step boundary.

    Before training begins there is nothing to save, so the signal ends the process at once. The end of the process that
    started the run counts as a request too: otherwise ranks would go on beside the next start of the same command.
    """

    def __init__(self) -> None:
        self.requested = False
        self.armed = False
        self.launcher = int(os.environ.get(LAUNCHER_PID, "0"))

    def launcher_is_gone(self) -> bool:
        """True when the process that started the run has ended."""
        return self.launcher > 0 and not os.path.exists(f"/proc/{self.launcher}") and os.path.exists("/proc/self")

    def install(self) -> StopSignal:
        """Take over SIGTERM in this process."""
        signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self.armed:
            raise SystemExit(EXIT_STOPPED)

    def agreed(self, device: torch.device) -> bool:
        """True on every rank when any rank was asked to stop."""
        self.requested = self.requested or self.launcher_is_gone()
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return self.requested
        flag = torch.tensor([float(self.requested)], device=device)
        distributed.all_reduce(flag)
        return bool(flag.item() > 0)


class StopCallback(TrainerCallback):
    """Saves and stops at the step boundary after SIGTERM."""

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
