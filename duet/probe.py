"""Where time and memory go in one forward pass: a probe of hooks on a model's own parts, and peak-memory readings.

The probe divides a pass into tower, stage 1, projector, decoder, stage 2, head, what follows the head (in a training
step the loss) and the rest. The two stages are what lies *between* the modules: stage 1 is the time between the tower's
layers and the projector that no tower module accounts for, stage 2 the time between decoder layers. So it needs no
co-operation of the code that it measures, and what a model spends there without any reduction (slicing, Python) is
measured the same way. A packed tower (Qwen) is reduced behind its merger: there stage 1 is the time between merger and
decoder, and the tower all that comes before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

SECTIONS = ("tower", "stage1", "projector", "decoder", "stage2", "head", "loss", "other")


@dataclass
class Parts:
    """The modules of a vision-language model that a probe watches, each group in the order in which it runs.

    ``packed`` says that stage 1 comes after the projector, and that the tower works between its modules, too.
    """

    tower: Sequence[nn.Module]
    projector: Sequence[nn.Module]
    decoder: Sequence[nn.Module]
    head: Sequence[nn.Module]
    packed: bool = False

    @classmethod
    def of_llava(cls, model: nn.Module) -> Parts:
        """Find the parts of a Hugging Face ``LlavaForConditionalGeneration``."""
        inner = model.get_submodule("model")
        tower = inner.get_submodule("vision_tower")
        tower = getattr(tower, "vision_model", tower)
        decoder = inner.get_submodule("language_model")
        embeddings = [tower.get_submodule("embeddings"), tower.get_submodule("pre_layrnorm")]
        after = [tower.get_submodule("post_layernorm")]
        return cls(
            tower=[*embeddings, *tower.get_submodule("encoder.layers").children(), *after],
            projector=[inner.get_submodule("multi_modal_projector")],
            decoder=[*decoder.get_submodule("layers").children(), decoder.get_submodule("norm")],
            head=[model.get_submodule("lm_head")],
        )

    @classmethod
    def of_qwen(cls, model: nn.Module) -> Parts:
        """Find the parts of a Hugging Face ``Qwen2_5_VLForConditionalGeneration``."""
        tower = model.get_submodule("model.visual")
        decoder = model.get_submodule("model.language_model")
        return cls(
            tower=[tower.get_submodule("patch_embed")],
            projector=[tower.get_submodule("merger")],
            decoder=[*decoder.get_submodule("layers").children(), decoder.get_submodule("norm")],
            head=[model.get_submodule("lm_head")],
            packed=True,
        )


@dataclass
class _Mark:
    """One end of one module's run."""

    group: str
    starts: bool
    stamp: object


@dataclass
class Probe:
    """Times the groups of ``parts`` while it is active; use as a context manager around one forward pass.

    Modifications: forward hooks on the given modules, removed on exit.

    Attributes:
        parts: what to watch.
        device: where the model runs; on an accelerator the marks are stream events, and reading them synchronises.
    """

    parts: Parts
    device: torch.device
    _marks: list[_Mark] = field(default_factory=list)
    _handles: list = field(default_factory=list)

    def __enter__(self) -> Probe:
        self._marks.clear()
        for group in ("tower", "projector", "decoder", "head"):
            for module in getattr(self.parts, group):
                self._handles.append(module.register_forward_pre_hook(self._recorder(group, starts=True)))
                self._handles.append(module.register_forward_hook(self._recorder(group, starts=False)))
        self._mark("whole", starts=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._mark("whole", starts=False)
        while self._handles:
            self._handles.pop().remove()

    def _recorder(self, group: str, starts: bool) -> Callable[..., None]:
        def record(*_: object) -> None:
            self._mark(group, starts)

        return record

    def _mark(self, group: str, starts: bool) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(_Mark(group, starts, event))
        else:
            self._marks.append(_Mark(group, starts, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every section of the last pass, and their sum under ``"total"``.

        Raises:
            RuntimeError: the pass did not run the decoder, so there is nothing to divide.
        """
        wait_for(self.device)
        marks = [(mark.group, mark.starts, self._seconds_until(mark)) for mark in self._marks]
        busy = {group: 0.0 for group in ("tower", "projector", "decoder", "head")}
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        for group, starts, at in marks:
            first.setdefault(group, at)
            last[group] = at
            if group in busy:
                busy[group] += -at if starts else at
        if "decoder" not in first:
            raise RuntimeError("the probe saw no decoder layer run; is it active around the forward pass of its model?")
        out = {name: 0.0 for name in SECTIONS} | busy
        if self.parts.packed and "tower" in first:
            out["tower"] = first["projector"] - first["tower"]
            out["stage1"] = first["decoder"] - last["projector"]
        elif "tower" in first:
            out["stage1"] = first.get("projector", last["tower"]) - first["tower"] - busy["tower"]
        out["stage2"] = last["decoder"] - first["decoder"] - busy["decoder"]
        out["loss"] = last["whole"] - first["head"] - busy["head"] if "head" in first else 0.0
        total = last["whole"] - first["whole"]
        out["other"] = total - sum(out.values())
        return out | {"total": total}

    def layer_seconds(self) -> list[float]:
        """Return the seconds of every decoder module of the last pass, in the order in which they ran."""
        stamps = [self._seconds_until(mark) for mark in self._marks if mark.group == "decoder"]
        return [stop - start for start, stop in zip(stamps[::2], stamps[1::2], strict=True)]

    def _seconds_until(self, mark: _Mark) -> float:
        start = self._marks[0].stamp
        if isinstance(start, torch.cuda.Event):
            return start.elapsed_time(mark.stamp) / 1000  # type: ignore[arg-type]
        return mark.stamp - start  # type: ignore[operator]


def wait_for(device: torch.device) -> None:
    """Wait until everything that was started on a device has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Return the time in seconds at which everything that was started on a device has ended."""
    wait_for(device)
    return time.perf_counter()


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run, from a device that waits to one that has finished."""
    start = now(device)
    run()
    return now(device) - start


@dataclass(frozen=True)
class PeakMemory:
    """Bytes that a run needed at its peak, beyond what was allocated before it.

    Attributes:
        tracked: from the allocator's own events; exact, kernels' scratch space included.
        resident: growth of the process's resident set (CPU only; a coarse cross-check that has the profiler's own notes
            in it), or None where unknown.
    """

    tracked: int
    resident: int | None


def peak_memory(run: Callable[[], object], device: torch.device) -> PeakMemory:
    """Run something once and return its peak memory.

    Args:
        run: what to measure; its result is dropped at once.
        device: where it allocates.
    """
    before = None if device.type == "cuda" else _reset_resident()
    tracked = tracked_peak(run, device)
    return PeakMemory(tracked, None if before is None else _status_bytes("VmHWM") - before)


def tracked_peak(run: Callable[[], object], device: torch.device) -> int:
    """Run something once and return ``PeakMemory.tracked``."""
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, current)
    return peak


def _reset_resident() -> int | None:
    """Set the resident set's high-water mark back to its size, which is returned; None where no process may (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
