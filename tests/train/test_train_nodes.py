"""Two emulated nodes: the losses of one node, signals that arrive on one of them, and nodes that fail."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train_world
import two_nodes
from test_train_launchers import wait_for

from llava.train import runner
from llava.train.devices import Devices
from llava.train.stopping import (
    EXIT_STOPPED,
    LAUNCHER_NODE,
    LAUNCHER_PID,
    STOP_FILE,
    StopSignal,
    exit_status,
    shield_workers,
    this_node,
)  # fmt: skip

needs_namespaces = pytest.mark.skipif(not two_nodes.available(), reason="this system gives no namespaces to tests")
ONE_NODE = Devices("CPU", False, 1, 1, "torchrun")


@pytest.mark.nodes
@pytest.mark.slow
@needs_namespaces
def test_two_nodes_of_two_ranks_train_as_one_node_of_four(world, tmp_path):
    """Through srun with DeepSpeed and ZeRO-2, through ssh with torchrun and without DeepSpeed: the same losses."""
    found = {}
    for door, launcher, ranks in (("here", "deepspeed", 4), ("slurm", "deepspeed", 2), ("ssh", "torchrun", 2)):
        run = two_nodes.start(world, tmp_path, door, launcher, ranks, max_steps=4, save_strategy="no")
        with two_nodes.ended(run):
            code, output = train_world.finish(run, limit=400)
        assert code == 0, output[-4000:]
        folder = two_nodes.output_of(tmp_path, door, launcher)
        assert (folder / "run_complete.json").is_file()
        found[door] = train_world.losses(folder.parent, folder.name)
    assert sorted(found["here"]) == [1, 2, 3, 4]
    for door in ("slurm", "ssh"):
        gaps = [abs(found[door][step] - loss) for step, loss in found["here"].items()]
        print(f"two nodes through {door} against one: losses differ by at most {max(gaps):.2e}")
        assert max(gaps) < 1e-5


@pytest.mark.nodes
@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize(
    ("door", "launcher", "number", "place"),
    [("slurm", "torchrun", signal.SIGUSR1, "node2"), ("ssh", "deepspeed", signal.SIGTERM, "head")],
)
def test_a_signal_on_one_node_saves_on_all(world, tmp_path, door, launcher, number, place):
    """Every process of one node gets it, launchers and loaders too; all ranks save at one step, and 143 comes out."""
    flags = {"max_steps": 4000, "save_steps": 4000, "dataloader_num_workers": 1}
    run = two_nodes.start(world, tmp_path, door, launcher, 1, **flags)
    folder = two_nodes.output_of(tmp_path, door, launcher)
    log = folder / "train_log.jsonl"
    with two_nodes.ended(run):
        wait_for(lambda: log.is_file() and log.read_text().count('"loss"') >= 2, run, limit=400)
        if place == "head":
            run.send_signal(number)
        else:
            assert two_nodes.signal_node(run, place, number) >= 3  # a starter, a launcher, a rank
        code, output = train_world.finish(run, limit=200)
    assert code == EXIT_STOPPED, output[-4000:]
    assert "the same command resumes" in output
    saved = list(folder.glob("checkpoint-*/checkpoint_complete.json"))
    assert len(saved) == 1 and not (folder / "run_complete.json").exists()
    assert '"kind": "stopped"' in log.read_text()


def test_a_launcher_on_another_node_is_not_taken_for_dead(monkeypatch):
    """Its id means nothing here; on its own node, known by name and by the namespace of ids, it does."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv(LAUNCHER_PID, str(gone.pid))
    for node, dead in ((this_node(), True), ("node2 pid:[1]", False), (f"{this_node()}1", False)):
        monkeypatch.setenv(LAUNCHER_NODE, node)
        stop = StopSignal()
        assert stop.agreed(torch.device("cpu")) is dead
        assert not dead or "end of the process" in stop.reason
    assert runner.environment(ONE_NODE)[LAUNCHER_NODE] == this_node()


def test_a_stopped_rank_leaves_a_note(monkeypatch, tmp_path):
    """torchrun makes 1 of every exit code."""
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stopped"))
    assert exit_status(False) == 0 and not (tmp_path / "stopped").exists()
    assert exit_status(True) == EXIT_STOPPED and (tmp_path / "stopped").exists()
    note = f"import os, pathlib; pathlib.Path(os.environ['{STOP_FILE}']).touch(); raise SystemExit(1)"
    for script, code in ((note, EXIT_STOPPED), ("raise SystemExit(1)", 1), ("", 0)):
        with runner.Runner(ONE_NODE) as running:
            assert running.run("step", [sys.executable, "-c", script]) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_after_a_signal_no_further_step_begins(number):
    """It may arrive when a stage has just saved its result."""
    with runner.Runner(ONE_NODE) as running:
        signal.raise_signal(number)
        assert running.run("next", [sys.executable, "-c", "raise SystemExit(5)"]) == EXIT_STOPPED


def test_usr1_does_not_end_launchers():
    script = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); raise SystemExit(7)"
    with runner.Runner(ONE_NODE) as running:
        assert running.run("launcher", [sys.executable, "-c", script]) == 7


def test_a_node_that_fails_ends_the_others(monkeypatch, capsys):
    monkeypatch.setattr(runner, "FAIL_PATIENCE", 1.0)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    parts = [
        ("n1", [sys.executable, "-c", stubborn]),
        ("n2", [sys.executable, "-c", "import time; time.sleep(1); exit(255)"]),
    ]
    begin = time.monotonic()
    with runner.Runner(ONE_NODE) as running:
        assert running.run_together("train", parts, runner.LauncherStep) == 255
    assert time.monotonic() - begin < 30
    assert "n2: not reached by ssh" in capsys.readouterr().err


class Numbers(torch.utils.data.Dataset):
    """Sends its own process a signal before it answers."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.raise_signal(number)
        return index


def test_stop_signals_do_not_end_the_processes_that_load_data():
    seen = []
    loader = torch.utils.data.DataLoader(Numbers(), num_workers=1, batch_size=1, worker_init_fn=seen.append)
    assert [int(batch) for batch in shield_workers(loader)] == [0, 1]
    plain = torch.utils.data.DataLoader(Numbers(), batch_size=1)
    assert shield_workers(plain) is plain and plain.worker_init_fn is None


CRASH = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_train_nodes import Numbers
from llava.train.stopping import shield_workers

loader = shield_workers(torch.utils.data.DataLoader(Numbers(), num_workers=1, batch_size=1, prefetch_factor=2))
rows = iter(loader)  # kept alive by the traceback
next(rows)
raise RuntimeError("out of memory")
"""


def test_a_rank_that_fails_ends_although_its_loader_ignores_stop_signals():
    """multiprocessing sends SIGTERM at the end of the interpreter, and waits for that without a limit."""
    command = [sys.executable, "-c", CRASH, str(Path(__file__).parent)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1 and "out of memory" in ended.stderr
