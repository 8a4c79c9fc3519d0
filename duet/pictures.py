"""Pictures of any mode as RGB: what drawings and readers of picture files share.

Pillow alone clips 16-bit, 32-bit and floating-point grey to 0-255, which makes most such pictures white or black.
Needs Pillow and NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms

_STRIP = 1 << 20  # pixels that are converted at a time, so that a large picture does not exist in wide numbers as well
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_WHITES = (255, 65_535, (1 << 31) - 1)
"""Ranges that grey values may span: 8, 16 and 31 bits."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a new picture in mode RGB with the same pixels, and without the file's metadata.

    Transparency is left out, not blended, as in LLaVA. Grey of more than 8 bits is scaled by the range that its largest
    value needs: up to 255 it stays, up to 65,535 it is divided by 256, above that by 2^23; negative values are black.
    Floating-point values whose largest is at most 1 are fractions of white; NaN is black. LAB goes through sRGB.

    Args:
        image: a picture of any mode that Pillow knows.

    Raises:
        ValueError: Pillow cannot convert the mode.
        OSError: the pixels have not been read yet, and cannot be.
    """
    mode = image.mode
    if mode.startswith(("I", "F")):
        return _from_deep(image).convert("RGB")
    if mode in ("P", "PA"):
        # Pillow warns about palettes whose colours are transparent unless the transparency is kept at first.
        image = image.convert("RGBA") if mode == "PA" or "transparency" in image.info else image
    elif mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[mode])
    elif mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    picture = image.convert("RGB")
    picture.info.clear()
    return picture


def _strips(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row and the values of one part of the picture after the other."""
    width, height = image.size
    rows = max(1, _STRIP // max(width, 1))
    for top in range(0, height, rows):
        values = np.asarray(image.crop((0, top, width, min(top + rows, height))), dtype=np.float64)
        yield top, np.nan_to_num(values, nan=0.0, posinf=_WHITES[-1], neginf=0.0)


def _from_deep(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits to 8 bits."""
    brightest = max((float(values.max(initial=0.0)) for _, values in _strips(image)), default=0.0)
    if image.mode.startswith("F") and brightest <= 1:
        scale = 255.0
    else:
        white = next((white for white in _WHITES if brightest <= white), brightest)
        scale = 256 / (white + 1) if white > 255 else 1.0
    grey = Image.new("L", image.size)
    for top, values in _strips(image):
        grey.paste(Image.fromarray(np.floor(values * scale).clip(0, 255).astype(np.uint8)), (0, top))
    return grey
