"""Figures of a training step: where the time went, how many tokens, how much memory."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from typing import Any

import torch
from torch import nn

SECTIONS = ("data", "vision", "language", "optimizer")
SUMS = (
    "positions",
    "padding",
    "visual_entering",
    "visual_average",
    "image_samples",
    "steps",
    "wall",
    *SECTIONS,
    "measured",
)


def peak_memory_bytes() -> int:
    """Highest memory use of this process so far: device memory where there is a device, otherwise resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class StepMeter:
    """Collects the figures of the steps between two log lines on one rank.

    The vision time is the forward pass of tower and projector, the optimizer time that of the optimizer's step, and the
    language time the rest of forward and backward. On a device every boundary waits for the queue, so only the steps
    that `measure` is called for are timed; the counts cover all steps.
    """

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything that was collected."""
        self.sums: dict[str, float] = dict.fromkeys(SUMS, 0.0)
        self.stages: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.since = time.perf_counter()
        self.measuring = False
        self._open: dict[str, float] = {}
        self._inner = 0.0

    def watch_model(self, model: nn.Module) -> None:
        """Time the forward passes of the tower and the projector through hooks on these instances."""
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] == "mm_projector" or type(module).__name__.startswith("CLIPVisionTower"):
                self.handles.append(module.register_forward_pre_hook(lambda *_: self.start("vision")))
                self.handles.append(module.register_forward_hook(lambda *_: self.stop("vision")))

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Time the optimizer's step, also when DeepSpeed calls it from inside the backward pass."""
        self.handles.append(optimizer.register_step_pre_hook(lambda *_: self.start("optimizer")))
        self.handles.append(optimizer.register_step_post_hook(lambda *_: self.stop("optimizer")))

    def measure(self, active: bool) -> None:
        """Time the sections from now on, or stop doing so."""
        self.measuring = active or not torch.cuda.is_available()

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self, section: str) -> None:
        """Begin a section."""
        if self.measuring:
            self._open[section] = self._now()

    def stop(self, section: str) -> None:
        """End a section that began."""
        if section in self._open:
            spent = self._now() - self._open.pop(section)
            # Vision and optimizer run inside the language section, which must not count them twice.
            if section in ("vision", "optimizer") and "language" in self._open:
                self._inner += spent
            if section == "language":
                spent, self._inner = spent - self._inner, 0.0
            self.sums[section] += spent

    def count_step(self) -> None:
        """One optimizer step ended."""
        self.sums["steps"] += 1
        self.sums["measured"] += 1 if self.measuring else 0

    def count_pass(self, segments: list[Any]) -> None:
        """Add the token counts of one decoder pass.

        Args:
            segments: `duet.trace` counts: `start`, `stop`, `visual` and `tokens` per sample, `padded_length`.
        """
        depth = segments[-1].stop
        first = segments[0]
        self.sums["positions"] += first.padded_length * len(first.tokens)
        self.sums["padding"] += first.padded_length * len(first.tokens) - sum(first.tokens)
        rows = [row for row, visual in enumerate(first.visual) if visual > 0]
        self.sums["image_samples"] += len(rows)
        for segment in segments:
            seen = sum(segment.visual[row] for row in rows)
            self.sums["visual_average"] += seen * (segment.stop - segment.start) / depth
            self.stages[segment.start][0] += seen
            self.stages[segment.start][1] += len(rows)
        self.sums["visual_entering"] += sum(first.visual[row] for row in rows)

    def vector(self) -> torch.Tensor:
        """This rank's figures as one row, to be gathered: the sums, then the peak memory in bytes."""
        self.sums["wall"] = time.perf_counter() - self.since
        return torch.tensor([*(self.sums[name] for name in SUMS), float(peak_memory_bytes())], dtype=torch.float64)

    def summary(self, rows: torch.Tensor) -> dict[str, float]:
        """Turn the gathered rows of all ranks into what is logged.

        Args:
            rows: [ranks, figures] from `vector`.

        Returns:
            Tokens per second over all ranks, visual tokens per image sample, share of padding, seconds per optimizer
            step by section, peak memory in MB of the fullest rank; only figures that something was counted for.
        """
        total = dict(zip(SUMS, rows[:, :-1].sum(0).tolist(), strict=True))
        slowest = dict(zip(SUMS, rows[:, :-1].max(0).values.tolist(), strict=True))
        out: dict[str, float] = {"peak_memory_mb": rows[:, -1].max().item() / 1e6}
        if slowest["wall"] > 0 and total["positions"] > 0:
            out["tokens_per_second"] = (total["positions"] - total["padding"]) / slowest["wall"]
            out["padding_share"] = total["padding"] / total["positions"]
        if slowest["steps"] > 0:
            out["seconds_per_step"] = slowest["wall"] / slowest["steps"]
        if total["measured"] > 0:
            out |= {f"seconds_{name}": total[name] / total["measured"] for name in SECTIONS}
        if total["image_samples"] > 0:
            out["visual_tokens_entering"] = total["visual_entering"] / total["image_samples"]
            out["visual_tokens_average"] = total["visual_average"] / total["image_samples"]
        for start, (seen, samples) in sorted(self.stages.items()):
            if samples:
                out[f"visual_tokens_from_layer_{start}"] = seen / samples
        return out

    def close(self) -> None:
        """Remove the hooks."""
        while self.handles:
            self.handles.pop().remove()
