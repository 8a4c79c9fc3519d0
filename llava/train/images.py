"""Find and read a record's picture; everything that can go wrong becomes a ``BadSampleError`` that names the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from PIL import Image

from llava.pictures import PictureError, picture_size, read_picture
from llava.train.records import BadSampleError

T = TypeVar("T")

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")


def find_image(image_folder: str | os.PathLike | None, name: str, suffixes: Sequence[str] = PICTURE_SUFFIXES) -> str:
    """Return the path of a record's picture.

    A name whose extension differs from the file's (OCR-VQA's annotations say ``.jpg`` throughout; cameras write
    ``.JPG``) finds the file all the same. Symbolic links inside the folder are followed; a name that climbs out of the
    folder is refused.

    Args:
        image_folder: Folder that names start from; None or "" takes names as they are.
        name: The picture's name in the record.
        suffixes: Extensions that are tried in place of the name's, in lower, upper and title case.

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
    for suffix in suffixes:
        for spelt in (suffix, suffix.upper(), suffix.title()):
            if os.path.isfile(stem + spelt):
                return stem + spelt
    raise BadSampleError(
        f"image {name!r} does not exist in the image folder {str(image_folder or '.')!r}", "missing image"
    )


def read_image(path: str, orientation: str = "exif") -> Image.Image:
    """Read a picture as RGB; see ``llava.pictures.read_picture``.

    Raises:
        BadSampleError: If the file cannot be decoded.
    """
    return _as_bad_sample(lambda: read_picture(path, orientation))


def probe_image(path: str, decode: bool = False, max_aspect_ratio: float | None = None) -> None:
    """Check that the file is a picture, by its header or, with ``decode``, by reading every pixel.

    Raises:
        BadSampleError: If it is not, or one side is more than ``max_aspect_ratio`` times the other.
    """
    size = read_image(path).size if decode else image_size(path, "stored")
    check_shape(path, size, max_aspect_ratio)


def check_shape(path: str, size: tuple[int, int], max_aspect_ratio: float | None) -> None:
    """Refuse a picture that is too thin for what prepares it.

    Raises:
        BadSampleError: One side is more than ``max_aspect_ratio`` (None: no limit) times the other.
    """
    if max_aspect_ratio is not None and max(size) > max_aspect_ratio * min(size):
        raise BadSampleError(
            f"image {path!r} has {size[0]} x {size[1]} pixels; one side may be {max_aspect_ratio:g} times the other at "
            "most, cut it",
            "thin image",
        )


def image_size(path: str, orientation: str = "exif") -> tuple[int, int]:
    """Read (width, height) of a picture from the file's header.

    Raises:
        BadSampleError: If the file is no picture.
    """
    return _as_bad_sample(lambda: picture_size(path, orientation))


def _as_bad_sample(read: Callable[[], T]) -> T:
    try:
        return read()
    except PictureError as error:
        raise BadSampleError(f"{error}; replace the file", "corrupt image") from error
