"""Carries out a plan: data, training stages through a launcher, evaluation; and passes signals on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from llava.train import runtime
from llava.train.callbacks import EXIT_STOPPED, LAUNCHER_PID
from llava.train.checkpoints import RUN_MARKER, checkpoints, defect_of, names_files, write_json_atomically
from llava.train.folder_lock import in_use
from llava.train.hf_plan import HfPlan
from llava.train.run_folder import HARMLESS

if TYPE_CHECKING:
    from llava.train.plan import Devices, Plan, Stage

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
HELDOUT = Path("playground/tiny/data/heldout.json")
DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps", "ranks")
"""How the global batch is divided; it may change between two starts, the batch may not."""


def training_command(devices: Devices, arguments: list[str], port: int, module: str = "llava.train.train") -> list[str]:
    """The command that starts a training module on every rank.

    Args:
        devices: ranks, nodes and launcher.
        arguments: training flags.
        port: where the ranks meet.
        module: what trains.
    """
    ranks = str(devices.per_node)
    if devices.launcher == "deepspeed":
        # The launcher refuses a number of devices next to a hostfile that lists them.
        where = ["--hostfile", devices.hostfile] if devices.hostfile else ["--num_accelerators", ranks]
        quiet = ["--log_level", "warning", "--no_local_rank"]
        command = [sys.executable, "-m", "deepspeed.launcher.runner", *where, "--master_port", str(port), *quiet]
        return [*command, "--module", module, *arguments]
    if devices.launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks]
        if devices.nodes == 1:
            return [*command, "--master_port", str(port), "-m", module, *arguments]
        head = slurm_head()
        command += ["--nnodes", str(devices.nodes), "--rdzv_id", os.environ.get("SLURM_JOB_ID", "llava")]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{head}:{port}", "-m", module, *arguments]
        return ["srun", "--nodes", str(devices.nodes), "--ntasks-per-node", "1", *command]
    return [sys.executable, "-m", module, *arguments]


def slurm_head() -> str:
    """Name of the first node of a SLURM job.

    Raises:
        ValueError: this is not a SLURM job, or scontrol does not answer.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ValueError("several nodes through torchrun need a SLURM job; otherwise give HOSTFILE")
    try:
        result = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as err:
        raise ValueError(f"scontrol could not list the nodes of this job ({err}); give HOSTFILE instead") from err
    return result.stdout.split()[0]


def environment(devices: Devices) -> dict[str, str]:
    """Environment of the steps: this checkout on the path, sensible threads, and who started them."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), env.get("PYTHONPATH")]))
    env[LAUNCHER_PID] = str(os.getpid())
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed calls collectives by names that newer torch versions warn about, once for every call site and rank.
    env.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:torch.distributed.c10d_logger")
    if not devices.accelerator:
        env.setdefault("DS_ACCELERATOR", "cpu")
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices.per_node)))
    return env


def own_ranks() -> Iterator[Any]:
    """The training ranks that this process started, found by the mark in their environment."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            env = process.environ()
            if env.get(LAUNCHER_PID) == str(os.getpid()) and "LOCAL_RANK" in env:
                yield process


class Runner:
    """Runs the steps of a plan one after the other.

    On SIGTERM the training ranks themselves get the signal, so that they have as long as they need to save; the
    launchers of DeepSpeed and torch would kill them after 30 seconds.
    """

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self.child: subprocess.Popen | None = None
        self.stopping = False

    def __enter__(self) -> Runner:
        self.previous = signal.signal(signal.SIGTERM, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        ranks = list(own_ranks())
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        if not ranks and self.child is not None:
            self.child.terminate()

    def run(self, title: str, command: list[str]) -> int:
        """Run one step and wait for it.

        Returns:
            Its exit code; 143 when SIGTERM ended it.
        """
        sys.stdout.write(f"\n=== {title}\n{shlex.join(command)}\n")
        sys.stdout.flush()
        begin = time.time()
        self.child = subprocess.Popen(command, env=environment(self.devices))
        code = self.child.wait()
        self.child = None
        for rank in own_ranks():
            rank.kill()  # a launcher that was killed leaves its ranks behind
        if self.stopping and code != 0:
            code = EXIT_STOPPED
        sys.stdout.write(
            f"=== {title}: {'done' if code == 0 else f'exit code {code}'} in {time.time() - begin:.0f} s\n"
        )
        sys.stdout.flush()
        return code


def comparable(stage: Stage) -> dict[str, str]:
    """The flags that decide what a stage computes."""
    skipped = HARMLESS.union(DIVISION)
    flags = {name: str(value) for name, value in stage.flags.items() if name not in skipped}
    return flags | {"global_batch": str(stage.global_batch)}


def differences(stage: Stage) -> list[str]:
    """How the flags differ from those that the output folder was begun with; empty for a new folder."""
    try:
        old = json.loads((stage.output / PLAN_FILE).read_bytes())
    except (OSError, ValueError):
        return []  # training itself compares its settings, too
    new = comparable(stage)
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted(set(old).union(new).difference(HARMLESS, DIVISION))
        if old.get(name) != new.get(name) and not (name == "global_batch" and name not in old)
    ]


def is_finished(stage: Stage) -> bool:
    """True when the stage's output is there; where final files are gone, training writes them again without a step."""
    marker = stage.output / RUN_MARKER
    if not marker.is_file():
        return False
    return not names_files(marker) or defect_of(stage.output, contents=False, marker=RUN_MARKER) is None


def run_stage(plan: Plan, stage: Stage, runner: Runner) -> int:
    """Train one stage, resume it, or find that it is done.

    Returns:
        The exit code.
    """
    kind = stage.recipe.kind
    holder = in_use(stage.output)
    if holder:
        sys.stderr.write(f"error: {stage.output} is in use by another run ({holder}); wait for it or end it\n")
        return 2
    changed = differences(stage)
    if changed and (is_finished(stage) or checkpoints(stage.output)):
        sys.stderr.write(
            f"error: {stage.output} holds a run of {kind} with other settings ({'; '.join(changed)}). "
            "Give the former ones to go on with it, or choose another folder with OUTPUT_ROOT\n"
        )
        return 2
    if is_finished(stage):
        sys.stdout.write(
            f"\n=== {kind}: already finished in {stage.output}; OUTPUT_ROOT chooses another folder to train again\n"
        )
        return 0
    stage.output.mkdir(parents=True, exist_ok=True)
    write_json_atomically(stage.output / PLAN_FILE, comparable(stage))
    port = int(os.environ.get("MASTER_PORT") or runtime.free_port())
    try:
        return runner.run(kind, training_command(plan.devices, stage.arguments(), port, plan.job.module))
    finally:
        runtime.remove_shared_buffers(port)


def build_tiny_data(plan: Plan, runner: Runner) -> int:
    """Write the tiny world's data unless it is there."""
    wanted = [Path(stage.recipe.data) for stage in plan.stages] + [HELDOUT]
    used = {str(stage.flags["data_path"]) for stage in plan.stages}
    if all(path.is_file() for path in wanted) or not used & {stage.recipe.data for stage in plan.stages}:
        return 0
    return runner.run("data", [sys.executable, "-m", "playground.tiny.build", "--out", str(wanted[0].parent)])


def evaluate_tiny(plan: Plan, runner: Runner) -> int:
    """Evaluate the last stage's model on the held-out split, with its reduction and without."""
    stage = plan.stages[-1]
    results = stage.output / "results.json"
    beside = Path(str(stage.flags["data_path"])).parent / HELDOUT.name
    base = [sys.executable, "-m", "playground.tiny.evaluate", "--model-path", str(stage.output), "--out", str(results)]
    base += ["--data", str(beside if beside.is_file() else HELDOUT)]
    if plan.job.lora:
        base += ["--model-base", str(stage.flags["model_name_or_path"])]
    base += ["--train-log", str(stage.output / RUN_MARKER), "--seed", str(stage.flags["seed"])]
    runs = [("full tokens", ["--no-reduction"])] if plan.reduction is not None else []
    runs.append((plan.job.name, ["--overlays", "4"]))
    for name, extra in runs:
        code = runner.run(f"evaluate: {name}", [*base, "--name", name, *extra])
        if code != 0:
            return code
    sys.stdout.write(f"table: {results.with_suffix('.md')}\npictures: {stage.output}/overlays-{plan.job.name}\n")
    return 0


def run_all(steps: list[tuple[str, list[str]]], runner: Runner) -> int:
    """Run commands one after the other; returns the exit code of the first that fails."""
    for title, command in steps:
        code = runner.run(title, command)
        if code != 0:
            return code
    return 0


def prepare(plan: Plan, runner: Runner) -> int:
    """Make what the plan needs and generates itself."""
    if isinstance(plan, HfPlan):
        return run_all(plan.before(), runner)
    return build_tiny_data(plan, runner) if plan.uses_tiny_world else 0


def follow_up(plan: Plan, runner: Runner) -> int:
    """Evaluate what was trained in the tiny world."""
    if isinstance(plan, HfPlan):
        return run_all(plan.after(), runner)
    return evaluate_tiny(plan, runner) if plan.uses_tiny_world and plan.job.last == "finetune" else 0


def execute(plan: Plan) -> int:
    """Carry out a plan that lacks nothing.

    Returns:
        The exit code of the first step that failed; 0 when all went well, 143 when SIGTERM stopped it after saving.
    """
    with Runner(plan.devices) as runner:
        code = prepare(plan, runner)
        for stage in plan.stages:
            if code == 0:
                code = run_stage(plan, stage, runner)
        if code == 0:
            code = follow_up(plan, runner)
    if code == EXIT_STOPPED:
        sys.stderr.write("stopped by SIGTERM; the same command resumes\n")
    return code
