"""Training at equal memory: how many samples fit where full tokens fit a batch, and what a step with them takes.

Fewer tokens leave less for the backward pass to remember, so a batch can grow.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from duet.bench_run import FULL, Case, Entry, Plan, configured, make_optimizer, run_once
from duet.probe import seconds_of, tracked_peak


@dataclass
class Fit:
    """One configuration at the batch size that its memory allows.

    Attributes:
        name: of the configuration.
        batch: samples of a step.
        memory: bytes that a step needs beyond weights and optimizer state.
        seconds: of each timed step.
    """

    name: str
    batch: int
    memory: int
    seconds: list[float] = field(default_factory=list)

    @property
    def per_sample(self) -> float:
        """Median seconds of a step, divided by its samples."""
        return statistics.median(self.seconds) / self.batch


def run_equal_memory(model: nn.Module, shape: Any, case: Case, entries: Sequence[Entry], plan: Plan) -> list[Fit]:
    """Return full tokens at the case's batch size, and every reduction at the largest one that needs no more memory.

    Args:
        model: on its device.
        shape: what the model is like.
        case: a training case.
        entries: full tokens among them; eager ones and the untouched model are left out.
        plan: how many steps are timed.
    """
    device = next(model.parameters()).device
    model.train()
    optimizer = make_optimizer(model)

    def step(batch: int) -> Callable[[], None]:
        inputs = replace(case, batch=batch).inputs(model, shape, device)
        return lambda: run_once(model, inputs, optimizer)

    def peak(entry: Entry, batch: int) -> int:
        with configured(model, entry):
            gc.collect()
            return tracked_peak(step(batch), device)

    full = next(entry for entry in entries if entry.name == FULL)
    step(case.batch)()  # makes the optimizer's state
    room = peak(full, case.batch)
    pairs = [(full, Fit(FULL, case.batch, room))]
    for entry in entries:
        if entry.config is not None and not entry.eager:
            batch, used = largest_batch(lambda size, one=entry: peak(one, size), case.batch, room)
            pairs.append((entry, Fit(entry.name, batch, used)))
            plan.say(f"equal memory: {entry.name} fits {batch} samples where full tokens fit {case.batch}")
    for number in range(plan.rounds):
        for entry, fit in pairs[number % len(pairs) :] + pairs[: number % len(pairs)]:
            run = step(fit.batch)
            with configured(model, entry):
                gc.collect()
                fit.seconds.append(seconds_of(run, device))
        plan.say(f"equal memory: round {number + 1} of {plan.rounds}")
    return [fit for _, fit in pairs]


def largest_batch(peak: Callable[[int], int], start: int, room: int) -> tuple[int, int]:
    """Return about the largest batch whose peak fits into ``room`` bytes, and its peak; at least ``start``.

    The batch is doubled until it does not fit, so no step needs much more than twice the room; what lies between is
    interpolated and measured.
    """
    low, least = start, peak(start)
    if least > room:
        return low, least
    high, most = 2 * low, peak(2 * low)
    while most <= room:
        low, least, high = high, most, 2 * high
        most = peak(high)
    while (batch := low + int((room - least) * (high - low) / (most - least))) > low:
        used = peak(batch)
        if used <= room:
            return batch, used
        high, most = batch, used
    return low, least
