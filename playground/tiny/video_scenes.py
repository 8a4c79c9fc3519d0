"""Clips of the tiny world: a camera pans over a real photograph while real handwritten digits cross it, one by one.

Everything is drawn from the same sources as the still scenes, with the same split: train and held-out clips share
neither a digit's scan nor a region of a photograph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from playground.tiny.scenes import (
    MAX_SIZE,
    MIN_SIZE,
    SNAP,
    SPLITS,
    check_split,
    digit_scan,
    digit_sources,
    load_photos,
    photo_region,
    render_digit,
)

SIDE = 112  # pixels of a frame
STORED = 12  # frames of a clip; the model sees 8 of them
MIN_DIGITS, MAX_DIGITS = 2, 4
MIN_SHOWN = 3  # stored frames in which a digit is seen, so that at least two of the eight show it
COLOURS = 64


@dataclass(frozen=True)
class Track:
    """One digit of a clip: when it is seen (stored frames, the last one included) and where its box begins.

    Attributes:
        value: the digit.
        source: its scan.
        first, last: frames.
        begin, end: left edge of its box in these frames, in pixels: it crosses the whole picture.
        top: upper edge of its box.
        size: side of its box.
    """

    value: int
    source: int
    first: int
    last: int
    begin: int
    end: int
    top: int
    size: int

    @property
    def direction(self) -> str:
        """Where it goes: "left" or "right"."""
        return "right" if self.end > self.begin else "left"

    def left(self, frame: int) -> int:
        """Left edge of its box in a frame."""
        share = (frame - self.first) / (self.last - self.first)
        return round((self.begin + share * (self.end - self.begin)) / SNAP) * SNAP


@dataclass(frozen=True)
class Clip:
    """Frames [T, 112, 112, 3] uint8, the digits in order of appearance, and what each frame shows of a photograph."""

    frames: np.ndarray
    tracks: tuple[Track, ...]
    photo: str
    crops: tuple[tuple[float, float, float, float], ...]


def make_clip(split: str, seed: int, index: int) -> Clip:
    """Clip number `index` of a split; the same arguments always give the same clip.

    Raises:
        ValueError: unknown split.
    """
    check_split(split)
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 4])
    frames, photo, crops = _panning(rng, split)
    tracks = _tracks(rng, split)
    for track in tracks:
        _draw(frames, track, rng)
    return Clip(np.clip(frames, 0, 255).astype(np.uint8), tracks, photo, crops)


def _panning(rng: np.random.Generator, split: str) -> tuple[np.ndarray, str, tuple]:
    """A photograph through a window that moves on by up to a third of its side, in any direction."""
    photos = load_photos()
    name = list(photos)[rng.integers(len(photos))]
    photo = photos[name]
    left, top, right, bottom = photo_region(photo, split)
    limit = min(right - left, bottom - top)
    side = int(rng.integers(min(60, limit // 2), max(61, int(0.6 * limit))))
    reach = side / 3
    starts = [rng.uniform(low, high - side) for low, high in ((left, right), (top, bottom))]
    ends = [
        float(np.clip(start + rng.uniform(-reach, reach), low, high - side))
        for start, (low, high) in zip(starts, ((left, right), (top, bottom)), strict=True)
    ]
    contrast, light = rng.uniform(0.6, 1.1), rng.uniform(-30.0, 30.0)
    frames, crops = [], []
    for share in np.linspace(0.0, 1.0, STORED):
        x, y = (start + share * (end - start) for start, end in zip(starts, ends, strict=True))
        crop = (float(x), float(y), float(x + side), float(y + side))
        patch = photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=crop)
        frames.append((np.asarray(patch, dtype=np.float32) - 128.0) * contrast + 128.0 + light)
        crops.append(crop)
    return np.stack(frames), name, tuple(crops)


def _tracks(rng: np.random.Generator, split: str) -> tuple[Track, ...]:
    """Different digits that share the clip's time among themselves, one after the other."""
    count = int(rng.integers(MIN_DIGITS, MAX_DIGITS + 1))
    spare = rng.multinomial(STORED - count * MIN_SHOWN, np.full(count, 1 / count))
    pools, first, tracks = digit_sources(split), 0, []
    for value, extra in zip(rng.permutation(10)[:count], spare, strict=True):
        size = int(rng.integers(MIN_SIZE, MAX_SIZE + 1))
        steps = (SIDE - size) // SNAP
        begin, end = (0, steps) if rng.random() < 0.5 else (steps, 0)
        last = first + MIN_SHOWN + int(extra) - 1
        pool = pools[int(value)]
        top = int(rng.integers(0, steps + 1)) * SNAP
        source = pool[rng.integers(len(pool))]
        tracks.append(Track(int(value), source, first, last, begin * SNAP, end * SNAP, top, size))
        first = last + 1
    return tuple(tracks)


def _draw(frames: np.ndarray, track: Track, rng: np.random.Generator) -> None:
    """Paste a digit into its frames; it looks the same in all of them."""
    ink = render_digit(digit_scan(track.source), track.size, rng)[..., None]
    colour, ground, opacity = rng.uniform(0.0, 80.0, 3), rng.uniform(180.0, 255.0, 3), rng.uniform(0.8, 1.0)
    for frame in range(track.first, track.last + 1):
        left = track.left(frame)
        window = frames[frame, track.top : track.top + track.size, left : left + track.size]
        window[:] = window * (1 - opacity) + ground * opacity
        window[:] = window * (1 - ink) + colour * ink


def save_clip(clip: Clip, path: str) -> None:
    """Write a clip as a GIF."""
    pictures = [Image.fromarray(frame).quantize(COLOURS) for frame in clip.frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=120, loop=0, optimize=False)
