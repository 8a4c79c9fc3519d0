"""Find and read a record's picture; everything that can go wrong becomes a ``BadSampleError`` that names the file."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
from PIL import Image

from llava.train.records import BadSampleError

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")
# What PIL's decoders raise on broken files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def find_image(image_folder: str | os.PathLike | None, name: str) -> str:
    """Return the path of a record's picture.

    A name whose extension differs from the file's (OCR-VQA's annotations say ``.jpg`` throughout) finds the file all
    the same. Symbolic links inside the folder are followed; a name that climbs out of the folder is refused.

    Args:
        image_folder: Folder that names start from; None or "" takes names as they are.
        name: The picture's name in the record.

    Raises:
        BadSampleError: If the path leaves the folder or there is no such file.
    """
    path = name
    if image_folder:
        folder = os.path.abspath(image_folder)
        path = os.path.normpath(os.path.join(folder, name))
        if not path.startswith(os.path.join(folder, "")):
            raise BadSampleError(
                f"image {name!r} lies outside the image folder {str(image_folder)!r}; fix the name or move the file in",
                "image outside the folder",
            )
    if os.path.isfile(path):
        return path
    stem = os.path.splitext(path)[0]
    for extension in _EXTENSIONS:
        if os.path.isfile(stem + extension):
            return stem + extension
    raise BadSampleError(
        f"image {name!r} does not exist in the image folder {str(image_folder or '.')!r}", "missing image"
    )


def read_image(path: str) -> Image.Image:
    """Read a picture as RGB.

    Raises:
        BadSampleError: If the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except _DECODE_ERRORS as error:
        raise _corrupt(path, error) from error


def probe_image(path: str, decode: bool = False) -> None:
    """Check that the file is a picture, by its header or, with ``decode``, by reading every pixel.

    Raises:
        BadSampleError: If it is not.
    """
    if decode:
        read_image(path)
    else:
        image_size(path)


def image_size(path: str) -> tuple[int, int]:
    """Read (width, height) of a picture from the file's header.

    Raises:
        BadSampleError: If the file is no picture.
    """
    try:
        with Image.open(path) as image:
            size = image.size
    except _DECODE_ERRORS as error:
        raise _corrupt(path, error) from error
    if min(size) < 1:
        raise BadSampleError(f"image {path!r} has no pixels: size {size}", "corrupt image")
    return size


def _corrupt(path: str, error: BaseException) -> BadSampleError:
    detail = str(error).replace(path, "the file") or type(error).__name__
    return BadSampleError(f"image {path!r} cannot be read ({detail}); replace the file", "corrupt image")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB; 16-bit grey is scaled down, where PIL's own conversion would clip it to white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.max(initial=0) > 255:
            values = values >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
