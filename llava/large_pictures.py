"""Large and thin pictures for the vision tower, in memory that depends on what the tower sees, not on their shape.

LLaVA puts a picture on a square of its longer side, or scales its shorter side to the tower's, and cuts out the middle.
A picture of 30,000 x 1 pixels would become 900 million pixels in the first way and 3,400 million in the second. Here
the same resampling runs part by part, or only where something is cut out. The image processor then finds a picture that
has its size already, and leaves it as it is.
"""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

Size = tuple[int, int]
Colour = tuple[int, ...]

LARGE = 1 << 24
"""Pixels from which on a picture, or what it would become in between, is prepared here."""
_STRIP = 1 << 22  # pixels of the square that exist at a time
_TALL = 8
_REACH = 4  # pixels of the result from which Pillow's widest filter (Lanczos, 3) takes nothing any more


def pad_and_resize(image: Image.Image, colour: Colour, size: Size, resample: int) -> Image.Image:
    """Centre a picture on a square of its longer side and resize it, without the square; to the bit what both give.

    Pillow resamples the rows of a square first and its columns then. So strips of the square have their rows resampled
    one after the other, and are joined before the columns are. Of the strips of a picture that is more than `_TALL`
    times as tall as wide, what is farther from it than the filter reaches is left out, as it has the colour of the
    square; channels may then differ by one level.

    Args:
        image: RGB picture.
        colour: of what it does not cover.
        size: (width, height) of the result.
        resample: Pillow's filter.
    """
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    scale = side / size[0]
    first = max(math.floor(left / scale) - _REACH, 0)
    last = min(math.ceil((left + width) / scale) + _REACH, size[0])
    begin, end = max(math.floor((first - _REACH) * scale), 0), min(math.ceil((last + _REACH) * scale), side)
    if height <= _TALL * width or scale < 1:
        first, last, begin, end = 0, size[0], 0, side
    narrow = Image.new(image.mode, (size[0], side), colour)
    rows = max(1, _STRIP // (end - begin))
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        strip = Image.new(image.mode, (end - begin, stop - start), colour)
        strip.paste(image.crop((0, start, width, stop)), (left - begin, 0))
        box = (first * scale - begin, 0, min(last * scale - begin, end - begin), stop - start)
        narrow.paste(strip.resize((last - first, stop - start), resample, box), (first, top + start))
    return narrow.resize(size, resample)


def resize_and_crop(image: Image.Image, edge: int, crop: Size, resample: int) -> Image.Image:
    """Scale a picture's shorter side to `edge` and cut out the middle, without the rest.

    To the bit what both give where the scaled picture is below `LARGE`, and beyond where rows are resampled first.
    Newer versions of Pillow take the columns of some pictures first; sharp edges then overshoot a little differently.

    Args:
        image: RGB picture.
        edge: pixels of the shorter side.
        crop: (width, height) of what is cut out, at most `edge` each.
        resample: Pillow's filter.
    """
    width, height = image.size
    short = min(width, height)
    scaled = (
        edge if width == short else int(edge * width / height),
        edge if height == short else int(edge * height / width),
    )
    offset = ((scaled[0] - crop[0]) // 2, (scaled[1] - crop[1]) // 2)
    if scaled[0] * scaled[1] <= LARGE:
        whole = image.resize(scaled, resample)
        return whole.crop((*offset, offset[0] + crop[0], offset[1] + crop[1]))
    left, right = _span(offset[0], crop[0], scaled[0], width)
    top, bottom = _span(offset[1], crop[1], scaled[1], height)
    rows = image.resize((crop[0], height), resample, box=(left, 0, right, height))
    return rows.resize(crop, resample, box=(0, top, crop[0], bottom))


def _span(start: int, room: int, scaled: int, full: int) -> tuple[float, float]:
    """The part of a side of `full` pixels that becomes `room` pixels from `start` on when the side becomes `scaled`."""
    return start * full / scaled, min((start + room) * full / scaled, full)


def prepare(image: Image.Image, processor: Any, padding: Colour | None) -> Image.Image:
    """Bring a large or thin picture to the size that the image processor asks for.

    Args:
        image: the picture; an array stays as it is.
        processor: CLIP image processor. One that does not scale to a fixed size gets the picture as it is.
        padding: colour of the square that the picture is put on; None cuts it square.

    Returns:
        The picture itself where LLaVA's way takes little memory.
    """
    size, crop = _asked(processor)
    if size is None or crop is None or not isinstance(image, Image.Image):
        return image
    width, height = image.size
    long, short = max(width, height), min(width, height)
    becomes = long**2 if padding is not None else max(size) * long // short * max(size)
    if max(width * height, becomes) <= LARGE:
        return image
    image = image if image.mode == "RGB" else image.convert("RGB")
    if padding is not None:
        return pad_and_resize(image, padding, size, processor.resample)
    return resize_and_crop(image, max(size), crop, processor.resample)


def _asked(processor: Any) -> tuple[Size | None, Size | None]:
    """What a processor scales a square to, and what it cuts out; None where it does not."""
    size, crop = getattr(processor, "size", None), getattr(processor, "crop_size", None)
    edge = _entry(size, "shortest_edge")
    if not (edge and getattr(processor, "do_resize", True) and getattr(processor, "do_center_crop", True)):
        return None, None
    cut = (_entry(crop, "width"), _entry(crop, "height"))
    fits = cut[0] and cut[1] and max(cut) <= edge and getattr(processor, "resample", None) is not None
    return (edge, edge), (cut if fits else None)


def _entry(sizes: Any, name: str) -> int:
    try:
        return int(sizes[name] or 0)
    except (KeyError, TypeError):
        return 0
