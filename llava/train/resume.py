"""Which checkpoint a run goes on from, and whether everything is there that going on needs."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llava.model.checkpoints import weight_files
from llava.train.checkpoints import MARKER, CheckpointError, checkpoints, defect_of, read_marker

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
ANEW = "--resume_from_checkpoint False starts from the beginning"


def flaw(path: Path) -> str | None:
    """What is wrong with one file of a checkpoint, by its head and its length; None when nothing is."""
    if not path.is_file():
        return f"{path.name} is missing"
    if not path.stat().st_size:
        return f"{path.name} is empty"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return None
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off or damaged"
    except (OSError, ValueError, SafetensorError) as err:
        return f"{path.name} is cut off or damaged ({err})"
    return None


def flaws(paths: Iterable[Path]) -> list[str]:
    """What is wrong with files of a checkpoint."""
    return [wrong for wrong in map(flaw, paths) if wrong]


def shards(folder: Path) -> list[Path]:
    """The files that must be there for a model's weights to be whole."""
    found = [Path(name) for name in weight_files(str(folder))]
    if any("-of-" not in path.name for path in found):
        return found
    for name in INDEXES:
        if (folder / name).is_file() and flaw(folder / name) is None:
            places = json.loads((folder / name).read_bytes()).get("weight_map", {})
            return [folder / shard for shard in sorted(set(places.values()))]
    counted = {match.groups() for path in found if (match := re.search(r"^(.*-)\d{5}(-of-(\d{5})\..*)$", path.name))}
    named = [folder / f"{head}{i:05d}{tail}" for head, tail, n in counted for i in range(1, int(n) + 1)]
    return named or [folder / "model.safetensors"]


def deepspeed_files(folder: Path) -> list[Path]:
    """The files of DeepSpeed's state that must be there; the first one that names others is missing alone."""
    latest = folder / "latest"
    if not latest.is_file():
        return [latest]
    state = folder / latest.read_text(encoding="utf-8", errors="replace").strip()
    optimizer = rank_files(state)
    world = max([*optimizer, -1]) + 1
    if (folder / MARKER).is_file() and optimizer:
        world = read_marker(folder / MARKER).get("world_size", world)
    expected = [optimizer.get(rank, state / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in range(world)]
    models = sorted(state.glob("*model_states.pt"))
    if any(path.name.startswith("zero_pp_rank_") for path in models):  # ZeRO-3: one for each rank
        return expected + [state / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world)]
    return expected + (models or [state / "mp_rank_00_model_states.pt"])


def rank_files(state: Path) -> dict[int, Path]:
    """DeepSpeed's optimizer states below a folder, by rank; none where the optimizer is not divided."""
    named = (
        (path, re.search(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$", path.name)) for path in state.glob("*")
    )
    return {int(match[1]): path for path, match in named if match}


def lacking(folder: Path, weights: Iterable[str] | None, deepspeed: bool) -> list[str]:
    """What a checkpoint lacks for going on; empty when all is there.

    Args:
        folder: the checkpoint.
        weights: names of the files that hold what learns; None for a whole model, in one file or in shards.
        deepspeed: whether the run that wants to go on uses DeepSpeed.

    Raises:
        CheckpointError: one of the two runs used DeepSpeed and the other does not.
    """
    divided, plain = bool(list(folder.glob("global_step*"))), (folder / "optimizer.pt").is_file()
    if divided and not plain and not deepspeed:
        raise CheckpointError(f"{folder} was saved by a run with --deepspeed; resume it with --deepspeed")
    if plain and not divided and deepspeed:
        raise CheckpointError(
            f"{folder} has no DeepSpeed state: it was saved without --deepspeed, so resume it without, or start from "
            "its weights with --model_name_or_path"
        )
    found = flaws([folder / STATE])
    if not found and not isinstance(_steps(folder), int):
        found = [f"{STATE} does not say which step was reached"]
    if deepspeed:
        found += flaws(deepspeed_files(folder))
    else:
        files = shards(folder) if weights is None else [folder / name for name in weights]
        found += [f"{wrong} (weights)" for wrong in flaws(files)] + flaws([folder / "optimizer.pt"])
    return found + flaws([folder / "scheduler.pt", *folder.glob("rng_state*.pth")])


def _steps(folder: Path) -> object:
    state = json.loads((folder / STATE).read_bytes())
    return state.get("global_step") if isinstance(state, dict) else None


def resolve_resume(
    output_dir: str | Path, requested: str | bool | None, needs: Callable[[Path], list[str]] = lambda folder: []
) -> Path | None:
    """Choose the checkpoint to go on from.

    Args:
        output_dir: of the run; its newest whole checkpoint is used when nothing else is requested.
        requested: `--resume_from_checkpoint`: a folder, True, or None; False starts from the beginning.
        needs: says what a checkpoint lacks for this run.

    Returns:
        The folder, or None to start from the beginning.

    Raises:
        CheckpointError: the requested folder is missing, broken or lacks something; or the output folder has
            checkpoints and none of them can be gone on from.
    """
    text = str(requested).lower()
    if text == "false":
        return None
    if requested is None or text == "true":
        return _newest(Path(output_dir), needs)
    folder = Path(str(requested))
    if not folder.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint {folder}: there is no such folder")
    defect = defect_of(folder) if (folder / MARKER).is_file() else None
    if defect is None and not (folder / STATE).is_file():
        defect = f"it has no {STATE}, so it is not a checkpoint"
    wrong = [defect] if defect else needs(folder)
    if wrong:
        raise CheckpointError(f"--resume_from_checkpoint {folder} cannot be resumed from: {'; '.join(wrong)}")
    return folder


def _newest(output_dir: Path, needs: Callable[[Path], list[str]]) -> Path | None:
    refused: list[str] = []
    unmarked: list[Path] = []
    for folder in reversed(checkpoints(output_dir)):
        defect = defect_of(folder)
        wrong = [defect] if defect else needs(folder)
        if not wrong:
            return folder
        logger.warning("%s is not used: %s", folder, "; ".join(wrong))
        if (folder / MARKER).is_file():
            refused.append(f"{folder.name}: {'; '.join(wrong)}")
        else:
            unmarked.append(folder)
    for folder in unmarked:
        # The run may have ended between the last file and the marker.
        if not needs(folder):
            logger.warning("%s has every file that is needed, so it is used although it has no %s", folder, MARKER)
            return folder
    if refused:
        raise CheckpointError(
            f"{output_dir} has checkpoints, but none that training can go on from ({' | '.join(refused)}). Nothing was "
            f"changed. Restore what is missing; or give this run its own --output_dir; {ANEW}"
        )
    return None
