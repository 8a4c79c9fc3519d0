"""Questions about clips that one frame does not answer: what comes first, in which order, which way it moves."""

from __future__ import annotations

import numpy as np

from playground.tiny.video_scenes import MAX_DIGITS, MIN_DIGITS, Track

Turn = tuple[str, str]
KINDS = ("exists", "count", "first", "last", "after", "order", "move")
_COUNTS = range(MIN_DIGITS, MAX_DIGITS + 1)


def _over_counts(values: list[float]) -> float:
    return sum(values) / len(values)


CHANCE = {
    "exists": 1 / 2,
    "count": 1 / len(_COUNTS),
    "first": 1 / 10,
    "last": 1 / 10,
    "after": 1 / 9,
    "order": _over_counts([1 / np.prod(range(10 - count + 1, 11)) for count in _COUNTS]),
    "move": 1 / 2,
}
"""What guessing gets."""
UNORDERED = {
    "exists": 1.0,
    "count": 1.0,
    "first": _over_counts([1 / count for count in _COUNTS]),
    "last": _over_counts([1 / count for count in _COUNTS]),
    "after": _over_counts([1 / (count - 1) for count in _COUNTS]),
    "order": _over_counts([1 / np.prod(range(1, count + 1)) for count in _COUNTS]),
    "move": 1 / 2,
}
"""What somebody gets who recognises every digit and knows nothing of time."""


def ask(kind: str, tracks: tuple[Track, ...], rng: np.random.Generator) -> Turn:
    """One (question, answer) of a kind about the digits of a clip, given in order of appearance.

    Raises:
        ValueError: unknown kind.
    """
    values = [track.value for track in tracks]
    if kind == "exists":
        yes = rng.random() < 0.5
        value = int(rng.choice(values if yes else [v for v in range(10) if v not in values]))
        return f"Is there a{'n' if value == 8 else ''} {value}?", "Yes" if yes else "No"
    if kind == "count":
        return "How many digits are there?", str(len(values))
    if kind == "first":
        return "Which digit is first?", str(values[0])
    if kind == "last":
        return "Which digit is last?", str(values[-1])
    if kind == "after":
        at = int(rng.integers(len(values) - 1))
        return f"Which digit is after the {values[at]}?", str(values[at + 1])
    if kind == "order":
        return "Read the digits from first to last.", " ".join(map(str, values))
    if kind == "move":
        track = tracks[rng.integers(len(tracks))]
        return f"Is the {track.value} going left or right?", track.direction
    raise ValueError(f"question kind is {kind!r}, expected one of {', '.join(KINDS)}")
