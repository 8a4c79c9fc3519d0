"""What the Qwen families share: pictures of any size in one packed sequence, multi-axis rotary positions that stay.

Shapes: B batch, L sequence, P patches of a call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from duet import tracing
from duet.cache import DuetCache
from duet.config import DuetConfig
from duet.decoder import reduces
from duet.families import ModelFacts
from duet.families.prompt import Encoded, Pictures, Prompt
from duet.families.qwen_tower import PackedFeatures, check_reducer, encode_pictures
from duet.families.reduced import HostFamily
from duet.question import Question
from duet.versions import CACHE, MULTIMODAL_OUTPUT

_KINDS = (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw"))


class QwenFamily(HostFamily):
    """A model with a packed tower, a merger and M-RoPE.

    Attributes:
        position_inputs: inputs of ``compute_3d_position_ids`` that belong to pictures.
    """

    output = MULTIMODAL_OUTPUT
    inputs = (
        "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts",
        "mm_token_type_ids",
    )  # fmt: skip
    position_inputs: ClassVar[tuple[str, ...]] = ("image_grid_thw", "video_grid_thw", "mm_token_type_ids")

    @abstractmethod
    def run_tower(self, tower: Any, pixels: Tensor, grid: Tensor) -> PackedFeatures:
        """Run the vision tower and its mergers. Shapes: pixels [P, ..], grid [pictures, 3] in patches."""

    def facts(self, model: Any) -> ModelFacts:
        """Return the depth; pictures have sizes of their own."""
        return ModelFacts(None, model.config.text_config.num_hidden_layers, False)

    def check_config(self, model: Any, config: DuetConfig) -> None:
        """Refuse vision reducers that a packed tower cannot serve."""
        super().check_config(model, config)
        check_reducer(config, model.config.model_type)

    def place(self, model: Any, ids_or_embeds: Tensor, prompt: Prompt, inputs: Mapping[str, Any], cache: Any) -> Prompt:
        """Return the prompt with the host's own positions: three axes, or four where ``generate`` prepared them.

        Raises:
            ValueError: rows hold several packed samples.
        """
        if isinstance(cache, DuetCache) and cache.segments:
            return prompt  # the cache knows where its samples go on
        positions = prompt.position_ids
        if positions is None:
            positions = model.model.compute_3d_position_ids(
                input_ids=ids_or_embeds if ids_or_embeds.dim() == 2 else None,
                inputs_embeds=ids_or_embeds.view(*ids_or_embeds.shape[:2], -1),  # read for its shape
                attention_mask=prompt.attention_mask,
                **{CACHE: cache},
                **{name: inputs.get(name) for name in self.position_inputs},
            )
        batch, length = prompt.inputs_embeds.shape[:2]
        if positions is None:
            seen = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(seen, seen + length, device=prompt.inputs_embeds.device).unsqueeze(0)
        if positions.dim() == 2:
            positions = positions.unsqueeze(0).expand(3, -1, -1)
        positions = positions.expand(-1, batch, -1)
        if prompt.attention_mask is None and reduces(model._duet.config):
            _check_one_sample_per_row(positions)
        return replace(prompt, position_ids=positions, next_position=_next_position(positions, prompt.attention_mask))

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Pictures]:
        """Return the images and the videos; each has one placeholder per merge unit.

        Raises:
            ValueError: pixels without their grid, or of another number of patches.
        """
        unit = model.model.visual.spatial_merge_size**2
        found = []
        for kind, name, grid_name in _KINDS:
            pixels, grid = inputs.get(name), inputs.get(grid_name)
            if pixels is None:
                continue
            if grid is None:
                raise ValueError(f"{name} needs {grid_name}, frames, rows and columns of every picture in patches")
            sizes = _sizes(pixels, grid, name, grid_name, model.model.visual.spatial_merge_size)
            rows = {name: sizes, grid_name: None}
            if kind == "video" and isinstance(inputs.get("second_per_grid_ts"), Tensor):
                rows["second_per_grid_ts"] = None
            found.append(
                Pictures(
                    kind=kind,
                    token_id=getattr(model.config, f"{kind}_token_id"),
                    expected=[size // unit for size in sizes],
                    rows=rows,
                    encode=partial(self._encode, model, pixels, grid),
                )
            )
        return found

    def _encode(self, model: Any, pixels: Tensor, grid: Tensor, question: Question | None) -> Encoded:
        """Return the tokens that stage 1 leaves of the pictures, and what is added to them later."""
        tower = model.model.visual
        run = partial(self.run_tower, tower)
        pixels = pixels.type(tower.dtype)
        reduced = encode_pictures(run, pixels, grid, tower.spatial_merge_size, model._duet.config, question)
        for picture in reduced:
            for frames in picture.frames:
                tracing.record_vision(frames)
        tokens, *additions = (torch.cat(level) for level in zip(*(p.levels for p in reduced), strict=True))
        return Encoded(
            tokens=tokens,
            counts=[len(picture.index) for picture in reduced],
            offsets=torch.cat([picture.index for picture in reduced]),
            additions=additions,
        )


def _sizes(pixels: Tensor, grid: Tensor, name: str, grid_name: str, merge: int) -> list[int]:
    """Return the patches of every picture.

    Raises:
        ValueError: a grid that the merger cannot divide, or another number of patches than there are.
    """
    sizes = []
    for number, (frames, rows, columns) in enumerate(grid.tolist()):
        if min(frames, rows, columns) < 1 or rows % merge or columns % merge:
            raise ValueError(
                f"{grid_name}[{number}] is {[frames, rows, columns]}; every side must be at least 1, and rows and "
                f"columns must be multiples of {merge} (the processor sees to that)"
            )
        sizes.append(frames * rows * columns)
    if sum(sizes) != len(pixels):
        raise ValueError(
            f"{name} holds {len(pixels)} patches, but {grid_name} {grid.tolist()} describes {sum(sizes)}; pass both as "
            "the processor made them"
        )
    return sizes


def _check_one_sample_per_row(positions_ABL: Tensor) -> None:
    """Raise ValueError if the axis that counts tokens starts again within a row."""
    if len(positions_ABL) == 4 and bool((positions_ABL[0].diff(dim=1) != 1).any()):
        raise ValueError(
            "position_ids pack several samples into one row, which DUET cannot tell apart; give every sample a row of "
            "its own, with padding and attention_mask"
        )


def _next_position(positions_ABL: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the position of the text token that follows each sample. Shapes: [A, B, L] -> [B].

    Rows and columns of the last token decide; time does not, because text after a video continues from its sides.
    Source: ``get_rope_index`` of the Qwen models.
    """
    _, batch, length = positions_ABL.shape
    last = torch.full((batch,), length - 1, device=positions_ABL.device)
    if attention_mask is not None and attention_mask.shape == (batch, length):
        order = torch.arange(length, device=attention_mask.device)
        last = (order * attention_mask.bool()).argmax(1).to(last.device)
    picked = positions_ABL[-2:].gather(2, last.view(1, -1, 1).expand(2, -1, -1))
    return picked[..., 0].amax(0) + 1
