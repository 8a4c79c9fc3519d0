"""Where a run executes: accelerator or CPU, and how many ranks."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch


def has_accelerator() -> bool:
    """True when torch sees a CUDA or ROCm device (ROCm also answers through `torch.cuda`)."""
    return torch.cuda.is_available() and torch.cuda.device_count() > 0


def may_have_tf32() -> bool:
    """False where torch is built for ROCm, whose devices have no tf32 for torch to switch on."""
    return torch.version.hip is None


def accelerator_name() -> str:
    """Short description of the hardware for plans and logs."""
    if not has_accelerator():
        return f"CPU ({os.cpu_count()} cores)"
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)} ({kind})"


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True when this CPU multiplies bf16 by instructions of its own, which is faster than fp32.

    A fact of the hardware, never a measurement: a run must get the same answer at every start. Other CPUs emulate bf16
    and are many times slower.

    Args:
        cpuinfo: where Linux lists the CPU's features; elsewhere the answer is no.

    Source: Linux's names of x86's AVX512-BF16 and AMX-BF16, and of Arm's FEAT_BF16.
    """
    if not cpuinfo.is_file():
        return False
    lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines())
    features = {word for name, _, words in lines if name.strip() in ("flags", "Features") for word in words.split()}
    return bool(features & {"avx512_bf16", "amx_bf16", "bf16"})


def launched_world_size() -> int:
    """Number of ranks that the launcher (torchrun, deepspeed) announced; 1 under plain python."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank0() -> bool:
    """True on the one process that writes files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def remove_shared_buffers(port: int | str, folder: Path = Path("/dev/shm")) -> list[Path]:
    """Remove the buffers that DeepSpeed's CPU all-reduce leaves in shared memory, 66 MiB a rank, however a run ends.

    Args:
        port: where the ranks met; the buffers' names say it.
        folder: where shared memory is mounted.

    Returns:
        What was removed.
    """
    found = sorted(folder.glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    for path in found:
        path.unlink(missing_ok=True)
    return found


def leave(code: int = 0) -> None:
    """End a process whose run is over; one of several ranks does not pass through the interpreter's own end.

    gloo's threads hold a collective's tensors a moment longer than the caller waits for it, and DeepSpeed keeps the
    groups, and so those threads, alive. A thread that lets go of a tensor while the interpreter is being taken down
    aborts the process (https://github.com/pytorch/pytorch/pull/179291), and the launcher then fails the whole job,
    after everything was saved. So a rank closes what is open and ends at once.

    Args:
        code: the process's exit status.

    Raises:
        SystemExit: one of several ranks, or a status other than 0.
    """
    if launched_world_size() > 1:
        if torch.distributed.is_initialized():
            # A launcher ends the others as soon as one rank leaves with a status; all have written everything by then.
            if code:
                torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        atexit.register(_end, code)
    elif not code:
        return
    sys.exit(code)


def _end(code: int) -> None:
    """End the process after everything else that waits for its exit."""
    atexit.unregister(_end)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def read_deepspeed_config(given: str | dict[str, Any]) -> dict[str, Any]:
    """Return a DeepSpeed configuration, from a file or as it is.

    Raises:
        ValueError: the file is missing or holds no JSON object; the message names it.
    """
    if isinstance(given, dict):
        return given
    try:
        values = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--deepspeed {given} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--deepspeed {given} must hold a JSON object, such as scripts/zero3.json")
    return values


def require_deepspeed() -> None:
    """Check that deepspeed is there and can compile, and describe a world of one rank to it when no launcher did.

    Raises:
        ImportError: deepspeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            "--deepspeed was given, but deepspeed is not installed. Install it: pip install -e '.[train]'"
        )
    from llava.train import compile_locks

    compile_locks.clear()
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))


def prepare_cpu_deepspeed() -> dict[str, bool]:
    """Create the distributed state for DeepSpeed on a machine without an accelerator.

    accelerate finds no DeepSpeed backend there and would silently report a world of one rank: every rank would train on
    the same data and write the same checkpoint. A state that was configured beforehand is respected.

    Returns:
        The `accelerator_config` that makes `TrainingArguments` use the state.

    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend="gloo")
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
    return {"use_configured_state": True}


def check_world_size(seen: int) -> None:
    """Stop when the framework's idea of the world differs from the launcher's.

    Raises:
        RuntimeError: the two differ.
    """
    launched = launched_world_size()
    if seen != launched:
        raise RuntimeError(
            f"the launcher started {launched} ranks but the training framework sees {seen}. Every rank would train on "
            "the same data. Check that WORLD_SIZE, RANK and LOCAL_RANK come from one launcher only."
        )


def resolve_attention(requested: str | None) -> tuple[str, str | None]:
    """Choose the attention kernel.

    Args:
        requested: `sdpa`, `eager`, `flash_attention_2` or None (sdpa).

    Returns:
        The kernel to use, and a notice when it is not the requested one.

    Raises:
        ValueError: an unknown name.
    """
    known = ("sdpa", "eager", "flash_attention_2")
    if requested is None:
        return "sdpa", None
    if requested not in known:
        raise ValueError(f"--attn_implementation {requested}: expected one of {', '.join(known)}")
    if requested == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            return "sdpa", "flash_attention_2 was asked for, but flash-attn is not installed: using sdpa"
        if not has_accelerator():
            return "sdpa", "flash_attention_2 needs a CUDA or ROCm device: using sdpa"
    return requested, None
