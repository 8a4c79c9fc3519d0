"""What a frozen vision tower made of a picture, kept on disk: `--feature_cache DIR`.

Exact: an entry is found by the picture's pixels, and only where the tower's weights and everything else that made it
are the same. One file holds one picture: for LLaVA-1.5 in bf16 K x 1024 x 2 bytes, 0.6 MB at 307 tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from duet import DuetConfig
from duet.stage1 import VISION_REDUCERS
from llava.model.checkpoints import gathered

logger = logging.getLogger(__name__)

# Fields of a reduction that act after the tower.
_LATER = ("schedule", "queries", "positions", "stage2", "salient_tokens", "depth")
_KEY = "tokens"


class FeatureCache:
    """Tokens [K, D] of pictures, one file each.

    Args:
        folder: where they lie; several runs and ranks may share it.
        tower: what makes them; its weights enter the name of a folder of their own.
        further: everything else that decides what the tower makes.

    Attributes:
        found, made: how many pictures were read, and encoded, so far.
    """

    def __init__(self, folder: str | Path, tower: nn.Module, further: dict[str, Any]) -> None:
        self.folder = Path(folder)
        about = {"weights": weights_digest(tower), "torch": torch.__version__, **further}
        self._about = json.dumps(about, sort_keys=True, default=str)
        self._full = False
        self.found = self.made = 0

    def encode(
        self, pixels: Tensor, reduction: DuetConfig | None, make: Callable[[Tensor], Any], together: bool = False
    ) -> Tensor:
        """Return what `make` makes of pictures, from the folder where it is there.

        Args:
            pixels: [B, 3, H, W].
            reduction: the reduction in force.
            make: [B', 3, H, W] to [B', K, D], picture by picture.
            together: all ranks call `make` if one of them has to (ZeRO-3 gathers weights inside).

        Shapes: returns [B, K, D].
        """
        home = self.folder / self._name(reduction)
        paths = [home / key[:2] / f"{key}.safetensors" for key in map(content_key, pixels)]
        tokens = [self._read(path, pixels.device) for path in paths]
        made, missing = pixels, [row for row, one in enumerate(tokens) if one is None]
        self.found += len(tokens) - len(missing)
        self.made += len(missing)
        if _any_rank(bool(missing), pixels.device) if together else missing:
            made = make(pixels if len(missing) == len(pixels) else pixels[missing or [0]])
        for place, row in enumerate(missing):
            tokens[row] = made[place]
            self._write(paths[row], made[place])
        return torch.stack(tokens)  # type: ignore[arg-type]

    def _name(self, reduction: DuetConfig | None) -> str:
        stage1 = None
        if reduction is not None and reduction.stage1 != "none":
            stage1 = {name: value for name, value in reduction.to_dict().items() if name not in _LATER}
        return hashlib.sha256(f"{self._about} {json.dumps(stage1, sort_keys=True)}".encode()).hexdigest()[:16]

    def _read(self, path: Path, device: torch.device) -> Tensor | None:
        """Return an entry, or None; one that an interrupted machine left damaged is made again."""
        try:
            return load_file(path, device=str(device))[_KEY]
        except (OSError, KeyError, SafetensorError):
            return None

    def _write(self, path: Path, tokens: Tensor) -> None:
        """Store an entry in one rename; a full disk ends storing, not the run."""
        if self._full:
            return
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({_KEY: tokens.detach().contiguous().cpu()}, part)
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            self._full = True
            with contextlib.suppress(OSError):
                part.unlink()
            logger.warning("the feature cache %s cannot be written (%s); the run goes on without it", path, error)


def _any_rank(mine: bool, device: torch.device) -> bool:
    """Whether any rank says yes."""
    flag = torch.tensor(int(mine), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


def content_key(picture: Tensor) -> str:
    """Name of a picture: a digest of its shape, number type and bits."""
    flat = picture.detach().contiguous().cpu()
    digest = hashlib.blake2b(f"{tuple(flat.shape)} {flat.dtype}".encode(), digest_size=20)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_digest(tower: nn.Module) -> str:
    """Digest of all weights and their names, under ZeRO-3 too."""
    digest = hashlib.blake2b(digest_size=20)
    with gathered(tower.parameters()):
        for name, weight in sorted([*tower.named_parameters(), *tower.named_buffers()], key=itemgetter(0)):
            digest.update(f"{name} {content_key(weight)}".encode())
    return digest.hexdigest()


def why_not(tower: nn.Module, reduction: DuetConfig | None) -> str | None:
    """Why the tokens of a picture cannot be kept: they depend on more than the picture and what is frozen.

    Returns:
        None where they can.
    """
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return "the vision tower is trained"
    if reduction is None or reduction.stage1 == "none":
        return None
    if reduction.positions == "patch":
        return "positions='patch' asks which patches were kept, and the cache holds what became of them"
    reducer: Any = VISION_REDUCERS.get(reduction.stage1)
    for attribute, reason in (
        ("reads_question", "looks at the question"),
        ("reads_projection", "looks at projected tokens, and the projector learns"),
        ("adaptive", "finds the number of tokens picture by picture"),
    ):
        if getattr(reducer, attribute, False):
            return f"the vision reducer {reduction.stage1} {reason}"
    return None
