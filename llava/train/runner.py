"""Runs the steps of a plan, here or on several nodes, and hands stop signals to the ranks."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from llava.train.devices import Devices
from llava.train.stopping import EXIT_STOPPED, LAUNCHER_NODE, LAUNCHER_PID, STOP_CODES, STOP_FILE, this_node

SAVE_PATIENCE = 600.0
"""Seconds that ranks get to save after their launcher has ended; a scheduler's own limit is usually shorter."""
FAIL_PATIENCE = 15.0
"""Seconds that the other nodes get to end by themselves after one has failed."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
# Of a session or a machine, so they stay behind when an environment goes to another node.
STAYS = (
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "PWD",
    "OLDPWD",
    "SHLVL",
    "_",
    "TERM",
    "HOSTNAME",
    "DISPLAY",
    "TMPDIR",
    "MAIL",
)
STAYS_BEGINNINGS = ("SSH_", "XDG_", "DBUS_", "SLURM_", "LC_", "BASH_FUNC_")
# With these srun would give a node's one task a part of the node only.
PER_TASK = (
    "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_GPU",
    "SLURM_NTASKS_PER_SOCKET", "SLURM_NTASKS_PER_CORE", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK",
    "SLURM_CPUS_PER_GPU", "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND", "SLURM_CPU_BIND",
    "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU", "SLURM_MEM_PER_NODE", "SLURM_DISTRIBUTION", "SLURM_EXPORT_ENV",
)  # fmt: skip


def visible_ids(devices: Devices, env: Mapping[str, str]) -> list[str]:
    """The devices of this node's ranks, as CUDA_VISIBLE_DEVICES names them: numbers, UUIDs or MIG instances."""
    named = env.get("CUDA_VISIBLE_DEVICES", "") if devices.accelerator else ""
    ids = [item.strip() for item in named.split(",") if item.strip()]
    return ids[: devices.per_node] if ids else [str(number) for number in range(devices.per_node)]


def node_command(
    devices: Devices, arguments: Sequence[str], port: int, module: str, node: int = 0, address: str = "127.0.0.1"
) -> list[str]:
    """The command that starts a training module on every rank of one node.

    Args:
        devices: ranks, nodes and launcher.
        arguments: training flags.
        port: where the ranks meet.
        module: what trains.
        node: which node this is, from 0.
        address: of node 0.
    """
    if devices.launcher == "python":
        return [sys.executable, "-m", module, *arguments]
    meeting = ["--node_rank", str(node), "--master_addr", address, "--master_port", str(port)]
    if devices.launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(devices.per_node)]
        return [*command, "--nnodes", str(devices.nodes), *meeting, "-m", module, *arguments]
    # What DeepSpeed's own runner starts on each node. It overwrites CUDA_VISIBLE_DEVICES by what this list says.
    world: dict[str, list[Any]] = {f"node{place}": list(range(devices.per_node)) for place in range(devices.nodes)}
    world[f"node{node}"] = visible_ids(devices, os.environ)
    info = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={info}", *meeting]
    return [*command, "--no_local_rank", "--log_level", "warning", "--module", module, *arguments]


def environment(devices: Devices) -> dict[str, str]:
    """Environment of the steps: this checkout on the path, sensible threads, and who started them."""
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), env.get("PYTHONPATH")]))
    env[LAUNCHER_PID] = str(os.getpid())
    env[LAUNCHER_NODE] = this_node()
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed calls collectives by names that newer torch versions warn about, once for every call site and rank.
    env.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:torch.distributed.c10d_logger")
    if not devices.accelerator:
        env.setdefault("DS_ACCELERATOR", "cpu")
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices.per_node)))
    return env


def travelling(env: Mapping[str, str]) -> dict[str, str]:
    """What of an environment goes to another node."""
    return {name: value for name, value in env.items() if name not in STAYS and not name.startswith(STAYS_BEGINNINGS)}


def own_ranks() -> Iterator[Any]:
    """The training ranks that this process started, found by the marks in their environment; not what they started."""
    import psutil

    marked: dict[int, Any] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            env = process.environ()
            ours = env.get(LAUNCHER_PID) == str(os.getpid()) and env.get(LAUNCHER_NODE) == this_node()
            if ours and "LOCAL_RANK" in env:
                marked[process.pid] = process
    for process in marked.values():
        with contextlib.suppress(psutil.Error, OSError):
            if process.ppid() not in marked:
                yield process


def leave_signals_to_the_runner() -> None:
    """In a launcher before it begins: SIGUSR1 would end it. Its ranks take the signal over when they begin."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Step:
    """A process that a step consists of, and how to ask it to stop: a launcher of this node."""

    def __init__(self, command: list[str], env: dict[str, str], **options: Any) -> None:
        # In a session of its own: what a terminal or a scheduler sends to this process's group would end a launcher,
        # and with it, 30 seconds later, ranks that are still saving.
        self.process = subprocess.Popen(command, env=env, start_new_session=True, **options)

    def stop(self) -> None:
        """Let the ranks save and end; SIGTERM goes to them, as a launcher would kill them after 30 seconds."""
        ranks = list(own_ranks())
        for rank in ranks:
            with contextlib.suppress(Exception):
                rank.send_signal(signal.SIGTERM)
        if not ranks:
            self.process.terminate()

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class LauncherStep(Step):
    """Launchers of this node: they outlive SIGUSR1."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        super().__init__(command, env, preexec_fn=leave_signals_to_the_runner)


class SlurmStep(Step):
    """`srun`, which hands SIGUSR1 on to all nodes; SIGTERM would make it kill them (Slurm's src/srun/srun_job.c)."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        own = {name: value for name, value in env.items() if name not in PER_TASK}
        super().__init__(command, own, stdin=subprocess.DEVNULL)

    def stop(self) -> None:
        """Ask all nodes."""
        self.process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Let srun kill the step on all nodes."""
        self.process.terminate()


class SshStep(Step):
    """`ssh` to one node. What it is told goes through its input; that it ends is how the node learns of our end."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        super().__init__(command, dict(os.environ), stdin=subprocess.PIPE, text=True)
        self.say(json.dumps(travelling(env)))

    def say(self, line: str) -> None:
        """Write a line to the node, if it still listens."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        """Ask the node."""
        self.say("stop")

    def kill(self) -> None:
        """Tell the node to end its ranks, and ssh after it."""
        self.say("kill")
        try:
            self.process.wait(timeout=FAIL_PATIENCE)
        except subprocess.TimeoutExpired:
            super().kill()


class Runner:
    """Runs the steps of a plan one after the other.

    On SIGTERM, SIGUSR1 and Ctrl-C the training ranks themselves are asked to stop, so that they have as long as they
    need to save; Ctrl-C a second time ends them at once.
    """

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self.steps: list[Step] = []
        self.stopping = False

    def __enter__(self) -> Runner:
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self.previous = {number: signal.signal(number, self._forward) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        again = self.stopping and number == signal.SIGINT
        if again:
            self.kill()
            raise KeyboardInterrupt
        self.stop()

    def stop(self) -> None:
        """Ask everything that runs to save and end; no further step begins."""
        self.stopping = True
        for step in self.steps:
            if step.process.poll() is None:
                step.stop()

    def kill(self) -> None:
        """End everything that runs at once."""
        for step in self.steps:
            if step.process.poll() is None:
                step.kill()
        for rank in own_ranks():
            rank.kill()

    def run(self, title: str, command: list[str], kind: type[Step] = LauncherStep) -> int:
        """Run one step and wait for it.

        Returns:
            Its exit code; 143 when it was stopped by a signal, and the same command goes on.
        """
        return self.run_together(title, [("", command)], kind)

    def run_together(self, title: str, commands: list[tuple[str, list[str]]], kind: type[Step]) -> int:
        """Run the parts of one step, one on each node, and wait for all of them.

        Args:
            title: of the step.
            commands: the name of a node and its command, each.
            kind: how the processes are started and stopped.

        Returns:
            0 when all of them ended well; 143 when they were stopped; otherwise the code of the first that failed.
        """
        if self.stopping:
            return EXIT_STOPPED
        for place, (node, command) in enumerate(commands):
            head = f"\n=== {title}\n" if place == 0 else ""
            sys.stdout.write(f"{head}{f'{node}: ' if node else ''}{shlex.join(command)}\n")
        sys.stdout.flush()
        begin = time.time()
        with tempfile.TemporaryDirectory(prefix="llava-run-") as folder:
            note = Path(folder) / "stopped"
            env = environment(self.devices) | {STOP_FILE: str(note)}
            self.steps = [kind(command, env) for _, command in commands]
            if self.stopping:
                self.stop()  # a signal arrived while they were started
            code = self._wait([node for node, _ in commands])
            if self.stopping or note.exists():
                wait_for(list(own_ranks()), SAVE_PATIENCE)
            for rank in own_ranks():
                rank.kill()  # a launcher that was killed leaves its ranks behind
            if code in STOP_CODES or (code != 0 and (self.stopping or note.exists())):
                code = EXIT_STOPPED
        self.steps = []
        sys.stdout.write(
            f"=== {title}: {'done' if code == 0 else f'exit code {code}'} in {time.time() - begin:.0f} s\n"
        )
        sys.stdout.flush()
        return code

    def _wait(self, nodes: list[str]) -> int:
        """Wait for all parts; when one ends early, the others must not wait for it for ever."""
        deadline, first = None, 0
        while None in (codes := [step.process.poll() for step in self.steps]):
            failed = [place for place, code in enumerate(codes) if code]
            if failed and deadline is None:
                first = codes[failed[0]] or 0
                deadline = time.monotonic() + (SAVE_PATIENCE if first in STOP_CODES else FAIL_PATIENCE)
                if nodes[failed[0]]:
                    sys.stderr.write(f"{nodes[failed[0]]}: {why(first)}; the other nodes are asked to end\n")
                for step in self.steps:
                    if step.process.poll() is None:
                        step.stop()
            if deadline is not None and time.monotonic() > deadline:
                self.kill()
            time.sleep(0.1)
        return first or next((step.process.returncode for step in self.steps if step.process.returncode), 0)


def why(code: int) -> str:
    """An exit code of a node in words."""
    if code in STOP_CODES:
        return "stopped by a signal"
    return "not reached by ssh, or the connection was lost (exit code 255)" if code == 255 else f"exit code {code}"


def wait_for(processes: list[Any], seconds: float) -> None:
    """Wait until processes have ended, for some time at most."""
    import psutil

    psutil.wait_procs(processes, timeout=seconds)
