"""How ``duet.bench`` measures: configurations of one case interleaved round by round, sections, memory, decoding."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from duet.attach import attach
from duet.bench_device import energy_meter
from duet.bench_eager import eager_attached
from duet.bench_roofline import Machine, possible_seconds, predicted_flops
from duet.config import DuetConfig
from duet.probe import Parts, PeakMemory, Probe, now, peak_memory, wait_for
from duet.versions import CACHE, cache_of

UNTOUCHED = "transformers"  # the model as the library runs it
FULL = "full"  # all tokens, through DUET's code
EAGER = " eager"  # behind the name of a configuration that is forced to eager maps
ENERGY_SECONDS = 2.0  # an energy counter ticks some ten times a second


@dataclass(frozen=True)
class Case:
    """One kind of work: prefill or training step at one batch size."""

    kind: str
    batch: int
    text: int
    supervised: int

    def inputs(self, model: nn.Module, shape: Any, device: torch.device) -> dict[str, Tensor]:
        """System prompt, image, question; labels on the last ``supervised`` positions."""
        return shape.inputs(self, device, next(model.parameters()).dtype)


@dataclass(frozen=True)
class Entry:
    """One configuration of a run: how it is called, what it keeps (None: all), whether by eager maps."""

    name: str
    config: DuetConfig | None
    eager: bool = False

    @property
    def untouched(self) -> bool:
        """Whether the library runs the model by itself."""
        return self.name == UNTOUCHED


@dataclass
class Row:
    """What was measured and predicted for one configuration of one case.

    ``flops`` counts what a causal kernel computes, ``flops_square`` bills attention as the full square. ``possible``
    is the least time of each section that the machine allows. Bytes of the KV cache are as measured and as predicted.
    """

    name: str
    tokens_entering: int
    tokens_average: float
    flops: dict[str, float]
    flops_square: dict[str, float]
    seconds: list[dict[str, float]] = field(default_factory=list)
    memory: PeakMemory | None = None
    possible: dict[str, float] = field(default_factory=dict)
    kv_bytes: int | None = None
    kv_predicted: int | None = None
    joules: float | None = None

    def median(self, *sections: str) -> float:
        """Median seconds of the sum of some sections."""
        return statistics.median(sum(run[s] for s in sections) for run in self.seconds)

    def spread(self, section: str) -> tuple[float, float]:
        """Smallest and largest seconds of a section."""
        values = [run[section] for run in self.seconds]
        return min(values), max(values)

    @property
    def segments(self) -> list[str]:
        """Names of the decoder's segments among the sections."""
        return [name for name in (self.seconds[0] if self.seconds else {}) if name.startswith("segment")]


LANGUAGE = ("decoder", "stage2", "head", "backward")


def paired_ratio(full: Row, row: Row, sections: Sequence[str]) -> float:
    """Median over rounds of (full / row), each round with its own pair."""
    pairs = zip(full.seconds, row.seconds, strict=True)
    return statistics.median(sum(a[s] for s in sections) / sum(b[s] for s in sections) for a, b in pairs)


@dataclass(frozen=True)
class Plan:
    """What one run measures besides the cases.

    Attributes:
        rounds: timed runs of each configuration.
        decode: decoding steps after each timed prefill, the first of which is not counted; 0 for none.
        machine: rates of the device.
        say: where progress goes.
    """

    rounds: int
    decode: int
    machine: Machine
    say: Callable[[str], None]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return an AdamW over what learns."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)


def run_once(model: nn.Module, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """One prefill (no optimizer) or one training step, unmeasured."""
    if optimizer is None:
        with torch.inference_mode():
            model(**inputs, use_cache=True, logits_to_keep=1)
        return
    model(**inputs, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def time_once(
    model: nn.Module,
    parts: Parts,
    inputs: dict[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    edges: Sequence[int] = (),
) -> tuple[dict[str, float], Any]:
    """Time one prefill or training step.

    Returns the seconds of each section, their sum under ``total``, those of the decoder's segments (which end after
    ``edges`` layers) under ``segment1`` and so on; and the output of a prefill.
    """
    device = next(model.parameters()).device
    probe = Probe(parts, device)
    if optimizer is None:
        with torch.inference_mode(), probe:
            out = model(**inputs, use_cache=True, logits_to_keep=1)
        return probe.seconds() | {"backward": 0.0, "optimizer": 0.0} | _segments(probe, edges), out
    with probe:
        loss = model(**inputs, use_cache=False).loss
    forward = probe.seconds() | _segments(probe, edges)
    start = time.perf_counter()
    loss.backward()
    middle = now(device)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    end = now(device)
    forward["total"] += end - start
    return forward | {"backward": middle - start, "optimizer": end - middle}, None


def _segments(probe: Probe, edges: Sequence[int]) -> dict[str, float]:
    layers = probe.layer_seconds()
    bounds = [0, *edges, len(layers)]
    return {f"segment{n}": sum(layers[start:stop]) for n, (start, stop) in enumerate(pairwise(bounds), 1)}


def decode_seconds(model: nn.Module, out: Any, steps: int) -> float:
    """Return the median seconds of a decoding step after a prefill; one more step comes first, uncounted.

    Nothing here is padding, so a step needs no mask.
    """
    device, seconds = next(model.parameters()).device, []
    ids, cache = out.logits[:, -1:].argmax(-1), cache_of(out)
    with torch.inference_mode():
        for _ in range(steps + 1):
            start = now(device)
            step = model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            ids, cache = step.logits[:, -1:].argmax(-1), cache_of(step)
            seconds.append(now(device) - start)
    return statistics.median(seconds[1:])


def cache_bytes(cache: Any) -> int:
    """Return the bytes of the keys and values that a cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@contextlib.contextmanager
def configured(model: nn.Module, entry: Entry) -> Iterator[None]:
    """The model with a configuration attached; untouched for the row that says so."""
    if entry.untouched:
        yield
    else:
        config = entry.config or DuetConfig.none()
        with eager_attached(model, config) if entry.eager else attach(model, config):
            yield


def run_case(model: nn.Module, shape: Any, case: Case, entries: Sequence[Entry], plan: Plan) -> list[Row]:
    """Measure all configurations of a case, interleaved."""
    device = next(model.parameters()).device
    inputs = case.inputs(model, shape, device)
    optimizer = make_optimizer(model) if case.kind == "train" else None
    model.train(case.kind == "train")
    rows = [_empty_row(model, shape, case, entry, plan.machine) for entry in entries]
    pairs = list(zip(entries, rows, strict=True))
    if optimizer is not None:
        run_once(model, inputs, optimizer)  # makes the optimizer's state
    for entry, row in pairs:  # also the warm-up of every configuration
        with configured(model, entry):
            gc.collect()
            row.memory = peak_memory(lambda: run_once(model, inputs, optimizer), device)
    for number in range(plan.rounds):
        shift = number % len(rows)
        for entry, row in pairs[shift:] + pairs[:shift]:
            gc.collect()
            with configured(model, entry):
                _time_row(model, shape, inputs, optimizer, entry, row, plan.decode)
        plan.say(f"{case.kind} batch {case.batch} text {case.text}: round {number + 1} of {plan.rounds}")
    _measure_energy(model, inputs, optimizer, pairs, device)
    return rows


def _empty_row(model: nn.Module, shape: Any, case: Case, entry: Entry, machine: Machine) -> Row:
    used = entry.config or DuetConfig.none()
    weights = next(model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = [case.text + n for n in used.tokens_per_layer(shape.patches, shape.layers)]
    size = weights.element_size()
    return Row(
        entry.name,
        used.entering_tokens(shape.patches),
        used.average_tokens(shape.patches, shape.layers),
        predicted_flops(shape, case, entry.config, untouched=entry.untouched, causal=True),
        predicted_flops(shape, case, entry.config, untouched=entry.untouched),
        possible=possible_seconds(machine, shape, case, entry.config, trained, size, entry.untouched),
        kv_predicted=case.batch * shape.decoder().kv_bytes(held, size) if case.kind == "prefill" else None,
    )


def _time_row(
    model: nn.Module, shape: Any, inputs: dict[str, Tensor], optimizer: Any, entry: Entry, row: Row, decode: int
) -> None:
    edges = list(entry.config.for_depth(shape.layers).schedule) if entry.config else []
    seconds, out = time_once(model, shape.parts(model), inputs, optimizer, edges)
    if out is not None:
        row.kv_bytes = cache_bytes(cache_of(out))
        if decode:
            seconds["decode"] = decode_seconds(model, out, decode)
    row.seconds.append(seconds)


def _measure_energy(model: nn.Module, inputs: dict, optimizer: Any, pairs: list, device: torch.device) -> None:
    """Set the joules of one run of every row, where the device counts them."""
    meter = energy_meter(device)
    if meter is None:
        return
    for entry, row in pairs:
        with configured(model, entry):
            wait_for(device)
            before, start, runs = meter(), time.perf_counter(), 0
            while time.perf_counter() - start < ENERGY_SECONDS:
                run_once(model, inputs, optimizer)
                wait_for(device)
                runs += 1
            row.joules = (meter() - before) / runs
