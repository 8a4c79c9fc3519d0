"""Pictures of any resolution: the whole picture in one tower pass, then tiles of it (LLaVA-NeXT and its successors).

Padding that a picture got to fill its tiles makes no tokens, with and without DUET. Stage 1 acts on every pass by
itself, on what is no padding. What it keeps forms no rows any more, so ``image_newline`` tokens stay only with pictures
that stage 1 leaves whole; there they are visual tokens like all others. Tokens come in this order: those of the whole
picture, then those of the tiles in the raster order of the joined tiles, dominant ones, class tokens, contextual ones.
That is the order of VisionZip's release, which leaves newlines out as well (METHODS 2.7).

Shapes: I pictures, T tower passes, N patches of a pass, K kept, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from duet import tracing
from duet.config import DuetConfig
from duet.families import ModelFacts
from duet.families.passes import View, feature_choice, plan, reduce_passes, singles
from duet.families.prompt import Encoded, Pictures
from duet.stage1 import (
    CLASS_TOKEN,
    CONTEXTUAL,
    DOMINANT,
    NEWLINE,
    VISION_REDUCERS,
    TowerOutput,
    VisionReduction,
    runs_tower_itself,
)
from duet.vision import encode_vision, run_tower

if TYPE_CHECKING:
    from duet.question import Question


@dataclass(frozen=True)
class Layout:
    """Which patches of the passes of one picture are no padding.

    Attributes:
        side: patches per side of a pass.
        tiles: (rows, columns) of tiles; (0, 0) for a picture in one pass.
        rows, columns: of the joined tiles' patches, what is no padding.
        shown: (rows, columns) of high-resolution tokens that the model makes of them without reduction.
        newlines: whether the model then puts a newline after each row (after a picture in one pass).
    """

    side: int
    tiles: tuple[int, int]
    rows: range
    columns: range
    shown: tuple[int, int]
    newlines: bool = True

    @classmethod
    def of(cls, size: Sequence[int], pinpoints: list, image_size: int, side: int, most_tiles: int | None) -> Layout:
        """Return the layout of a picture.

        Args:
            size: its (height, width) in pixels.
            pinpoints: (height, width) that a picture may be resized to.
            image_size: of a pass, in pixels.
            side: patches per side of a pass.
            most_tiles: the host shrinks more than so many tiles to about that many; None where it never does.
        """
        tiles = get_anyres_image_grid_shape(tuple(size), pinpoints, image_size)
        height, width = tiles[0] * side, tiles[1] * side
        visible = unpad_image(torch.arange(height * width).view(1, height, width), tuple(size))[0]
        shown = tuple(visible.shape)
        if not visible.numel():  # so long and thin that nothing of it is left beside the padding
            return cls(side, tiles, range(0), range(0), shown)
        first, last = int(visible[0, 0]), int(visible[-1, -1])
        if most_tiles is not None:
            ratio = math.sqrt(visible.numel() / (most_tiles * side**2))
            if ratio > 1.1:
                shown = (int(shown[0] // ratio), int(shown[1] // ratio))
        rows, columns = range(first // width, last // width + 1), range(first % width, last % width + 1)
        return cls(side, tiles, rows, columns, shown)

    @classmethod
    def single(cls, side: int, newlines: bool = True) -> Layout:
        """Return the layout of a picture in one pass."""
        return cls(side, (0, 0), range(0), range(0), (0, 0), newlines)

    @property
    def passes(self) -> int:
        """Tower passes of the picture."""
        return 1 + math.prod(self.tiles)

    @property
    def placeholders(self) -> int:
        """Tokens that the model makes of the picture without reduction, newlines included."""
        newlines = self.shown[0] if math.prod(self.tiles) else 1
        return self.side**2 + math.prod(self.shown) + newlines * self.newlines

    def views(self) -> list[View]:
        """Return what of each pass is no padding; an empty view for a tile that shows nothing else."""
        whole = range(self.side)
        parts = [(whole, whole)]
        for row in range(self.tiles[0]):
            for column in range(self.tiles[1]):
                parts.append((_within(self.rows, row, self.side), _within(self.columns, column, self.side)))
        return [_view(self.side, *part) for part in parts]


def _within(visible: range, tile: int, side: int) -> range:
    """Return what of a tile's rows or columns is visible, counted from the tile's own start."""
    start, stop = max(visible.start - tile * side, 0), min(visible.stop - tile * side, side)
    return range(start, max(start, stop))


@lru_cache(maxsize=1024)
def _view(side: int, rows: range, columns: range) -> View:
    with torch.inference_mode(False):  # it outlives an evaluation in the middle of a training
        return View.rectangle((side, side), rows, columns)


@dataclass(frozen=True)
class AnyRes:
    """How pictures of any resolution become tokens in one kind of model.

    Attributes:
        tower: the vision tower.
        select_layer: where its features are taken.
        has_class: whether the tower has a class token.
        drop_class: whether the model leaves it out.
        project: features to the language model's width.
        pack: the model's own way from projected passes [P, N, D] of the pictures with the given numbers to tokens.
    """

    tower: Any
    select_layer: int | Sequence[int]
    has_class: bool
    drop_class: bool
    project: Callable[[Tensor], Tensor]
    pack: Callable[[list[Tensor], list[int]], Sequence[Tensor]]


def encode_pictures(
    how: AnyRes, tiles_TCHW: Tensor, layouts: Sequence[Layout], config: DuetConfig, question: Question | None
) -> Encoded:
    """Return the tokens of every picture.

    Args:
        how: the model's parts.
        tiles_TCHW: the passes of all pictures, the whole picture first, then its tiles row by row.
        layouts: of the pictures.
        config: counts per pass, or per picture.
        question: what is asked about each picture.
    """
    reduced = reduce_pictures(
        how.tower, tiles_TCHW, how.select_layer, layouts, config,
        has_class=how.has_class, drop_class=how.drop_class, project=how.project, question=question,
    )  # fmt: skip
    whole = [number for number, kept in enumerate(reduced.kept) if kept is None]
    tokens = _project_once(how.project, reduced, [layout.passes for layout in layouts])
    if whole:
        packed = how.pack([tokens[number] for number in whole], whole)
        for number, one in zip(whole, packed, strict=True):
            tokens[number] = one
    return Encoded.join(tokens)


def _project_once(project: Callable[[Tensor], Tensor], reduced: Reduced, passes: list[int]) -> list[Tensor]:
    """Project the tokens of all pictures in one call: ZeRO-3 needs equally many on every rank."""
    if all(kept is None for kept in reduced.kept):  # as the model itself calls it
        return list(project(reduced.features).split(passes))
    every = reduced.all_tokens(passes)
    parts = project(torch.cat([tokens.flatten(0, -2) for tokens in every])).split([t[..., 0].numel() for t in every])
    return [part.view(*tokens.shape[:-1], -1) for part, tokens in zip(parts, every, strict=True)]


@dataclass(frozen=True)
class Reduced:
    """Pictures after stage 1, before the projector.

    Attributes:
        kept: [K, D] of each picture; None where stage 1 leaves it whole.
        features: [T, M, D], all tokens of all passes, padding included.
    """

    kept: list[Tensor | None]
    features: Tensor

    def all_tokens(self, passes: list[int]) -> list[Tensor]:
        """Return what is to be projected of each picture: [K, D], or [P, M, D] of one left whole."""
        whole = self.features.split(passes)
        return [tokens if kept is None else kept for kept, tokens in zip(self.kept, whole, strict=True)]


def reduce_pictures(
    tower: Any,
    tiles_TCHW: Tensor,
    select_layer: int | Sequence[int],
    layouts: Sequence[Layout],
    config: DuetConfig,
    *,
    has_class: bool = True,
    drop_class: bool = True,
    project: Callable[[Tensor], Tensor] | None = None,
    question: Question | None = None,
) -> Reduced:
    """Return what stage 1 keeps of every picture.

    Args:
        tower: the vision tower.
        tiles_TCHW: the passes of all pictures, the whole picture first, then its tiles row by row.
        select_layer: where the tower's features are taken.
        layouts: of the pictures.
        config: counts per pass, or per picture.
        has_class: whether the tower has a class token.
        drop_class: whether the model leaves it out.
        project: the projector that follows, for reducers that compare projected tokens.
        question: what is asked about each picture.
    """
    plans = [_plan(config, layout, has_class) for layout in layouts]
    reduced = [number for number, mine in enumerate(plans) if any(mine)]
    if reduced and runs_tower_itself(config.stage1):
        return _reduce_whole_tiles(tower, tiles_TCHW, select_layer, layouts, config, project)
    output = run_tower(tower, tiles_TCHW, select_layer)
    if question is not None:
        passes = torch.tensor([layout.passes for layout in layouts])
        question = question.select(torch.arange(len(layouts)).repeat_interleave(passes))
    output = replace(output, project=project, question=question)
    features = output.features[:, 1:] if drop_class else output.features
    records = dict(zip(reduced, _reduce(output, layouts, reduced, plans), strict=True))
    for number, layout in enumerate(layouts):
        for record in records.get(number) or _whole_records(features, layout):
            tracing.record_vision(record)
    kept = [
        torch.cat([part.tokens[0] for part in records[number]]) if number in records else None
        for number in range(len(layouts))
    ]
    return Reduced(kept, features)


def _plan(config: DuetConfig, layout: Layout, has_class: bool) -> list[DuetConfig | None]:
    """Return what each pass of a picture keeps; nothing is reduced if the model itself makes no more tokens than that.

    Some models shrink pictures of very many tiles.
    """
    units = [len(view.units) for view in layout.views()]
    plans = plan(config, units, has_class)
    if not config.adaptive:
        total = sum(size if entry is None else entry.entering for entry, size in zip(plans, units, strict=True))
        if total >= layout.placeholders:
            return [None] * len(units)
    return plans


def _reduce(
    output: TowerOutput, layouts: Sequence[Layout], pictures: list[int], plans: list[list[DuetConfig | None]]
) -> list[list[VisionReduction]]:
    """Return what stage 1 keeps of some pictures: of the pass as a whole, and of the tiles together."""
    joined = []
    for number, parts in zip(pictures, _reduce_passes(output, layouts, pictures, plans), strict=True):
        tiles = [_join(parts[1:], layouts[number])] if len(parts) > 1 else []
        joined.append([parts[0], *tiles])
    return joined


def _reduce_passes(
    output: TowerOutput, layouts: Sequence[Layout], pictures: list[int], plans: list[list[DuetConfig | None]]
) -> list[list[VisionReduction]]:
    """Return what stage 1 keeps of each pass of some pictures; sources name units of the pass's view."""
    if not pictures:
        return []
    views = [layouts[number].views() for number in pictures]
    budgets = [next(entry for entry in plans[number] if entry is not None) for number in pictures]
    reducer: Any = VISION_REDUCERS.get(budgets[0].stage1)
    if not getattr(reducer, "shares_tiles", False):
        some = output if len(pictures) == len(layouts) else output.select(_passes(layouts, pictures))
        chosen = [plans[number] for number in pictures]
        parts = iter(reduce_passes(some, list(chain(*views)), list(chain(*chosen))))
        return [list(islice(parts, len(mine))) for mine in views]
    found = []
    for number, mine, budget in zip(pictures, views, budgets, strict=True):
        some = replace(output.select(_passes(layouts, [number])), tiles=[layouts[number].tiles])
        parts = singles(reducer(some, budget))
        found.append([_visible(part, view) for part, view in zip(parts, mine, strict=True)])
    return found


def _passes(layouts: Sequence[Layout], pictures: Sequence[int]) -> Tensor:
    """Return the numbers of the passes of some pictures."""
    starts = [0, *accumulate(layout.passes for layout in layouts)]
    return torch.tensor([number for i in pictures for number in range(starts[i], starts[i + 1])])


def _reduce_whole_tiles(
    tower: Any,
    tiles_TCHW: Tensor,
    select_layer: int | Sequence[int],
    layouts: Sequence[Layout],
    config: DuetConfig,
    project: Callable[[Tensor], Tensor] | None,
) -> Reduced:
    """Return the tokens of pictures for a reducer that changes tower passes: pass after pass, padding included."""
    reduction = encode_vision(tower, tiles_TCHW, select_layer=select_layer, config=config, project=project)
    passes = iter(reduction.per_image(reduction.tokens))
    kept: list[Tensor | None] = [torch.cat([next(passes) for _ in range(layout.passes)]) for layout in layouts]
    return Reduced(kept, reduction.tokens)


def _whole_records(features_TMD: Tensor, layout: Layout) -> list[VisionReduction]:
    """Return what stage 1 left of a picture: everything, row by row, with a newline at the end of each."""
    base = torch.arange(layout.side**2)
    grid = (layout.side, layout.side)
    if not math.prod(layout.tiles):
        ends = base.new_full((int(layout.newlines),), -1)
        return [_whole_record(features_TMD, torch.cat((base, ends)), grid)]
    rows = torch.arange(math.prod(layout.shown)).view(layout.shown)
    rows = torch.nn.functional.pad(rows, (0, int(layout.newlines)), value=-1).flatten()
    return [_whole_record(features_TMD, base, grid), _whole_record(features_TMD, rows, layout.shown)]


def _whole_record(features_TMD: Tensor, source_K: Tensor, grid: tuple[int, int]) -> VisionReduction:
    """Return a record of tokens that are as the model makes them; it holds no tokens itself."""
    source = source_K.to(features_TMD.device)
    kind = torch.where(source < 0, NEWLINE, DOMINANT)
    tokens = features_TMD.new_empty(1, len(source), 0)
    return VisionReduction(tokens, source[None], kind, source.new_empty(1, 0, 0), grid)


def _visible(part: VisionReduction, view: View) -> VisionReduction:
    """Leave out tokens that show padding, and number the others' patches as units of the view."""
    units = view.units.flatten().to(part.source.device)
    place = torch.searchsorted(units, part.source[0])
    keep = (units[place.clamp(max=len(units) - 1)] == part.source[0]).nonzero().flatten() if len(units) else place[:0]
    members = part.members_of_tokens()[:, keep]
    return replace(
        part,
        tokens=part.tokens[:, keep],
        source=place[keep][None],
        kind=part.kind[keep],
        members=members,
        grid=view.grid,
    )


def _join(parts: Sequence[VisionReduction], layout: Layout) -> VisionReduction:
    """Return the tokens of all tiles as those of the one picture that the tiles make up without padding."""
    height, width = len(layout.rows), len(layout.columns)
    sources, members = [], []
    widest = max(part.members.shape[2] for part in parts)
    for number, (part, view) in enumerate(zip(parts, layout.views()[1:], strict=True)):
        row, column = divmod(number, layout.tiles[1])
        first = view.units[0, 0] if len(view.units) else torch.tensor(0)
        top = row * layout.side + int(first) // layout.side - layout.rows.start
        left = column * layout.side + int(first) % layout.side - layout.columns.start

        def place(unit: Tensor, across: int = view.grid[1], top: int = top, left: int = left) -> Tensor:
            inside = (top + unit // max(1, across)) * width + left + unit % max(1, across)
            return inside.where(unit >= 0, -1)

        sources.append(place(part.source[0]))
        padding = (0, widest - part.members.shape[2])
        members.append(torch.nn.functional.pad(place(part.members_of_tokens()[0]), padding, value=-1))
    source, kind = torch.cat(sources), torch.cat([part.kind for part in parts])
    rank = torch.empty_like(kind)
    rank[kind == DOMINANT], rank[kind == CLASS_TOKEN], rank[kind == CONTEXTUAL] = 0, 1, 2
    order = torch.argsort(rank * (height * width + 1) + source + 1, stable=True)
    averaged = order[rank[order] == 2]
    return VisionReduction(
        torch.cat([part.tokens for part in parts], dim=1)[:, order],
        source[order][None],
        kind[order],
        torch.cat(members)[averaged][None],
        (height, width),
    )


def anyres_facts(model: Any) -> ModelFacts:
    """Return patches of a pass, depth and class token of a model with ``vision_tower``."""
    vision = model.config.vision_config
    has_class = hasattr(model.model.vision_tower.embeddings, "class_embedding")
    side = vision.image_size // vision.patch_size
    return ModelFacts(side * side, model.config.text_config.num_hidden_layers, has_class, unit="tile")


def anyres_pictures(
    model: Any,
    inputs: Mapping[str, Any],
    single: Sequence[bool] | None = None,
    most_tiles: int | None = None,
    **packing,
) -> list[Pictures]:
    """Return the images of a batch.

    Args:
        model: one with ``vision_tower``, ``multi_modal_projector``, ``image_newline`` and ``pack_image_features``.
        inputs: pixels [I, P, 3, height, width] padded to the most passes, or [T, 3, height, width], and image sizes.
        single: images that were not cut into tiles, whatever their size.
        most_tiles: see ``Layout.of``.
        **packing: further arguments of the model's ``pack_image_features``.

    Raises:
        ValueError: no image sizes, or pixels that are not as many passes as the sizes say.
    """
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    if pixels is None or len(pixels) == 0:
        return []
    if sizes is None:
        raise ValueError("pixel_values needs image_sizes, the (height, width) of every picture in pixels")
    config = model.config
    image_size, side = (
        config.vision_config.image_size,
        config.vision_config.image_size // config.vision_config.patch_size,
    )
    sizes = torch.as_tensor(sizes).tolist()
    layouts = [
        Layout.single(side)
        if single is not None and single[number]
        else Layout.of(size, config.image_grid_pinpoints, image_size, side, most_tiles)
        for number, size in enumerate(sizes)
    ]
    layer, drops_class = feature_choice(model, inputs)
    body = model.model

    def pack(passes: list[Tensor], numbers: list[int]) -> Sequence[Tensor]:
        chosen = torch.tensor([sizes[number] for number in numbers])
        return body.pack_image_features(passes, chosen, image_newline=body.image_newline, **packing)[0]

    how = AnyRes(body.vision_tower, layer, model._duet.facts.class_token, drops_class, body.multi_modal_projector, pack)
    tiles, per_picture = _tiles(pixels, layouts), [layout.passes for layout in layouts]
    return [
        Pictures(
            kind="image",
            token_id=config.image_token_id,
            expected=[layout.placeholders for layout in layouts],
            rows={"pixel_values": None if pixels.dim() == 5 else per_picture, "image_sizes": None},
            encode=lambda question: encode_pictures(how, tiles, layouts, model._duet.config, question),
        )
    ]


def _tiles(pixels: Tensor, layouts: Sequence[Layout]) -> Tensor:
    """Return the tower passes of all pictures, [T, 3, height, width]."""
    passes = [layout.passes for layout in layouts]
    if pixels.dim() == 5:
        if len(pixels) != len(layouts) or pixels.shape[1] < max(passes):
            raise ValueError(
                f"image_sizes describe {len(layouts)} picture(s) of up to {max(passes)} tower passes, but pixel_values "
                f"holds {len(pixels)} of up to {pixels.shape[1]}; pass both as the processor made them"
            )
        return torch.cat([picture[:count] for picture, count in zip(pixels, passes, strict=True)])
    if pixels.dim() != 4 or len(pixels) != sum(passes):
        raise ValueError(
            f"image_sizes describe {sum(passes)} tower passes of [3, height, width], but pixel_values is "
            f"{list(pixels.shape)}; pass both as the processor made them"
        )
    return pixels
