"""What a run reports: a JSONL file always, wandb where it works, and pictures of the kept tokens."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import math
import netrc
import os
import platform
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from llava.jsonl import append_line
from llava.train import runtime

logger = logging.getLogger(__name__)

LOG_FILE = "train_log.jsonl"
PACKAGES = (
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "wandb",
)


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide results; absent ones are left out."""
    # torch's own version says what it was built for; its wheel's may not.
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.metadata.version(name)
    return versions


def git_commit() -> str | None:
    """Commit of the source tree, with `-dirty` when it has changes; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=20, check=True
        )
        state = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("-dirty" if state.stdout.strip() else "")


def describe_run(arguments: dict[str, Any]) -> dict[str, Any]:
    """Everything that is needed to run this again: flags, command line, commit, versions, hardware."""
    return {
        "arguments": arguments,
        "command": sys.argv,
        "git_commit": git_commit(),
        "packages": package_versions(),
        "hardware": runtime.accelerator_name(),
        "world_size": runtime.launched_world_size(),
    }


def jsonable(value: Any) -> Any:
    """Turn a value into something that strict JSON can hold; numbers that are not finite become text."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [jsonable(item) for item in value]
    if isinstance(value, torch.Tensor):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def has_wandb_login() -> bool:
    """True when wandb would not have to ask for a key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


def start_wandb(output_dir: Path, description: dict[str, Any], run_name: str | None) -> Any | None:
    """Open a wandb run that cannot stop training.

    Without a login it works offline (`wandb sync` uploads it later); without the package, or when it fails, there is a
    notice.

    Args:
        output_dir: the run's files go below it, and its id, so that a resumed run continues it.
        description: becomes the run's config.
        run_name: shown name.

    Returns:
        The wandb run, or None.
    """
    if importlib.util.find_spec("wandb") is None:
        logger.warning("--report_to wandb: wandb is not installed; the figures are in %s only", LOG_FILE)
        return None
    if os.environ.get("WANDB_MODE") == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return None
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_login() else "offline")
    identity = output_dir / "wandb_run_id"
    run_id = identity.read_text().strip() if identity.is_file() else None
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "duet"),
            name=run_name,
            id=run_id,
            resume="allow" if run_id and mode == "online" else None,
            mode=mode,  # pyright: ignore[reportArgumentType]
            dir=str(output_dir),
            config=jsonable(description),
            settings=wandb.Settings(init_timeout=60, silent=True),
        )
    except (wandb.Error, OSError, ValueError, TimeoutError) as err:
        logger.warning("--report_to wandb: could not start (%s); the figures are in %s only", err, LOG_FILE)
        return None
    if mode == "offline":
        logger.warning("--report_to wandb: no login, so the run is kept offline in %s", output_dir / "wandb")
    identity.write_text(run.id)
    return run


class RunLog:
    """Writes the records of one run; a do-nothing object on every rank but the first.

    Args:
        output_dir: where `train_log.jsonl` and the pictures go.
        description: from `describe_run`; the first record.
        wandb_wanted: also report to wandb.
        run_name: shown in wandb.
        active: False on the other ranks.
    """

    def __init__(
        self,
        output_dir: str | Path,
        description: dict[str, Any],
        wandb_wanted: bool = False,
        run_name: str | None = None,
        active: bool = True,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.active = active
        self.wandb: Any | None = None
        if not active:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.write("run", description)
        if wandb_wanted:
            self.wandb = start_wandb(self.output_dir, description, run_name)

    def write(self, kind: str, content: dict[str, Any]) -> None:
        """Append one record to the JSONL file."""
        if not self.active:
            return
        record = {"kind": kind, "time": round(time.time(), 3), **jsonable(content)}
        try:
            append_line(self.output_dir / LOG_FILE, record)
        except OSError as err:
            # A full disk must not end a run for the sake of a log line; the next checkpoint reports it properly.
            logger.warning("%s could not be written: %s", self.output_dir / LOG_FILE, err)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Record figures of one step, here and in wandb."""
        if not self.active:
            return
        self.write("metrics", {"step": step, **values})
        self._to_wandb({key: value for key, value in values.items() if isinstance(value, (int, float))}, step)

    def pictures(self, step: int, paths: list[Path]) -> None:
        """Record pictures that were drawn at one step."""
        if not self.active or not paths:
            return
        self.write("pictures", {"step": step, "files": [str(path.relative_to(self.output_dir)) for path in paths]})
        if self.wandb is not None:
            import wandb

            self._to_wandb({"kept_tokens": [wandb.Image(str(path)) for path in paths]}, step)

    def _to_wandb(self, values: dict[str, Any], step: int) -> None:
        if self.wandb is None:
            return
        import wandb

        try:
            self.wandb.log(values, step=step)
        except (wandb.Error, OSError, ValueError) as err:
            logger.warning("wandb stopped working (%s); the figures are in %s only", err, LOG_FILE)
            self.wandb = None

    def close(self) -> None:
        """Finish the wandb run."""
        if self.wandb is not None:
            import wandb

            try:
                self.wandb.finish()
            except (wandb.Error, OSError) as err:
                logger.warning("wandb could not finish its run: %s", err)
            self.wandb = None


def _whole_pictures(images: Any, records: list[Any]) -> list[tuple[Any, Any]]:
    """Pair the tower's pass of each whole picture, [3, H, W], with its record; records of tiles are passed over."""
    passes = [len(pixels) if pixels.ndim == 4 else 1 for pixels in images]
    own = passes if sum(passes) == len(records) else [min(count, 2) for count in passes]
    starts = [0, *accumulate(own)]
    pixels = [image[0] if image.ndim == 4 else image for image in images]
    return [(one, records[start]) for one, start in zip(pixels, starts, strict=False) if start < len(records)]


def draw_kept_tokens(
    images: Any, records: list[Any], processor: Any, folder: Path, prefix: str, limit: int
) -> list[Path]:
    """Draw which patches of a few images were kept.

    Args:
        images: what the tower saw: [B, 3, H, W], [B, T, 3, H, W] with tiles, or a list; the empty images of text-only
            samples are left out. Of a picture with tiles the pass of the whole picture is drawn.
        records: `duet.trace` records: one per image, and for tiles one more, or one for each.
        processor: image processor; its mean and deviation undo the normalisation.
        folder: target.
        prefix: of the file names.
        limit: how many images.

    Returns:
        The files.
    """
    from duet.draw import image_from_pixels, save_overlays

    pairs = [(pixels, record) for pixels, record in _whole_pictures(images, records) if pixels.any()]
    pictures = [
        image_from_pixels(pixels.float().cpu(), processor.image_mean, processor.image_std)
        for pixels, _ in pairs[:limit]
    ]
    return save_overlays(pictures, [record for _, record in pairs[:limit]], folder, prefix)
