"""What ``duet.bench`` asks of the machine: the device, its energy counter, and how long an image processor takes."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

PHOTO = (480, 640, 3)


def pick_device(name: str) -> torch.device:
    """Return the device, or leave with a clear message when this machine does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no CUDA or ROCm device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {name}; there are {torch.cuda.device_count()}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"cannot measure on {device.type!r}; use cpu, cuda or cuda:N")
    return device


def energy_meter(device: torch.device) -> Callable[[], float] | None:
    """Return what reads the joules that a device has used so far, or None where nothing tells.

    NVIDIA GPUs are read through ``pynvml`` (package nvidia-ml-py), AMD GPUs through ``amdsmi``; neither is required.
    """
    if device.type != "cuda":
        return None
    try:
        meter = _nvidia(device) if torch.version.hip is None else _amd(device)
        meter()
    except Exception:  # the tool, the driver or the counter is missing: there is no energy column then
        return None
    return meter


def _nvidia(device: torch.device) -> Callable[[], float]:
    nvml: Any = importlib.import_module("pynvml")
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # counted in millijoules


def _amd(device: torch.device) -> Callable[[], float]:
    smi: Any = importlib.import_module("amdsmi")
    smi.amdsmi_init()
    handle = smi.amdsmi_get_processor_handles()[device.index or 0]

    def joules() -> float:
        counted = smi.amdsmi_get_energy_count(handle)
        total = counted.get("energy_accumulator", counted.get("power"))
        return total * counted["counter_resolution"] / 1e6  # a resolution is in microjoules

    return joules


def preprocessing_seconds(shape: Any, times: int = 5) -> float | None:
    """Return the median seconds in which the family's processor prepares one photo, or None where it cannot run."""
    import numpy as np
    from PIL import Image

    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, PHOTO, dtype=np.uint8))
    try:
        process = _processor(shape)
        process(photo)
    except (ImportError, AttributeError):  # a version of transformers that has none without torchvision
        return None
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        process(photo)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _processor(shape: Any) -> Callable[[Any], Any]:
    """Return the processor of a shape's family, for pictures of the shape's size."""
    transformers: Any = importlib.import_module("transformers")
    if hasattr(shape, "grid"):
        pixels = shape.tower_patches * 14 * 14
        slow: Any = transformers.Qwen2VLImageProcessorPil(
            size={"shortest_edge": pixels, "longest_edge": pixels}, merge_size=shape.merge
        )
    else:
        side = shape.image
        slow = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
    return lambda photo: slow(photo, return_tensors="pt")
