"""One node of several: starts its ranks through DeepSpeed's launcher or torchrun, and hands on what stops them.

`llava.train.launch` starts `python -m llava.train.node` on every node, through srun or ssh.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from duet.errors import main_guard
from llava.train import runtime
from llava.train.devices import Devices, is_this_machine, subset, visible_accelerators
from llava.train.runner import Runner, node_command

SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
"""No questions; a node that has vanished is noticed after a minute."""


def agent_command(devices: Devices, arguments: list[str], port: int, module: str, address: str) -> list[str]:
    """The command that starts this module; on SLURM it is the same on every node, for ssh `--node` goes in front."""
    command = [sys.executable, "-m", "llava.train.node", "--launcher", devices.launcher, "--nodes", str(devices.nodes)]
    command += ["--per_node", str(devices.per_node), "--address", address, "--port", str(port), "--module", module]
    return [*command, *(["--accelerator"] if devices.accelerator else []), "--", *arguments]


def srun_command(devices: Devices, arguments: list[str], port: int, module: str, address: str) -> list[str]:
    """One task on every node of the job, with all of the node's devices, cores and memory; all end when one fails."""
    nodes = str(devices.nodes)
    command = ["srun", "--nodes", nodes, "--ntasks", nodes]
    command += ["--ntasks-per-node", "1", "--kill-on-bad-exit=1", "--export=ALL", "--cpu-bind=none", "--mem=0"]
    return [*command, *agent_command(devices, arguments, port, module, address)]


def ssh_commands(
    devices: Devices, arguments: list[str], port: int, module: str, address: str
) -> list[tuple[str, list[str]]]:
    """For every host its name, and the command that starts this module there in this folder."""
    found = []
    for node, host in enumerate(devices.hosts):
        command = agent_command(devices, arguments, port, module, address)
        command[3:3] = ["--node", str(node)]
        found.append((host, [*SSH, host, f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"]))
    return found


def slurm_nodes() -> list[str]:
    """Names of the nodes of this SLURM job, in order.

    Raises:
        ValueError: this is not a SLURM job, or scontrol does not answer.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST")
    if not nodes:
        raise ValueError("SLURM_JOB_NODELIST does not say which nodes this SLURM job has; give HOSTFILE instead")
    try:
        result = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as err:
        raise ValueError(f"scontrol could not list the nodes of this job ({err}); give HOSTFILE instead") from err
    if not result.stdout.split():
        raise ValueError(f"scontrol lists no nodes for {nodes}; give HOSTFILE instead")
    return result.stdout.split()


def head_address(devices: Devices) -> str:
    """Where the ranks of several nodes meet: MASTER_ADDR, or the first node.

    A host of a hostfile is asked for its first address, as DeepSpeed does: its name may mean something to ssh only.

    Raises:
        ValueError: it cannot be found out.
    """
    if os.environ.get("MASTER_ADDR"):
        return os.environ["MASTER_ADDR"]
    if not devices.hosts:
        return slurm_nodes()[0]
    host = devices.hosts[0]
    try:
        result = subprocess.run([*SSH, host, "hostname -I"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as err:
        said = (getattr(err, "stderr", "") or "").strip() or str(err)
        raise ValueError(f"HOSTFILE's {host} cannot be reached by ssh without a password ({said})") from err
    if not result.stdout.split():
        raise ValueError(f"{host} names no address of its own (`hostname -I`); give MASTER_ADDR")
    return result.stdout.split()[0]


def meeting_port(address: str) -> int:
    """Where the ranks meet: MASTER_PORT, or a free port.

    On another machine a port is chosen by the job and this process, below those that systems give out by themselves, so
    that two runs on one node do not meet.

    Raises:
        ValueError: MASTER_PORT is no port, or another process of this machine has it.
    """
    text = os.environ.get("MASTER_PORT") or ""
    here = is_this_machine(address)
    if not text and here:
        return runtime.free_port()
    if not text:
        return 20_000 + (int(os.environ.get("SLURM_JOB_ID") or 0) * 31 + os.getpid()) % 10_000
    if not text.isdecimal() or not 0 < int(text) < 65_536:
        raise ValueError(f"MASTER_PORT={text}: expected a port number, 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if here:
                probe.bind(("", int(text)))
        except OSError as err:
            raise ValueError(
                f"MASTER_PORT={text} cannot be used on this machine ({err.strerror}): another run may have it. "
                "Leave it out, and a free port is taken"
            ) from err
    return int(text)


def check_node(devices: Devices) -> None:
    """Make sure that this node has what the plan counts on.

    Raises:
        ValueError: it has fewer accelerators than ranks, or some where the plan has none.
    """
    seen, name = visible_accelerators(), socket.gethostname()
    if devices.accelerator and seen < devices.per_node:
        raise ValueError(
            f"{name} shows {seen} devices{subset(os.environ)}, but {devices.per_node} ranks were planned for every "
            "node: ask the scheduler for as many devices per node, or set NUM_DEVICES or the hostfile's slots"
        )
    if seen and not devices.accelerator:
        raise ValueError(
            f"{name} has {seen} accelerators, but the plan was made without: set RECIPE (7b, 13b) where it is made"
        )


def listen(runner: Runner) -> None:
    """Do what the starting process says through our input: stop, kill; its end means stop, too."""
    for line in sys.stdin:
        if line.strip() == "kill":
            runner.kill()
        elif line.strip() == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


@main_guard(statuses={ValueError: 2})
def main(argv: list[str] | None = None) -> int:
    """Run this node's ranks.

    Returns:
        The exit code: 0 done, 143 stopped by a signal, 2 this node cannot do what was planned.
    """
    parser = argparse.ArgumentParser(prog="python -m llava.train.node")
    parser.add_argument("--node", type=int, help="from 0; default: SLURM's number")
    parser.add_argument("--launcher", required=True, choices=("deepspeed", "torchrun"))
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--per_node", type=int, required=True)
    parser.add_argument("--address", required=True, help="of node 0")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--module", required=True)
    parser.add_argument("--accelerator", action="store_true")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    devices = Devices("", args.accelerator, args.per_node, args.nodes, args.launcher)
    with Runner(devices) as runner:
        node = args.node
        if node is None:
            node = int(os.environ["SLURM_NODEID"])
        else:
            os.environ.update(json.loads(sys.stdin.readline()))
            threading.Thread(target=listen, args=(runner,), daemon=True).start()
        check_node(devices)
        flags = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
        try:
            return runner.run(f"node {node}", node_command(devices, flags, args.port, args.module, node, args.address))
        finally:
            runtime.remove_shared_buffers(args.port)


if __name__ == "__main__":
    sys.exit(main())
