"""Scenes of the tiny world: a real photograph with real handwritten digits on it.

The photographs ship inside scikit-image and scikit-learn, the digits are scikit-learn's 8x8 scans. Nothing is
downloaded. The two splits share neither a source digit nor a region of a photograph.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

IMAGE_SIZE = 336
SPLITS = ("train", "heldout")
SKIMAGE_PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "rocket.jpg",
)
SKLEARN_PHOTOS = ("china.jpg", "flower.jpg")
TRAIN_REGION = (0.0, 0.62)  # share of the photograph's width
HELDOUT_REGION = (0.64, 1.0)
TRAIN_DIGITS = 0.8  # share of the source digits of each class
MIN_DIGITS, MAX_DIGITS = 2, 4
BACKBONE_MAX_DIGITS = 5  # the language model is trained on slightly harder scenes than it is asked about
MIN_SIZE, MAX_SIZE = 50, 58  # side of a pasted digit in pixels
SNAP = 7  # the corner of a digit's box lies on a grid of this many pixels, which makes the digits quicker to learn
MIN_STEP = 28  # two digits differ by at least this many pixels in x and in y, so that every order is clear


@dataclass(frozen=True)
class PlacedDigit:
    """One digit on a scene: its value, the source scan, its centre and the side of its box in pixels."""

    value: int
    source: int
    x: float
    y: float
    size: int


@dataclass(frozen=True)
class Scene:
    """A scene: pixels [336, 336, 3] uint8, the digits on it, and where the photograph was cut from."""

    pixels: np.ndarray
    digits: tuple[PlacedDigit, ...]
    photo: str
    crop: tuple[int, int, int, int]


def _package_file(package: str, *parts: str) -> str:
    module = __import__(package)
    path = os.path.join(os.path.dirname(module.__file__), *parts)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{os.path.join(package, *parts)} is missing from the installed {package}; expected a photograph that "
            f"ships inside its wheel. Reinstall {package} from its wheel."
        )
    return path


@lru_cache(maxsize=1)
def load_photos() -> dict[str, Image.Image]:
    """All source photographs as RGB images, by file name.

    Raises:
        FileNotFoundError: a photograph is missing from the installed package.
    """
    paths = {name: _package_file("skimage", "data", name) for name in SKIMAGE_PHOTOS}
    paths |= {name: _package_file("sklearn", "datasets", "images", name) for name in SKLEARN_PHOTOS}
    return {name: Image.open(path).convert("RGB") for name, path in sorted(paths.items())}


def photo_region(photo: Image.Image, split: str) -> tuple[int, int, int, int]:
    """The part of a photograph that a split may use, as (left, top, right, bottom) in pixels."""
    check_split(split)
    begin, end = TRAIN_REGION if split == "train" else HELDOUT_REGION
    return round(begin * photo.width), 0, round(end * photo.width), photo.height


@lru_cache(maxsize=1)
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * (255.0 / 16.0)).round().astype(np.uint8), data.target.astype(np.int64)


def digit_scan(source: int) -> np.ndarray:
    """One of scikit-learn's scans, [8, 8] uint8."""
    return _all_digits()[0][source]


@lru_cache(maxsize=4)
def digit_sources(split: str) -> tuple[tuple[int, ...], ...]:
    """For each digit 0..9, the indices of the scans that a split may use. The two splits are disjoint."""
    check_split(split)
    _, labels = _all_digits()
    pools = []
    for value in range(10):
        order = np.random.default_rng([2026, value]).permutation(np.flatnonzero(labels == value))
        cut = round(TRAIN_DIGITS * len(order))
        pools.append(tuple(int(i) for i in (order[:cut] if split == "train" else order[cut:])))
    return tuple(pools)


def check_split(split: str) -> None:
    """Raise ValueError unless the split is known."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")


def _background(
    rng: np.random.Generator, split: str, size: int = IMAGE_SIZE
) -> tuple[np.ndarray, str, tuple[int, int, int, int]]:
    photos = load_photos()
    name = list(photos)[rng.integers(len(photos))]
    photo = photos[name]
    left, top, right, bottom = photo_region(photo, split)
    limit = min(right - left, bottom - top)
    side = int(rng.integers(min(110, limit), limit + 1)) * size // IMAGE_SIZE
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(top, bottom - side + 1))
    crop = (x, y, x + side, y + side)
    patch = photo.resize((size, size), Image.Resampling.BILINEAR, box=crop)
    if rng.random() < 0.5:
        patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(patch, dtype=np.float32)
    pixels = (pixels - 128.0) * rng.uniform(0.6, 1.1) + 128.0 + rng.uniform(-30.0, 30.0)
    return pixels, name, crop


def render_digit(scan: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A scan [8, 8] uint8 enlarged smoothly and slightly rotated, as ink coverage [size, size] in 0..1."""
    framed = Image.fromarray(np.pad(scan, 1))
    angle, shear = np.deg2rad(rng.uniform(-9.0, 9.0)), rng.uniform(-0.1, 0.1)
    scale = 10.0 / size * rng.uniform(0.95, 1.08)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    a, b, d, e = cos, -sin + shear * scale, sin, cos
    half = size / 2.0
    c, f = 5.0 - (a + b) * half, 5.0 - (d + e) * half
    enlarged = framed.transform((size, size), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC)
    ink = np.asarray(enlarged, dtype=np.float32) / 255.0
    return np.clip((ink - 0.2) / 0.5, 0.0, 1.0)


def _paste(pixels: np.ndarray, digit: PlacedDigit, rng: np.random.Generator) -> None:
    scans, _ = _all_digits()
    ink = render_digit(scans[digit.source], digit.size, rng)[..., None]
    colour, ground = rng.uniform(0.0, 80.0, 3), rng.uniform(180.0, 255.0, 3)
    left, top = round(digit.x - digit.size / 2), round(digit.y - digit.size / 2)
    window = pixels[top : top + digit.size, left : left + digit.size]
    opacity = rng.uniform(0.8, 1.0)
    window[:] = window * (1 - opacity) + ground * opacity
    window[:] = window * (1 - ink) + colour * ink


def _spread(rng: np.random.Generator, count: int, low: float, high: float, step: float) -> np.ndarray:
    """`count` coordinates in [low, high], at least `step` apart, in random order."""
    free = np.sort(rng.uniform(0.0, high - low - step * (count - 1), count))
    return rng.permutation(low + free + step * np.arange(count))


def _place(rng: np.random.Generator, sizes: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    margin = sizes.max() / 2 + 2
    count = len(sizes)
    while True:
        xs = _spread(rng, count, margin, IMAGE_SIZE - margin, step)
        ys = _spread(rng, count, margin, IMAGE_SIZE - margin, step)
        xs, ys = _snap(xs, sizes), _snap(ys, sizes)
        gap = np.maximum(np.abs(xs[:, None] - xs), np.abs(ys[:, None] - ys))
        if (gap + 1e3 * np.eye(count) >= (sizes[:, None] + sizes) / 2).all():
            return xs, ys


def _snap(centres: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Move centres so that the box begins on the snap grid; a box never leaves the image."""
    begin = np.clip(np.round((centres - sizes / 2) / SNAP), 0, (IMAGE_SIZE - sizes) // SNAP) * SNAP
    return begin + sizes / 2


def make_window(split: str, seed: int, index: int, size: int) -> tuple[np.ndarray, tuple[PlacedDigit, ...]]:
    """A small crowded scene of size x size pixels, to teach the tower its digits cheaply: up to 5 digits on 168 px."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 2])
    pixels, _, _ = _background(rng, split, size)
    digits: list[PlacedDigit] = []
    for _ in range(int(rng.integers(6, 20))):
        value, side = int(rng.integers(10)), int(rng.integers(MIN_SIZE, MAX_SIZE + 1))
        x, y = (int(rng.integers(0, (size - side) // SNAP + 1)) * SNAP + side / 2 for _ in range(2))
        if any(max(abs(x - d.x), abs(y - d.y)) < (side + d.size) / 2 for d in digits):
            continue
        pool = digit_sources(split)[value]
        digits.append(PlacedDigit(value, pool[rng.integers(len(pool))], x, y, side))
        _paste(pixels, digits[-1], rng)
    return np.clip(pixels, 0, 255).astype(np.uint8), tuple(digits)


def make_scene(split: str, seed: int, index: int, crowded: bool = False, most: int = MAX_DIGITS) -> Scene:
    """Scene number `index` of a split; the same arguments always give the same scene.

    Args:
        split: "train" or "heldout".
        seed: seed of the whole data set.
        index: number of the scene.
        crowded: 5 to 8 digits with repetition and without the ordering margin. Only the training of the vision
            tower uses it, because it teaches more digits per image.
        most: highest number of digits of a scene that is not crowded.

    Raises:
        ValueError: unknown split.
    """
    check_split(split)
    rng = np.random.default_rng([seed, SPLITS.index(split), index, int(crowded)])
    pixels, photo, crop = _background(rng, split)
    if crowded:
        count = int(rng.integers(5, 9))
        values = rng.integers(0, 10, count)
    else:
        count = int(rng.integers(MIN_DIGITS, most + 1))
        values = rng.permutation(10)[:count]
    sizes = rng.integers(MIN_SIZE, MAX_SIZE + 1, count)
    xs, ys = _place(rng, sizes, 4 if crowded else MIN_STEP + SNAP)
    pools = digit_sources(split)
    digits = []
    for value, size, x, y in zip(values, sizes, xs, ys, strict=True):
        pool = pools[value]
        digit = PlacedDigit(
            int(value), pool[rng.integers(len(pool))], round(float(x), 1), round(float(y), 1), int(size)
        )
        _paste(pixels, digit, rng)
        digits.append(digit)
    return Scene(np.clip(pixels, 0, 255).astype(np.uint8), tuple(digits), photo, crop)
