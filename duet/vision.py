"""Run a vision tower as far as its features are needed, and reduce them (stage 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from duet import tracing
from duet.config import DuetConfig
from duet.stage1 import VISION_REDUCERS, TowerOutput, VisionReduction, block_signals

if TYPE_CHECKING:
    from duet.question import Question


def encode_vision(
    tower: nn.Module,
    pixel_values: Tensor,
    *,
    select_layer: int | Sequence[int] = -2,
    class_token: bool = False,
    config: DuetConfig | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
    tiles: Sequence[tuple[int, int]] | None = None,
    question: Question | None = None,
) -> VisionReduction:
    """Return the features of a CLIP-like tower, reduced as ``config`` says.

    The tower stops after the block whose output is used, and every block keeps its attention implementation.
    Signals belong to that same block (the one before ``hidden_states[select_layer]``). The result has ``counts`` where
    the method finds the number of tokens image by image; ``per_image`` cuts the padding off.

    Args:
        tower: ``CLIPVisionModel`` or a model with the same parts.
        pixel_values: [B, 3, height, width].
        select_layer: index (or indices, concatenated) into the tower's ``hidden_states``; -2 is LLaVA-1.5's choice.
        class_token: keep the class token when nothing is reduced (LLaVA's ``cls_patch``).
        config: None or ``stage1="none"`` keeps all tokens, bit-identical to ``hidden_states[select_layer]``.
        project: the projector that follows, for reducers that compare projected tokens.
        tiles: (rows, columns) of tiles of each picture, for reducers that share a budget between the tiles of one:
            a picture takes a pass as a whole and then one for each tile, row by row; (0, 0) is a picture without tiles.
        question: what is asked about each picture, for reducers that listen (``duet.question``).

    Raises:
        ValueError: the layer does not exist, the budget exceeds the patches, or ``tiles`` do not add up to B.
    Source: DUET-VLM Sec. 3.1.
    """
    config = None if config is None else DuetConfig.require(config)
    body, depths = _parts(tower, select_layer)
    reduces = config is not None and config.stage1 != "none"
    patches = math.prod(_grid(pixel_values, body))
    config = config.for_patches(patches) if config is not None else None
    if reduces and config.keeps_every_patch(patches):  # type: ignore[union-attr]
        reduces = class_token = False

    reducer: Any = VISION_REDUCERS.get(config.stage1) if reduces else None  # type: ignore[union-attr]
    if hasattr(reducer, "resize"):
        _check_budget(config, patches, False, depths[-1])  # type: ignore[arg-type]
        pixel_values = reducer.resize(pixel_values, config, body.config.patch_size)
        embedded = body.embeddings(pixel_values, interpolate_pos_encoding=True)
    else:
        embedded = body.embeddings(pixel_values)
    question = _question_per_pass(question, tiles, len(pixel_values))
    grid = _grid(pixel_values, body)
    has_class = embedded.shape[1] == math.prod(grid) + 1
    hidden = _pre_norm(body, embedded)
    if reducer is not None:
        _check_budget(config, math.prod(grid), has_class, depths[-1])  # type: ignore[arg-type]
    if reducer is not None and hasattr(reducer, "encode"):
        reduction = reducer.encode(list(body.encoder.layers[: depths[-1]]), hidden, has_class, grid, config)
    else:
        states = _run_blocks(body.encoder.layers, hidden, depths)
        if reducer is None:
            drop, features = has_class and not class_token, _features(states, depths)
            reduction = VisionReduction.identity(features[:, 1:] if drop else features, has_class and not drop, grid)
        else:
            output = tower_output(tower, select_layer, pixel_values, states)
            del states  # what the reducer does not get may be freed
            reduction = reducer(replace(output, project=project, tiles=tiles, question=question), config)
    reduction = replace(reduction, grid=grid)
    tracing.record_vision(reduction)
    return reduction


def run_tower(tower: Any, pixel_values: Tensor, select_layer: int | Sequence[int] = -2) -> TowerOutput:
    """Return all tokens of a CLIP-like tower and what a vision reducer may ask of it; nothing is reduced.

    For families that reduce something else than the patches of one pass: units of patches, or what is not padding.

    Args:
        tower: ``CLIPVisionModel``, ``SiglipVisionModel``, or an object with the same parts.
        pixel_values: [B, 3, height, width].
        select_layer: as for ``encode_vision``.

    Raises:
        ValueError: the layer does not exist.
    """
    body, depths = _parts(tower, select_layer)
    hidden = _pre_norm(body, body.embeddings(pixel_values))
    return tower_output(tower, select_layer, pixel_values, _run_blocks(body.encoder.layers, hidden, depths))


def tower_output(
    tower: Any,
    select_layer: int | Sequence[int],
    pixel_values: Tensor,
    states: Mapping[int, Tensor] | Sequence[Tensor],
) -> TowerOutput:
    """Return what a vision reducer gets of a tower that has run.

    Args:
        tower: as for ``run_tower``.
        select_layer: as for ``encode_vision``.
        pixel_values: [B, 3, height, width].
        states: [B, M, D] each, by the number of blocks that have run: 0, those that ``select_layer`` names, and the
            input of the last block among them.
    """
    body, depths = _parts(tower, select_layer)
    blocks, grid = body.encoder.layers, _grid(pixel_values, body)
    has_class = states[0].shape[1] == math.prod(grid) + 1
    ranked = _ranked(depths)
    return TowerOutput(
        features=_features(states, depths),
        signals=block_signals(blocks[ranked], states[ranked], has_class),
        class_token=has_class,
        grid=grid,
        pixels=pixel_values,
        next_block=blocks[depths[0]] if len(depths) == 1 and depths[0] < len(blocks) else None,
        first=(blocks[0], states[0]),
    )


def _parts(tower: Any, select_layer: int | Sequence[int]) -> tuple[Any, list[int]]:
    """Return what holds the tower's parts, and after how many blocks its features are taken."""
    body = getattr(tower, "vision_model", tower)
    wanted = [select_layer] if isinstance(select_layer, int) else list(select_layer)
    return body, [_depth(index, len(body.encoder.layers)) for index in wanted]


def _pre_norm(body: Any, embedded: Tensor) -> Tensor:
    return body.pre_layrnorm(embedded) if hasattr(body, "pre_layrnorm") else embedded


def _ranked(depths: list[int]) -> int:
    """Return the index of the block whose attention ranks: the one that makes the last of the features."""
    return max(depths[-1] - 1, 0)


def _features(states: Mapping[int, Tensor] | Sequence[Tensor], depths: list[int]) -> Tensor:
    return states[depths[0]] if len(depths) == 1 else torch.cat([states[depth] for depth in depths], dim=-1)


def _run_blocks(blocks: Any, hidden: Tensor, depths: list[int]) -> dict[int, Tensor]:
    """Return the states that ``tower_output`` needs; every other one may be freed while the tower runs."""
    states, wanted = {0: hidden}, (_ranked(depths), *depths)
    for index in range(max(depths)):
        hidden = _tensor(blocks[index](hidden, None))
        if index + 1 in wanted:
            states[index + 1] = hidden
    return states


def _depth(index: int, blocks: int) -> int:
    """Return how many blocks have run when ``hidden_states[index]`` exists."""
    depth = index + blocks + 1 if index < 0 else index
    if not 0 <= depth <= blocks:
        raise ValueError(
            f"vision layer {index} does not exist: the tower has {blocks} blocks, so use -{blocks + 1} to {blocks}"
        )
    return depth


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _grid(pixel_values: Tensor, body: Any) -> tuple[int, int]:
    patch = body.config.patch_size
    return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch


def _question_per_pass(
    question: Question | None, tiles: Sequence[tuple[int, int]] | None, passes: int
) -> Question | None:
    """Repeat each picture's question for its tiles, after checking that the tiles add up to the passes."""
    if tiles is None:
        return question
    sizes = torch.tensor([1 + rows * columns for rows, columns in tiles])
    if int(sizes.sum()) != passes:
        raise ValueError(
            f"tiles {list(tiles)} describe {int(sizes.sum())} tower passes (one per picture and one per tile), but "
            f"pixel_values holds {passes}"
        )
    return None if question is None else question.select(torch.arange(len(tiles)).repeat_interleave(sizes))


def _check_budget(config: DuetConfig, patches: int, has_class: bool, depth: int) -> None:
    available = patches + int(has_class and config.counts_class_token)
    if config.entering > available and not config.adaptive:
        raise ValueError(
            f"dominant + contextual = {config.entering}, but this image gives {available} visual tokens; "
            "lower one of them"
        )
    if depth == 0:
        raise ValueError("stage 1 needs the attention of a tower block; select_layer must not be the embedding output")
