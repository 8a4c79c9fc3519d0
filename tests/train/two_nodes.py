"""Two nodes on one machine: process ids and a name of their own each; srun, scontrol and ssh that lead to them.

The programs behave as Slurm's do where it matters: srun hands SIGUSR1 to every process of every node and turns
SIGTERM into SIGKILL, a task that fails ends the others, and a node's task inherits the job's environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import train_world

NAMES = ("node1", "node2")
NODE = ["unshare", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc", "bash", "-c"]
# The first process of a node is not the one that is started on it, so both nodes count the same ids.
ENTER = 'hostname "$0"; "$@"; exit $?'

PROGRAMS = {
    "scontrol": """
        import sys
        assert sys.argv[1:] == ["show", "hostnames", "node[1-2]"], sys.argv
        print("node1\\nnode2")
    """,
    "ssh": """
        import os, sys
        rest = [item for item in sys.argv[1:] if item != "-o" and "=" not in item.split(" ")[0]]
        host, command = rest
        if command == "hostname -I":
            print("127.0.0.1")
            sys.exit(0)
        if host not in NAMES:
            sys.stderr.write(f"ssh: Could not resolve hostname {host}\\n")
            sys.exit(255)
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        os.execvpe(NODE[0], [*NODE, ENTER, host, "sh", "-c", command], kept)
    """,
    "srun": """
        import os, signal, subprocess, sys, time
        import psutil
        assert not any(name in os.environ for name in ("SLURM_NTASKS", "SLURM_GPUS_PER_TASK")), "parts of a node"
        words = sys.argv[1:]
        assert words[:6] == ["--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1"], words
        command = words[words.index("--mem=0") + 1:]
        tasks = []
        for number, name in enumerate(NAMES):
            env = {**os.environ, "SLURM_NODEID": str(number), "SLURM_PROCID": str(number)}
            tasks.append(subprocess.Popen([*NODE, ENTER, name, *command], env=env))

        def everywhere(number, frame=None):
            number = signal.SIGKILL if number == signal.SIGTERM else number
            for task in tasks:
                if task.poll() is None:
                    for process in psutil.Process(task.pid).children(recursive=True)[1:]:
                        process.send_signal(number)

        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, everywhere)
        while any(task.poll() is None for task in tasks):
            if any(task.returncode for task in tasks):
                time.sleep(2)
                for task in tasks:
                    task.kill()
            time.sleep(0.2)
        sys.exit(max(task.returncode % 256 if task.returncode > 0 else 0 for task in tasks))
    """,
}


def available() -> bool:
    """Whether this system lets us make namespaces."""
    try:
        return subprocess.run([*NODE, ENTER, "node1", "true"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def programs(folder: Path) -> Path:
    """Write the programs; returns the folder that goes in front of PATH."""
    folder.mkdir()
    head = f"#!{sys.executable}\nNAMES, NODE, ENTER = {NAMES!r}, {NODE!r}, {ENTER!r}\n"
    for name, text in PROGRAMS.items():
        (folder / name).write_text(head + textwrap.dedent(text))
        (folder / name).chmod(0o755)
    return folder


def start(world, folder: Path, door: str, launcher: str, ranks: int, **flags: object) -> subprocess.Popen:
    """Start stage 1's script; its output goes to the pipe.

    Args:
        world: models and data.
        folder: of the test; the run's output is in `run-DOOR-LAUNCHER-duet-pretrain` below it.
        door: `slurm` or `ssh`; `here` for one node.
        launcher: deepspeed or torchrun.
        ranks: of a node.
        flags: training flags.
    """
    bin = folder / "bin"
    env = {
        "BASE_MODEL": str(world.model), "VISION_TOWER": str(world.tower), "PRETRAIN_DATA": str(world.captions[0]),
        "PRETRAIN_IMAGES": str(world.captions[1]), "OUTPUT_ROOT": str(folder / f"run-{door}-{launcher}"),
        "RECIPE": "tiny", "NUM_DEVICES": str(ranks), "LAUNCHER": launcher, "PRECISION": "fp32",
        "DEEPSPEED_CONFIG": str(train_world.ROOT / "scripts" / "zero2.json") if launcher == "deepspeed" else "none",
        "GLOO_SOCKET_IFNAME": "lo", "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(train_world.ROOT), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    if door == "slurm":
        env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        env |= {"SLURM_NTASKS": "4", "SLURM_GPUS_PER_TASK": "1", "MASTER_ADDR": "127.0.0.1"}
    if door == "ssh":
        (folder / "hosts").write_text(f"# two nodes\nnode1 slots={ranks}\n\nnode2 slots={ranks}\n")
        env["HOSTFILE"] = str(folder / "hosts")
    if door != "here" and not bin.exists():
        programs(bin)
    values = {"dominant": 10, "contextual": 3, "layer_list": "[1,2]", "image_token_ratio_list": "[0.5,0.0]"}
    values |= {"logging_steps": 1, "image_log_steps": 0, "model_max_length": 256, **flags}
    words = [item for name, value in values.items() for item in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "llava.train.plan", "pretrain_duet", "--", *words],
        env=train_world.environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=train_world.ROOT,
    )  # fmt: skip


@contextlib.contextmanager
def ended(run: subprocess.Popen) -> Iterator[None]:
    """Leave no process of a run behind, whatever the test finds."""
    try:
        yield
    finally:
        if run.poll() is None:
            for process in [*psutil.Process(run.pid).children(recursive=True), run]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            run.communicate()


def output_of(folder: Path, door: str, launcher: str) -> Path:
    """The output folder of such a run."""
    return folder / f"run-{door}-{launcher}-duet-pretrain"


def signal_node(run: subprocess.Popen, name: str, number: signal.Signals) -> int:
    """Send a signal to all processes of one node, as a scheduler does; returns to how many."""
    inside = []
    for process in psutil.Process(run.pid).children(recursive=True):
        if process.name() == "unshare" and name in process.cmdline():
            inside = process.children(recursive=True)[1:]
    for process in inside:
        process.send_signal(number)
    return len(inside)
