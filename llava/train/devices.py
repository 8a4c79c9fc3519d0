"""What a run is spread over: devices of this machine, hosts of a HOSTFILE, nodes of a SLURM job."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llava.train import runtime

LAUNCHERS = ("deepspeed", "torchrun", "python")
HOST_LINE = re.compile(r"(\S+)\s+slots=(\d+)(?=\s|$)")
LOCAL_NAMES = frozenset(("localhost", "127.0.0.1", "::1"))


@dataclass
class Devices:
    """What the run is spread over.

    Attributes:
        name: the hardware in words.
        accelerator: whether ranks run on accelerators.
        per_node: ranks of a node.
        nodes: how many nodes.
        launcher: what starts the ranks of a node: deepspeed, torchrun or python.
        hostfile: file that names the nodes.
        hosts: their names, in the order of their ranks; empty where SLURM knows them, and on this machine.
    """

    name: str
    accelerator: bool
    per_node: int
    nodes: int
    launcher: str
    hostfile: str | None = None
    hosts: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.per_node * self.nodes

    @property
    def elsewhere(self) -> bool:
        """True when other machines take part."""
        return self.nodes > 1 or bool(self.hosts)


def find_devices(env: Mapping[str, str], accelerators: int | None = None) -> Devices:
    """Find out what the run can use.

    Args:
        env: environment variables (`NUM_DEVICES`, `HOSTFILE`, `LAUNCHER`, SLURM's own).
        accelerators: how many devices to assume on this machine; default: what torch sees.

    Raises:
        ValueError: a variable has a value that cannot be used, or two of them contradict each other.
    """
    here = accelerators if accelerators is not None else visible_accelerators()
    asked = whole_number(env, "NUM_DEVICES")
    launcher = env.get("LAUNCHER") or "deepspeed"
    if launcher not in LAUNCHERS:
        raise ValueError(f"LAUNCHER={launcher}: expected {', '.join(LAUNCHERS[:-1])} or {LAUNCHERS[-1]}")
    if launcher == "python":
        return one_process(env, asked, here, accelerators)
    if env.get("HOSTFILE"):
        return devices_of_hostfile(env, asked, here, launcher)
    refuse_copies(env)
    nodes = whole_number(env, "SLURM_JOB_NUM_NODES") or whole_number(env, "SLURM_NNODES") or 1
    if nodes > 1:
        launcher = env.get("LAUNCHER") or "torchrun"
        return devices_of_slurm(env, asked, here, nodes, launcher)
    if here and asked and asked > here:
        raise ValueError(f"NUM_DEVICES={asked}: this machine shows {here} devices{subset(env)}")
    per_node = asked or here or min(2, os.cpu_count() or 1)
    return Devices(words(here, accelerators), here > 0, per_node, 1, launcher)


def visible_accelerators() -> int:
    """How many devices torch sees here; the subset where CUDA_, HIP_ or ROCR_VISIBLE_DEVICES names one."""
    import torch

    return torch.cuda.device_count() if runtime.has_accelerator() else 0


def words(here: int, accelerators: int | None) -> str:
    """This machine's devices in words."""
    return runtime.accelerator_name() if accelerators is None else f"{here} accelerators"


def subset(env: Mapping[str, str]) -> str:
    """Which variables hide devices, for messages."""
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    found = [f"{name}={env[name]}" for name in names if env.get(name)]
    return f" ({', '.join(found)})" if found else ""


def whole_number(env: Mapping[str, str], name: str) -> int | None:
    """A variable's whole number, at least 1; None where it is not set.

    Raises:
        ValueError: it is something else.
    """
    text = (env.get(name) or "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name}={text}: expected a whole number, at least 1")
    return int(text)


def one_process(env: Mapping[str, str], asked: int | None, here: int, accelerators: int | None) -> Devices:
    """The devices of a run without a launcher: one rank.

    Raises:
        ValueError: more ranks are asked for.
    """
    if env.get("HOSTFILE") or (asked or 1) > 1:
        other = f"HOSTFILE={env['HOSTFILE']}" if env.get("HOSTFILE") else f"NUM_DEVICES={asked}"
        raise ValueError(f"LAUNCHER=python starts one rank, {other} asks for more: use deepspeed or torchrun")
    return Devices(words(here, accelerators), here > 0, 1, 1, "python")


def read_hostfile(hostfile: str) -> dict[str, int]:
    """Hosts of a hostfile and the slots of each, in DeepSpeed's format: `node1 slots=8`, blank lines, `#` comments.

    Raises:
        ValueError: the file is missing, lists no host, names one twice, or has a line of another form.
    """
    path, form = Path(hostfile), "write one line per node, such as `node1 slots=8`"
    if not path.is_file():
        raise ValueError(f"HOSTFILE={hostfile}: there is no such file; {form}")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = HOST_LINE.match(text)
        if match is None:
            raise ValueError(f"HOSTFILE={hostfile}, line {number}: {text!r} is not understood; {form}")
        host, slots = match[1], int(match[2])
        if host.startswith("-"):
            raise ValueError(f"HOSTFILE={hostfile}, line {number}: {host!r} is no host's name")
        if host in hosts:
            raise ValueError(f"HOSTFILE={hostfile}, line {number}: {host} is listed twice; one line per node")
        if slots < 1:
            raise ValueError(f"HOSTFILE={hostfile}, line {number}: {host} has no slots; leave a node out by a `#`")
        hosts[host] = slots
    if not hosts:
        raise ValueError(f"HOSTFILE={hostfile}: it lists no host; {form}")
    return hosts


def devices_of_hostfile(env: Mapping[str, str], asked: int | None, here: int, launcher: str) -> Devices:
    """The ranks that a hostfile asks for: one for every slot.

    Raises:
        ValueError: nodes with different numbers of slots, or NUM_DEVICES says another number.
    """
    hostfile = env["HOSTFILE"]
    hosts = read_hostfile(hostfile)
    if len(set(hosts.values())) > 1:
        listed = ", ".join(f"{host} {slots}" for host, slots in hosts.items())
        raise ValueError(
            f"HOSTFILE={hostfile}: the nodes have different numbers of slots ({listed}); every node runs the same "
            f"number of ranks, so give them all slots={min(hosts.values())}, or leave nodes out"
        )
    slots = next(iter(hosts.values()))
    if asked not in (None, slots):
        raise ValueError(
            f"NUM_DEVICES={asked}, but HOSTFILE={hostfile} says slots={slots}: the file decides how many ranks a node "
            f"runs; write slots={asked} there, or unset NUM_DEVICES"
        )
    names = tuple(hosts)
    if len(names) == 1 and is_this_machine(names[0]):
        if here and slots > here:
            raise ValueError(f"HOSTFILE={hostfile}: slots={slots}, but this machine shows {here} devices{subset(env)}")
        names = ()
    accelerator = here > 0 or (bool(names) and plans_for_accelerators(env))
    kind = "accelerators" if accelerator else "CPU ranks"
    name = f"{slots} {kind} on each of {', '.join(hosts)}"
    return Devices(name, accelerator, slots, len(hosts), launcher, hostfile, names)


def devices_of_slurm(env: Mapping[str, str], asked: int | None, here: int, nodes: int, launcher: str) -> Devices:
    """The ranks on the nodes of a SLURM job; a login node without devices takes SLURM's word for theirs.

    Raises:
        ValueError: how many devices a node has cannot be found out, or NUM_DEVICES asks for more.
    """
    have = here or slurm_devices(env)
    accelerator = have > 0 or plans_for_accelerators(env)
    if have and asked and asked > have:
        raise ValueError(f"NUM_DEVICES={asked}: a node of this SLURM job has {have} devices{subset(env)}")
    if accelerator and not (asked or have):
        raise ValueError("how many devices does a node of this SLURM job have? Say it with NUM_DEVICES")
    per_node = asked or have or min(2, os.cpu_count() or 1)
    kind = "accelerators" if accelerator else "CPU ranks"
    return Devices(f"{per_node} {kind} on each of {nodes} SLURM nodes", accelerator, per_node, nodes, launcher)


def slurm_devices(env: Mapping[str, str]) -> int:
    """Devices of a node in SLURM's words (`8`, `a100:8`); 0 where it says nothing.

    Source: sbatch(1) and salloc(1), output environment variables.
    """
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        count = (env.get(name) or "").rsplit(":", 1)[-1]
        if count.isdecimal() and int(count):
            return int(count)
    return 0


def plans_for_accelerators(env: Mapping[str, str]) -> bool:
    """Whether the other nodes are meant to have accelerators where this one has none: a recipe that needs them."""
    return env.get("RECIPE", "") not in ("", "tiny") or slurm_devices(env) > 0


def refuse_copies(env: Mapping[str, str]) -> None:
    """Stop when `srun` started this very script several times: each copy would start all ranks.

    Raises:
        ValueError: it did.
    """
    copies = whole_number(env, "SLURM_STEP_NUM_TASKS") or 1
    if copies > 1:
        raise ValueError(
            f"srun started this script {copies} times, and each would start all ranks: call it once, without srun, "
            "from the batch script; it calls srun itself"
        )


def is_this_machine(host: str) -> bool:
    """True for names of the machine that this process runs on."""
    own = socket.gethostname()
    return host in LOCAL_NAMES or host in (own, own.split(".")[0]) or host.split(".")[0] == own
