"""Pictures of what happened to every patch: overlays of a trace on its image, and heat maps.

Needs Pillow and NumPy only. Kept patches stay as they are, merged ones are tinted with the colour of the contextual
token that averages them, and dropped ones are dark. One panel per stage, from left to right, with a legend below.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from duet.pictures import to_rgb

if TYPE_CHECKING:
    from duet.tracing import ImageRecord

VISION_STAGE = 0  # the panel that shows what stage 1 did; other stages are named by their decoder layer
_PANEL = 336  # edge of a panel in pixels
_GAP = 8
_LINE = 16
_DROPPED = 0.22  # brightness that dropped patches keep
_TINT = 0.55  # share of the token's colour in a merged patch
_BACKGROUND = (250, 250, 250)
_INK = (30, 30, 30)
_GOLDEN = 0.61803398875  # steps of the golden ratio keep neighbouring hues apart for any count


def stages(record: ImageRecord) -> list[int]:
    """Return the stages that a record can show: 0 for the vision stage, then the decoder layers in order."""
    return [VISION_STAGE, *sorted(int(layer) for layer in record.kept_after)]


def patch_fates(record: ImageRecord, stage: int = VISION_STAGE) -> np.ndarray:
    """Return what each patch is at a stage: -2 dropped, -1 kept as it is, c >= 0 part of an averaged token.

    The first numbers are the contextual tokens, then come those that the decoder merged.

    Args:
        record: the trace of one image.
        stage: 0 after the vision stage, or a decoder layer of ``record.kept_after``.

    Returns:
        Integers [N], N = rows x columns of the grid.

    Raises:
        ValueError: the record has no such stage, or names a patch outside the grid.
    """
    if stage not in stages(record):
        raise ValueError(f"the trace has no stage {stage}; it has {stages(record)} (0 is the vision stage)")
    patches = record.grid[0] * record.grid[1]
    named = [*record.source, *(patch for group in record.members for patch in group)]
    if max(named, default=-1) >= patches:
        raise ValueError(f"the trace names patch {max(named)}, but its grid {tuple(record.grid)} has {patches} patches")
    fate = np.full(patches, -2, dtype=np.int64)
    contextual = [token for token, kind in enumerate(record.kind) if kind == "contextual"]
    numbers = {token: number for number, token in enumerate(contextual)}
    here = range(len(record.source)) if stage == VISION_STAGE else record.kept_after[stage]
    for token in sorted(
        here, key=lambda token: token in numbers
    ):  # what is averaged shows, in whatever order they stand
        fate[record.patches_of(token)] = numbers.get(token, -1)
    for number, tokens in enumerate(record.recycled(stage).values(), start=len(contextual)):
        for token in tokens:
            fate[record.patches_of(token)] = number
    return fate


def token_colour(number: int) -> tuple[int, int, int]:
    """Return the RGB colour (0-255) of contextual token ``number``."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + number * _GOLDEN) % 1.0, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def panel(image: Image.Image, record: ImageRecord, stage: int = VISION_STAGE, size: int = _PANEL) -> Image.Image:
    """Draw one stage on the image, without a legend.

    Args:
        image: the picture the tower saw (after padding or cropping), of any size.
        record: its trace.
        stage: 0 or a decoder layer.
        size: edge of the result in pixels.

    Raises:
        ValueError: the record has no such stage.
    """
    rows, columns = record.grid
    fate = patch_fates(record, stage).reshape(rows, columns)
    pixels = np.asarray(to_rgb(image).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    row_of = np.arange(size) * rows // size
    column_of = np.arange(size) * columns // size
    fate = fate[row_of][:, column_of]
    grey = pixels.mean(axis=2, keepdims=True)
    out = np.where((fate == -2)[..., None], grey * _DROPPED, pixels)
    for number in range(int(fate.max()) + 1):
        colour = np.asarray(token_colour(number), dtype=np.float32)
        out = np.where((fate == number)[..., None], (1 - _TINT) * pixels + _TINT * colour, out)
    return Image.fromarray(out.round().clip(0, 255).astype(np.uint8))


def describe(record: ImageRecord, stage: int = VISION_STAGE) -> str:
    """Return one line of counts for a stage, such as ``stage 1: 307 of 576 tokens (300 kept, 7 merged)``."""
    tokens = range(len(record.kind)) if stage == VISION_STAGE else record.kept_after[stage]
    kinds = [record.kind[token] for token in tokens]
    recycled = set(record.recycled(stage)) & set(tokens)
    kinds = [kind for token, kind in zip(tokens, kinds, strict=True) if token not in recycled]
    merged = kinds.count("contextual")
    name = "stage 1" if stage == VISION_STAGE else f"after layer {stage}"
    total = record.grid[0] * record.grid[1]
    parts = [f"{kinds.count('dominant')} kept", f"{merged} merged"]
    parts += [f"{len(recycled)} recycled"] if recycled else []
    if "class" in kinds:
        parts.append("class token")
    return f"{name}: {len(tokens)} of {total} ({', '.join(parts)})"


def overlay(image: Image.Image, record: ImageRecord, stage: int | None = None, size: int = _PANEL) -> Image.Image:
    """Draw the fate of every patch on the image, with a legend.

    Args:
        image: the picture the tower saw.
        record: its trace.
        stage: 0 for the vision stage, a decoder layer, or None for the image and all stages side by side.
        size: edge of one panel in pixels.

    Raises:
        ValueError: the record has no such stage.
    """
    shown = stages(record) if stage is None else [stage]
    panels = [panel(image, record, one, size) for one in shown]
    titles = [describe(record, one) for one in shown]
    if stage is None:
        panels.insert(0, to_rgb(image).resize((size, size), Image.Resampling.BICUBIC))
        titles.insert(0, "input")
    sheet = Image.new("RGB", (len(panels) * (size + _GAP) + _GAP, size + 2 * _GAP + 2 * _LINE + _GAP), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for index, (picture, title) in enumerate(zip(panels, titles, strict=True)):
        left = _GAP + index * (size + _GAP)
        sheet.paste(picture, (left, _GAP))
        pen.text((left, size + _GAP + 3), title, fill=_INK, font=font)
    _legend(pen, image, size + 2 * _GAP + _LINE, font)
    return sheet


def _legend(pen: ImageDraw.ImageDraw, image: Image.Image, top: int, font) -> None:
    average = np.asarray(to_rgb(image).resize((1, 1)), dtype=np.float32)[0, 0]
    kept = _rgb(average)
    tint = _rgb((1 - _TINT) * average + _TINT * np.asarray(token_colour(0)))
    dark = _rgb(np.repeat(average.mean() * _DROPPED, 3))
    left = _GAP
    for colour, text in ((kept, "kept"), (tint, "merged (one colour per token)"), (dark, "dropped")):
        pen.rectangle((left, top + 2, left + 10, top + 12), fill=colour, outline=_INK)
        pen.text((left + 15, top), text, fill=_INK, font=font)
        left += 15 + round(pen.textlength(text, font=font)) + 16


def save_overlays(
    images: Iterable[Image.Image], records: Iterable[ImageRecord], folder: str | Path, prefix: str = "overlay"
) -> list[Path]:
    """Write one PNG per image, ``<prefix>_000.png`` and so on, and return their paths.

    Raises:
        ValueError: there are not as many images as records.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (image, record) in enumerate(zip(images, records, strict=True)):
        paths.append(folder / f"{prefix}_{number:03d}.png")
        overlay(image, record).save(paths[-1], optimize=True)
    return paths


def heat_map(image: Image.Image, scores, grid: tuple[int, int] | None = None, size: int = _PANEL) -> Image.Image:
    """Draw a score per patch over the image, from blue (lowest) over green to red (highest).

    Args:
        image: the picture the tower saw.
        scores: [h, w] or, with ``grid``, [N]; any array or tensor. Constant scores draw as the lowest colour.
        grid: rows and columns, when ``scores`` is flat.
        size: edge of the result in pixels.

    Raises:
        ValueError: the scores are not finite or do not fit the grid.
    """
    values = np.asarray(_plain(scores), dtype=np.float64)
    if grid is not None:
        if values.size != grid[0] * grid[1]:
            raise ValueError(f"{values.size} scores do not fit a grid of {grid[0]} x {grid[1]}")
        values = values.reshape(grid)
    if values.ndim != 2:
        raise ValueError(f"scores must be [h, w], or [N] together with grid; got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("scores contain NaN or infinity")
    span = values.max() - values.min()
    level = (values - values.min()) / span if span > 0 else np.zeros_like(values)
    green = np.minimum(_ramp(level), _ramp(1 - level))
    colours = np.stack([_ramp(level - 0.5), green, _ramp(0.5 - level)], axis=-1)
    blocks = Image.fromarray((255 * colours).round().astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    base = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC)
    return Image.blend(base, blocks, 0.55)


def image_from_pixels(pixels, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Turn the tower's input back into a picture.

    Args:
        pixels: [3, H, W], normalised; array or tensor.
        mean: [3] of the image processor.
        std: [3] of the image processor.

    Raises:
        ValueError: the input is not [3, H, W].
    """
    values = np.asarray(_plain(pixels), dtype=np.float32)
    if values.ndim != 3 or values.shape[0] != 3:
        raise ValueError(f"pixels must be [3, H, W], got shape {values.shape}")
    values = (
        values * np.asarray(std, dtype=np.float32)[:, None, None] + np.asarray(mean, dtype=np.float32)[:, None, None]
    )
    return Image.fromarray((255 * values.transpose(1, 2, 0)).round().clip(0, 255).astype(np.uint8))


def _plain(values):
    """Return a tensor's values as an array, and anything else as it is."""
    return values.detach().float().cpu().numpy() if hasattr(values, "detach") else values


def _ramp(distance: np.ndarray) -> np.ndarray:
    """Piecewise linear: 0 below zero, rising to 1 over a quarter."""
    return np.clip(4 * distance, 0.0, 1.0)


def _rgb(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (round(float(v)) for v in values)
    return red, green, blue
