"""Read pictures: the one way for training, inference, evaluation and drawings.

A picture comes from a file, an http(s) address, bytes, an open file, or is a Pillow picture already. It comes back in
mode RGB (`duet.pictures.to_rgb`), upright, the first frame of several. Whatever goes wrong is a `PictureError` that
names the picture in one line.
"""

from __future__ import annotations

import argparse
import logging
import os
import stat
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import IO, Any

from PIL import Image

from duet.pictures import to_rgb

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image
Size = tuple[int, int]

ORIENTATIONS = ("exif", "stored")
"""exif: turned as the camera noted, as transformers' loader does. stored: as LLaVA, which ignores the note."""

MAX_PIXELS = 178_956_970
"""Pixels of a picture; Pillow's own limit, which other libraries switch off."""
MAX_SIDE = 65_535
"""Pixels along one side; JPEG has no more."""
MAX_FILE_BYTES = 1 << 30
MAX_STREAM_BYTES = 100 << 20
"""Bytes that are taken from an open file or the net."""
FETCH_SECONDS = 30.0
"""Time for a picture from the net, from looking up its host to the last byte."""
MAX_REDIRECTS = 5
_CHUNK = 1 << 16
_SCHEMES = ("http://", "https://")

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF 2.3, table of tag 274
_SIDEWAYS = tuple(_TURNS[number] for number in (5, 6, 7, 8))


class PictureError(ValueError):
    """A picture cannot be used; the message names it and says why in one line."""


def read_picture(source: Source, orientation: str = "exif", *, keep_palette: bool = False) -> Image.Image:
    """Read a picture.

    Args:
        source: path, http(s) address, the file's bytes, a file opened for reading bytes, or a Pillow picture, which
            stays as it is.
        orientation: see `ORIENTATIONS`.
        keep_palette: a picture with a palette (mode P) comes back as one, without transparency.

    Returns:
        A picture in memory, without the file's metadata.

    Raises:
        PictureError: it is absent, no picture, cut off, too large, or comes too slowly; names it.
    """
    _check_orientation(orientation)
    with _naming(source), _opened(source) as image:
        _check_size(image.size)
        image.load()
        turn = _turn_of(image) if orientation == "exif" else None
        if keep_palette and image.mode == "P":
            picture = image.copy()
            picture.info.clear()
        else:
            picture = to_rgb(image)
        return picture if turn is None else picture.transpose(turn)


def picture_size(source: Source, orientation: str = "exif") -> Size:
    """Return (width, height) of what `read_picture` gives.

    The pixels are not read, except where a PNG may have its orientation after them.

    Raises:
        PictureError: see `read_picture`; pixels that are cut off are not noticed.
    """
    _check_orientation(orientation)
    with _naming(source), _opened(source) as image:
        width, height = image.size
        _check_size(image.size)
        # Pillow turns TIFF pictures itself and says their upright size.
        turned = orientation == "exif" and image.format != "TIFF" and _turn_of(image) in _SIDEWAYS
        return (height, width) if turned else (width, height)


def upright(image: Image.Image) -> Image.Image:
    """Turn an opened picture as its camera noted; one without a note, or with a damaged one, comes back as it is."""
    turn = _turn_of(image)
    return image if turn is None else image.transpose(turn)


def fetch(address: str) -> bytes:
    """Download a file.

    Args:
        address: http or https.

    Raises:
        PictureError: another scheme, more than `MAX_REDIRECTS` redirects or one to another scheme, more than
            `MAX_STREAM_BYTES`, longer than `FETCH_SECONDS`, or any fault of the net; names the address.
    """
    with _naming(address):
        if not _is_address(address):
            raise ValueError(f"only {' and '.join(_SCHEMES)} addresses can be read")
        # In a thread of its own, because no timeout of the library covers a server that sends byte after byte.
        box: dict[str, Any] = {}
        end = time.monotonic() + FETCH_SECONDS
        worker = threading.Thread(target=_download_into, args=(box, address, end), daemon=True)
        worker.start()
        worker.join(FETCH_SECONDS)
        if "error" in box:
            raise box["error"]
        if "data" not in box:
            raise ValueError(f"it has not come within {FETCH_SECONDS:g} s")
        return box["data"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flag that every command has which reads pictures."""
    parser.add_argument(
        "--image_orientation", "--image-orientation", choices=ORIENTATIONS, default="exif",
        help="exif: pictures are turned as the camera noted; stored: they are not, as in LLaVA",
    )  # fmt: skip


# ---- opening


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    if isinstance(source, Image.Image):
        yield source
        return
    with Image.open(_stream(source)) as image:
        if image.format == "EPS":
            raise ValueError("EPS files are programs; save the picture as PNG")
        yield image


def _stream(source: str | os.PathLike[str] | bytes | IO[bytes]) -> str | BytesIO:
    """What Pillow opens: a checked path, or bytes in memory."""
    if isinstance(source, bytes):
        return BytesIO(source)
    if isinstance(source, str) and _is_address(source):
        return BytesIO(fetch(source))
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has {found.st_size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
        return path
    data = source.read(MAX_STREAM_BYTES + 1)
    if not isinstance(data, bytes):
        raise ValueError(f"a file opened for reading bytes was expected, this one gives {type(data).__name__}")
    if len(data) > MAX_STREAM_BYTES:
        raise ValueError(f"it has more than {MAX_STREAM_BYTES:,} bytes")
    return BytesIO(data)


@contextmanager
def _naming(source: Source) -> Iterator[None]:
    """Turn whatever goes wrong into an error that names the picture; on damaged files Pillow raises nearly anything."""
    try:
        yield
    except PictureError:
        raise
    except Exception as error:
        name = _name_of(source)
        detail = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        detail = " ".join(detail.replace(name, "the file").split())[:300] or type(error).__name__
        raise PictureError(f"image {name!r} cannot be read ({detail})") from error


def _name_of(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, bytes):
        return f"of {len(source)} bytes"
    return str(getattr(source, "filename", None) or getattr(source, "name", None) or type(source).__name__)


def _check_orientation(orientation: str) -> None:
    if orientation not in ORIENTATIONS:
        raise ValueError(f"image orientation {orientation!r} is unknown; expected one of {', '.join(ORIENTATIONS)}")


def _check_size(size: Size) -> None:
    width, height = size
    if min(size) < 1:
        raise ValueError(f"it has no pixels: {width} x {height}")
    if max(size) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels are too many: at most {MAX_SIDE:,} along a side and {MAX_PIXELS:,} altogether"
        )


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """How the picture has to be turned to be upright.

    A damaged note does not keep anyone from looking at the picture, so it counts as none.
    """
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception as error:
        logger.debug("image %r has a damaged EXIF block (%s)", _name_of(image), error)
        return None


# ---- the net


def _is_address(source: str) -> bool:
    return source.lower().startswith(_SCHEMES)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows few redirects, and only to the schemes that may be read."""

    max_redirections = MAX_REDIRECTS
    max_repeats = MAX_REDIRECTS

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not _is_address(newurl):
            raise ValueError(f"it redirects to {newurl!r}, which is neither http nor https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download_into(box: dict[str, Any], address: str, end: float) -> None:
    """Run in a thread; leaves the data or the error in the box."""
    try:
        box["data"] = _download(address, end)
    except Exception as error:
        box["error"] = error


def _download(address: str, end: float) -> bytes:
    opener = urllib.request.build_opener(_Redirects)
    request = urllib.request.Request(address, headers={"User-Agent": "llava"})
    with opener.open(request, timeout=FETCH_SECONDS) as response:
        declared = response.headers.get("Content-Length") or "0"
        if declared.isdecimal() and int(declared) > MAX_STREAM_BYTES:
            raise ValueError(f"it has {int(declared):,} bytes, the limit is {MAX_STREAM_BYTES:,}")
        data = bytearray()
        while chunk := response.read1(_CHUNK):
            data += chunk
            if len(data) > MAX_STREAM_BYTES:
                raise ValueError(f"it has more than {MAX_STREAM_BYTES:,} bytes")
            if time.monotonic() > end:
                raise ValueError(f"it has not come within {FETCH_SECONDS:g} s")
    if declared.isdecimal() and 0 < len(data) < int(declared):
        raise ValueError(f"the connection ended after {len(data):,} of {int(declared):,} bytes")
    return bytes(data)
