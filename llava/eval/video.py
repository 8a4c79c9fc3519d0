"""Read a few frames of a video, spread evenly over its whole length."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from duet.pictures import to_rgb
from llava.eval.tasks.base import BadEvalData

FRAMES = 8  # Video-LLaVA's number
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
_PICTURES = {".gif"}  # read with PIL
MAX_FRAME_PIXELS = 1 << 25
"""Pixels of a frame, a little more than 8K video has: several frames are held at a time."""


def frame_indices(total: int, count: int = FRAMES) -> list[int]:
    """Positions of `count` frames from the first to the last of `total`, rounded down.

    A video with fewer frames than `count` gives some of them more than once.

    Raises:
        ValueError: either number is below 1.

    Source: the rule of Video-LLaVA's decord and OpenCV readers.
    """
    if total < 1 or count < 1:
        raise ValueError(f"cannot take {count} frames of {total}; both must be at least 1")
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def read_frames(path: str | Path, count: int = FRAMES) -> list[Image.Image]:
    """Read `count` frames (see `frame_indices`) as RGB pictures in the video's own size.

    Frames are counted by decoding, since a container's own number can be absent or wrong; it only saves a second pass
    where it is right. No more than `count` frames are held at a time. Nothing is flipped or turned.

    Raises:
        BadEvalData: the file is absent, empty, holds no video, cannot be decoded to its end, or has frames of more than
            `MAX_FRAME_PIXELS`; names it.
        ImportError: PyAV is not installed, and this is not a GIF.
    """
    path = Path(path)
    if not path.is_file():
        raise BadEvalData(f"video {path} does not exist")
    if path.stat().st_size == 0:
        raise BadEvalData(f"video {path} is empty (0 bytes); fetch it again")
    if path.suffix.lower() in _PICTURES:
        return _read_gif(path, count)
    require_reader()
    total = _declared_frames(path)
    wanted = frame_indices(total, count) if total else []
    found, kept = _scan_video(path, wanted)
    if found == 0:
        raise BadEvalData(f"video {path} has no frames; fetch it again")
    if found != total:
        wanted = frame_indices(found, count)
        _, kept = _scan_video(path, wanted)
    return [kept[index] for index in wanted]


def require_reader() -> None:
    """Check that videos other than GIFs can be read.

    Raises:
        ImportError: PyAV is not installed; says how to get it.
    """
    if importlib.util.find_spec("av") is None:
        raise ImportError("reading videos needs PyAV (package av), which is not installed: pip install -e '.[video]'")


def find_videos(folder: Path) -> dict[str, Path]:
    """The videos of a folder by file name without suffix.

    Where a name has several files, the suffix that comes first in `VIDEO_SUFFIXES` wins.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        rank = _rank(path)
        if rank < len(VIDEO_SUFFIXES) and (path.stem not in found or rank < _rank(found[path.stem])):
            found[path.stem] = path
    return found


def _rank(path: Path) -> int:
    suffix = path.suffix.lower()
    return VIDEO_SUFFIXES.index(suffix) if suffix in VIDEO_SUFFIXES else len(VIDEO_SUFFIXES)


def _declared_frames(path: Path) -> int:
    """How many frames the container says it has; 0 where it does not say."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadEvalData(f"{path} holds no video stream; expected a video")
            stream = container.streams.video[0]
            _check_frame(path, stream.codec_context.width, stream.codec_context.height)
            return max(stream.frames, 0)
    except (FFmpegError, OSError) as error:
        raise BadEvalData(f"video {path} cannot be opened: {error}; fetch it again") from error


def _check_frame(path: Path, width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise BadEvalData(
            f"video {path} has frames of {width} x {height} pixels, the limit is {MAX_FRAME_PIXELS:,}; scale it down"
        )


def _scan_video(path: Path, wanted: list[int]) -> tuple[int, dict[int, Image.Image]]:
    """Decode a video; returns how many frames it has, and those that were asked for."""
    import av
    from av.error import FFmpegError

    total, kept, keep = 0, {}, set(wanted)
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(container.streams.video[0]):
                if total in keep:
                    # The size may change within a video.
                    _check_frame(path, frame.width, frame.height)
                    kept[total] = frame.to_image()
                total += 1
    except (FFmpegError, OSError) as error:
        raise BadEvalData(f"video {path} cannot be decoded after {total} frames: {error}; fetch it again") from error
    return total, kept


def _read_gif(path: Path, count: int) -> list[Image.Image]:
    kept: dict[int, Image.Image] = {}
    try:
        with Image.open(path) as image:
            _check_frame(path, *image.size)
            wanted = frame_indices(getattr(image, "n_frames", 1), count)
            for index in sorted(set(wanted)):
                image.seek(index)
                kept[index] = to_rgb(image)
    except BadEvalData:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise BadEvalData(
            f"video {path} cannot be decoded after {len(kept)} frames: {error}; fetch it again"
        ) from error
    return [kept[index] for index in wanted]
