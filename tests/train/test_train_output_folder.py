"""What an output folder holds is respected at the next start: settings, records, a finished run, another run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import train_world
from safetensors.torch import load_file, save_file

from llava.train.checkpoints import MARKER, RUN_MARKER, CheckpointError, defect_of, last_complete, mark_complete
from llava.train.folder_lock import FolderInUse, exclusive, in_use
from llava.train.resume import flaw, resolve_resume

FLAGS = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}


def begin(folder: Path) -> None:
    """Let a finished run of four steps look as if it had been killed after the save at step 2."""
    (folder / RUN_MARKER).unlink()
    (folder / "model.safetensors").unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoint-4")


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory) -> Path:
    """A folder whose run was killed after step 2 of 4."""
    from llava.train.arguments import parse_arguments
    from llava.train.train import run

    root = tmp_path_factory.mktemp("begun")
    model = {"model_name_or_path": world.model, "vision_tower": world.tower}
    reduction = {"dominant": 10, "contextual": 3, "layer_list": "[1,2]"}
    run(parse_arguments(train_world.command_line(root, world.data, **model, **reduction, **FLAGS)))
    begin(root / "out")
    return root / "out"


@pytest.fixture
def out(begun, tmp_path) -> Path:
    """A copy of it, in this test's folder."""
    shutil.copytree(begun, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def unmarked(out) -> Path:
    """Its checkpoint, elsewhere and without a marker, as people copy them about."""
    place = out.parent / "copied"
    shutil.copytree(out / "checkpoint-2", place)
    (place / MARKER).unlink()
    return place


# ---- settings


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("learning_rate", {"learning_rate": 1e-5}),
        ("dominant", {"dominant": 5}),
        ("max_steps", {"max_steps": 6}),
        ("global_batch", {"per_device_train_batch_size": 1}),
        ("mm_projector_lr", {"mm_projector_lr": 1e-4}),
        ("seed", {"seed": 7}),
        ("lora_enable", {"lora_enable": True}),
    ],
)
def test_other_settings_are_refused_by_name_and_nothing_changes(train, out, name, change):
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(CheckpointError, match=rf"other settings \(.*{name}: .* -> ") as caught:
        train(**FLAGS | change)
    assert "delete" not in str(caught.value)
    assert sorted(path.name for path in out.rglob("*") if path.name != ".lock") == [n for n in before if n != ".lock"]


def test_a_copied_checkpoint_remembers_its_settings(train, unmarked):
    with pytest.raises(
        CheckpointError, match=r"copied holds a run with other settings \(learning_rate: 0.001 -> 1e-05"
    ):
        train("new", resume_from_checkpoint=unmarked, learning_rate=1e-5, **FLAGS)


def test_the_same_global_batch_in_other_pieces_and_harmless_flags_go_on(train, out, tmp_path):
    division = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    train(**FLAGS | division, logging_steps=2, gradient_checkpointing=True)
    assert [record["checkpoint"][-12:] for record in records(out, "resume")] == ["checkpoint-2"]
    assert max(train_world.losses(tmp_path)) == 4


def records(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "train_log.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_other_records_are_refused_and_the_same_ones_elsewhere_are_not(train, world, out, tmp_path, caplog):
    rows, images = train_world.write_data(tmp_path / "other", seed=5, count=18)
    with pytest.raises(CheckpointError, match=r"other settings \(data_path: .*16 records.* -> .*18 records"):
        train(data_path=rows, image_folder=images, **FLAGS)
    shutil.copy(world.data[0], rows)
    train(data_path=rows, **FLAGS)
    assert f"data_path: {world.data[0]} -> {rows}, with the same records" in caplog.text


def test_changed_records_under_the_same_name_are_refused(train, world, out, tmp_path):
    settings = json.loads((out / "run_settings.json").read_text())
    (out / "run_settings.json").write_text(json.dumps(settings | {"data": settings["data"] | {"sha256": "0" * 64}}))
    with pytest.raises(CheckpointError, match="data_path"):
        train(**FLAGS)


def test_false_starts_from_the_beginning_with_new_settings(train, out, tmp_path):
    train(**FLAGS | {"learning_rate": 5e-4, "max_steps": 2}, resume_from_checkpoint=False)
    assert records(out, "resume") == [] and (out / RUN_MARKER).is_file()


# ---- the end of a run


def test_a_finished_run_trains_nothing_and_its_weights_stay(train, out, tmp_path, caplog):
    train(**FLAGS)
    weights, log = (out / "model.safetensors").read_bytes(), (out / "train_log.jsonl").read_bytes()
    assert train(**FLAGS) is False
    assert "finished: nothing is trained" in caplog.text
    assert (out / "model.safetensors").read_bytes() == weights and (out / "train_log.jsonl").read_bytes() == log
    with pytest.raises(CheckpointError, match=r"num_train_epochs: 3\.0 -> 5\.0"):
        train(num_train_epochs=5, **FLAGS)


def test_a_run_killed_before_its_last_files_takes_no_step_past_the_end(train, out, tmp_path):
    """Four of eight steps of an epoch: the limit lies within it, where transformers would go one further."""
    train(**FLAGS)
    weights = load_file(out / "model.safetensors")
    (out / RUN_MARKER).unlink()
    (out / "model.safetensors").unlink()
    saved = (out / "checkpoint-4" / MARKER).stat().st_mtime_ns
    train(**FLAGS)
    again = load_file(out / "model.safetensors")
    assert max(train_world.losses(tmp_path)) == 4 and all(torch.equal(weights[name], again[name]) for name in weights)
    assert (out / "checkpoint-4" / MARKER).stat().st_mtime_ns == saved, "what was saved need not be saved again"
    (out / "model.safetensors").write_bytes(b"")
    train(**FLAGS)
    assert all(torch.equal(weights[name], value) for name, value in load_file(out / "model.safetensors").items())


# ---- what a checkpoint needs


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("how", ["gone", "empty", "cut"])
def test_a_checkpoint_without_a_part_is_refused_by_its_name(train, unmarked, name, how):
    path = unmarked / name
    content = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(b"" if how == "empty" else content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"copied cannot be resumed from.*{name}"):
        train("new", resume_from_checkpoint=unmarked, **FLAGS)


def test_a_missing_shard_is_named_and_weights_in_no_file_too(train, unmarked):
    weights = load_file(unmarked / "model.safetensors")
    names = sorted(weights)
    (unmarked / "model.safetensors").unlink()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for shard, half in zip(shards, halves, strict=True):
        save_file({key: weights[key] for key in half}, unmarked / shard, metadata={"format": "pt"})
    places = {key: shard for shard, half in zip(shards, halves, strict=True) for key in half}
    index = unmarked / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    train("whole", resume_from_checkpoint=unmarked, **FLAGS)
    (unmarked / shards[0]).unlink()
    for _ in range(2):  # with the index and without
        with pytest.raises(CheckpointError, match=shards[0]):
            train("new", resume_from_checkpoint=unmarked, **FLAGS)
        index.unlink(missing_ok=True)
    (unmarked / shards[1]).rename(unmarked / "model.safetensors")
    with pytest.raises(CheckpointError, match="weights that are trained are in no file"):
        train("new", resume_from_checkpoint=unmarked, **FLAGS)


def test_without_random_state_it_goes_on_with_a_line(train, unmarked, caplog):
    (unmarked / "rng_state.pth").unlink()
    train("new", resume_from_checkpoint=unmarked, **FLAGS)
    assert "has no random state" in caplog.text


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "non_lora_trainables.bin", "optimizer.pt"])
def test_a_lora_checkpoint_without_a_part_is_refused(train, tmp_path, name):
    flags = {"max_steps": 2, "save_steps": 1, "lora_enable": True, "lora_r": 4}
    train(**flags)
    (tmp_path / "out" / "checkpoint-1" / name).unlink()
    (tmp_path / "out" / "checkpoint-1" / MARKER).unlink()
    with pytest.raises(CheckpointError, match=name):
        train("new", resume_from_checkpoint=tmp_path / "out" / "checkpoint-1", **flags)


def test_saving_models_only_says_what_it_costs(train, tmp_path, caplog):
    train(save_only_model=True, **FLAGS)
    assert "weights only, so a run that is interrupted cannot go on" in caplog.text
    (tmp_path / "out" / RUN_MARKER).unlink()
    with pytest.raises(CheckpointError, match=r"none that training can go on from.*optimizer\.pt is missing"):
        train(save_only_model=True, **FLAGS)


# ---- damage


@pytest.fixture
def saves(tmp_path) -> Path:
    """Two marked checkpoints of one small file each."""
    for step in (2, 4):
        place = tmp_path / f"checkpoint-{step}"
        place.mkdir()
        (place / "model.safetensors").write_bytes(b"weights")
        mark_complete(place, step=step)
    return tmp_path


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"[]", b"5", b'{"files": ["a"]}', b'{"files": null}', b"\xff\xfe", b'{"files": {}}', b'{"fil',
     b'{"files": {"model.safetensors": 7}, "sha256": {}}', b'{"files": {"model.safetensors": "x"}}', b"[" * 100_000],
)  # fmt: skip
def test_a_damaged_marker_is_passed_over_with_a_line(saves, raw, caplog):
    (saves / "checkpoint-4" / MARKER).write_bytes(raw)
    assert last_complete(saves) == saves / "checkpoint-2"
    assert "checkpoint-4 is not used" in caplog.text


def test_one_changed_byte_is_noticed(saves):
    (saves / "checkpoint-4" / "model.safetensors").write_bytes(b"weightS")
    assert defect_of(saves / "checkpoint-4") == "model.safetensors has other contents than were saved"
    assert defect_of(saves / "checkpoint-4", contents=False) is None
    assert last_complete(saves) == saves / "checkpoint-2"


def test_markers_without_checksums_still_count(saves):
    (saves / "checkpoint-4" / MARKER).write_text('{"files": {"model.safetensors": 7}}')
    assert last_complete(saves) == saves / "checkpoint-4"


def test_where_every_checkpoint_is_damaged_nothing_is_trained_anew(saves):
    """Steps that were paid for are not thrown away without a word; a first save that was never whole is."""
    for step in (2, 4):
        (saves / f"checkpoint-{step}" / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4: model.safetensors is missing .*--resume_from_checkpoint False"
    ):
        resolve_resume(saves, None)
    for step in (2, 4):
        (saves / f"checkpoint-{step}" / MARKER).unlink()
    assert resolve_resume(saves, None, lambda folder: ["model.safetensors is missing"]) is None
    assert resolve_resume(saves, None, lambda folder: []) == saves / "checkpoint-4"


def test_a_flaw_is_found_by_head_and_length(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(4)}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert flaw(tmp_path / name) is None
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-3])
        assert "cut off or damaged" in flaw(tmp_path / name)


# ---- one run at a time


def forked(work) -> int:
    """Run something in a child process; returns its number. The child says by its exit status whether it failed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def test_a_second_run_is_refused_by_name_until_the_first_is_dead(tmp_path):
    read, write = os.pipe()

    def hold():
        with exclusive(tmp_path):
            os.write(write, b"%d\n" % forked(lambda: time.sleep(60)))  # a worker that outlives its killed parent
            time.sleep(60)

    holder = forked(hold)
    worker = int(os.read(read, 100))
    try:
        assert f"process {holder} on " in in_use(tmp_path)
        with (
            pytest.raises(FolderInUse, match=rf"{tmp_path} is in use by another run \(process {holder} on "),
            exclusive(tmp_path, patience=0),
        ):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with exclusive(tmp_path, patience=0):
            assert in_use(tmp_path) is None
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_process_does_not_lock_a_folder_twice_and_gives_it_back(tmp_path):
    def other_is_kept_out():
        assert in_use(tmp_path)

    with exclusive(tmp_path):
        with pytest.raises(FolderInUse, match="this process"), exclusive(tmp_path):
            pass
        assert in_use(tmp_path) is None
        assert os.waitpid(forked(other_is_kept_out), 0)[1] == 0, "asking again gave the lock up"
    with exclusive(tmp_path, patience=0):
        pass


@pytest.mark.parametrize("record", ["", "null", "{", '{"host": "x", "pid": 1, "since": "2026-01-01T00:00:00+00:00"}'])
def test_what_a_dead_run_left_never_blocks(tmp_path, record):
    (tmp_path / ".lock").write_text(record)
    begin = time.monotonic()
    with exclusive(tmp_path):
        pass
    assert time.monotonic() - begin < 5


def test_on_a_disk_without_locks_the_record_keeps_a_living_run_apart(tmp_path, monkeypatch, caplog):
    import errno
    import fcntl
    import socket

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    record = {"host": socket.gethostname(), "pid": os.getppid(), "since": "2099-01-01T00:00:00+00:00"}
    (tmp_path / ".lock").write_text(json.dumps(record))
    with pytest.raises(FolderInUse, match=f"process {os.getppid()}"), exclusive(tmp_path, patience=0):
        pass
    (tmp_path / ".lock").write_text(json.dumps(record | {"pid": 2**30}))
    with exclusive(tmp_path, patience=0):
        assert "cannot be locked" in caplog.text


def test_an_output_folder_that_is_a_file_is_refused_by_its_flag(train, tmp_path):
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match=r"--output_dir .*out cannot be written"):
        train(max_steps=1)


# ---- lines that a kill tore


def test_a_torn_line_is_left_out_and_the_next_one_is_not_lost_with_it(tmp_path, caplog):
    from llava.jsonl import append_line, read_lines

    path = tmp_path / "a.jsonl"
    assert read_lines(path) == []
    for torn in (b'{"a": 2, "b": "x', b'{"a": "\xc3', b"[1]", b"null", b"\x00\x00"):
        path.write_bytes(b'{"a": 1}\n' + torn)
        assert read_lines(path) == [{"a": 1}]
        append_line(path, {"a": "ä\udc80"})
        assert read_lines(path) == [{"a": 1}, {"a": "ä\udc80"}]
    assert "1 unfinished lines are left out, the first is line 2" in caplog.text


def test_a_torn_list_of_bad_records_does_not_end_the_next_run(tmp_path):
    from llava.train.records import BadRecord, BadSampleLog

    log = BadSampleLog(tmp_path / "bad.jsonl")
    bad = BadRecord("f", 1, "r1", "kind", "reason")
    (tmp_path / "bad.jsonl").write_text('{"file": "x", "index": 1, "id": "r1", "ki')
    log.add(bad)
    assert log.read() == [bad]


def test_a_run_that_begins_anew_leaves_no_checkpoint_for_later_starts(train, tmp_path):
    """An old run's later checkpoint would be taken for the new one's by the next start of the same command."""
    train(max_steps=4, save_steps=2)
    old = train_world.losses(tmp_path)
    (tmp_path / "out" / "train_log.jsonl").unlink()
    train(max_steps=2, save_steps=2, learning_rate=5e-3, resume_from_checkpoint=False)
    names = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert "checkpoint-4" not in names and "checkpoint-4.old1" in names, "nothing is lost, nothing is mixed up"
    assert train_world.losses(tmp_path)[1] == pytest.approx(old[1]), "from the beginning"
