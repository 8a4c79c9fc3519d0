"""Carries out a plan: data, training stages through a launcher, evaluation."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llava.train import node, runtime
from llava.train.checkpoints import RUN_MARKER, checkpoints, defect_of, names_files, write_json_atomically
from llava.train.choices import PLAN_FILE
from llava.train.folder_lock import PATIENCE, in_use
from llava.train.hf_plan import HfPlan
from llava.train.run_folder import HARMLESS
from llava.train.runner import Runner, SlurmStep, SshStep, node_command
from llava.train.runner import environment as environment
from llava.train.stopping import EXIT_STOPPED

if TYPE_CHECKING:
    from llava.train.devices import Devices
    from llava.train.plan import Plan, Stage

logger = logging.getLogger(__name__)

HELDOUT = Path("playground/tiny/data/heldout.json")
DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps", "ranks")
"""How the global batch is divided; it may change between two starts, the batch may not."""


def training_command(
    devices: Devices,
    arguments: list[str],
    port: int,
    module: str = "llava.train.train",
    address: str = "127.0.0.1",
) -> list[str]:
    """The command that starts a training module on every rank: of this machine, or of the nodes of a SLURM job.

    Args:
        devices: ranks, nodes and launcher.
        arguments: training flags.
        port: where the ranks meet.
        module: what trains.
        address: of the first node.
    """
    if devices.elsewhere:
        return node.srun_command(devices, arguments, port, module, address)
    return node_command(devices, arguments, port, module)


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
    # Plans of earlier versions did not name what every one has now; the trainer clipped at 1.0 then.
    old.setdefault("max_grad_norm", "1.0")
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
    deadline = time.monotonic() + PATIENCE
    while (holder := in_use(stage.output)) and time.monotonic() < deadline:
        time.sleep(0.5)  # a run that was just ended may still be saving
    if holder:
        sys.stderr.write(f"error: {stage.output} is in use by another run ({holder}); wait for it or end it\n")
        return 2
    anew = str(stage.flags.get("resume_from_checkpoint")).lower() == "false"
    changed = [] if anew else differences(stage)
    if changed and (is_finished(stage) or checkpoints(stage.output)):
        sys.stderr.write(
            f"error: {stage.output} holds a run of {kind} with other settings ({'; '.join(changed)}). "
            "Give the former ones to go on with it, or choose another folder with OUTPUT_ROOT\n"
        )
        return 2
    if is_finished(stage) and not anew:
        sys.stdout.write(
            f"\n=== {kind}: already finished in {stage.output}; OUTPUT_ROOT chooses another folder to train again\n"
        )
        return 0
    stage.output.mkdir(parents=True, exist_ok=True)
    write_json_atomically(stage.output / PLAN_FILE, comparable(stage))
    try:
        return train_stage(plan, stage, runner)
    except ValueError as err:
        sys.stderr.write(f"error: {err}\n")
        return 2


def train_stage(plan: Plan, stage: Stage, runner: Runner) -> int:
    """Start a stage's ranks on this machine, or on several nodes, and wait for them.

    Returns:
        The exit code.

    Raises:
        ValueError: the nodes cannot be found out or reached, or the port is taken.
    """
    devices, kind, module = plan.devices, stage.recipe.kind, plan.job.module
    address = node.head_address(devices) if devices.elsewhere else "127.0.0.1"
    port, flags = node.meeting_port(address), stage.arguments()
    try:
        if devices.hosts:
            return runner.run_together(kind, node.ssh_commands(devices, flags, port, module, address), SshStep)
        command = training_command(devices, flags, port, module, address)
        return runner.run(kind, command, SlurmStep) if devices.elsewhere else runner.run(kind, command)
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
        The exit code of the first step that failed; 0 when all went well, 143 when a signal stopped it and the
        same command goes on.
    """
    with Runner(plan.devices) as runner:
        code = prepare(plan, runner)
        for stage in plan.stages:
            if code == 0:
                code = run_stage(plan, stage, runner)
        if code == 0:
            code = follow_up(plan, runner)
    if code == EXIT_STOPPED:
        sys.stderr.write("stopped by a signal; the same command resumes\n")
    return code
