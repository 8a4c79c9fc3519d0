"""Captions, questions and text-only turns of the tiny world. Answers come from the scene's digits alone."""

from __future__ import annotations

import numpy as np

from playground.tiny.scenes import IMAGE_SIZE, PlacedDigit

KINDS = ("exists", "count", "corner", "extreme", "relation", "choice", "order")
CHANCE_NOTE = {
    "exists": "two answers, balanced",
    "count": "2 to 4 digits, equally often",
    "corner": "ten digits",
    "extreme": "ten digits",
    "relation": "the nine digits that are not named in the question",
    "choice": "four options",
    "order": "2 to 4 different digits in order, the count known",
}
CHANCE = {
    "exists": 1 / 2,
    "count": 1 / 3,
    "corner": 1 / 10,
    "extreme": 1 / 10,
    "relation": 1 / 9,
    "choice": 1 / 4,
    "order": (1 / 90 + 1 / 720 + 1 / 5040) / 3,
}
CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
EXTREMES = {"leftmost": ("x", 1), "rightmost": ("x", -1), "topmost": ("y", 1), "bottommost": ("y", -1)}
RELATIONS = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}
CORNER_MARGIN = 12  # pixels between a digit's centre and the middle line, so that the quarter is clear
LETTERS = "ABCD"

Turn = tuple[str, str]


def by_axis(digits: tuple[PlacedDigit, ...], axis: str) -> list[PlacedDigit]:
    """Digits in increasing order of x or y."""
    return sorted(digits, key=lambda d: getattr(d, axis))


def caption(digits: tuple[PlacedDigit, ...]) -> str:
    """Dense caption: every digit from left to right with its place on a 10 x 10 grid (column, then row)."""
    cell = IMAGE_SIZE / 10
    parts = [f"{d.value} at {int(d.x // cell)} {int(d.y // cell)}" for d in by_axis(digits, "x")]
    return f"There are {len(digits)} digits: " + ", ".join(parts) + "."


def _exists(digits: tuple[PlacedDigit, ...], rng: np.random.Generator) -> Turn:
    present = [d.value for d in digits]
    absent = [v for v in range(10) if v not in present]
    yes = rng.random() < 0.5
    value = rng.choice(present if yes else absent)
    article = "an" if value == 8 else "a"
    return f"Is there {article} {value}?", "Yes" if yes else "No"


def _count(digits: tuple[PlacedDigit, ...], rng: np.random.Generator) -> Turn:
    return "How many digits are there?", str(len(digits))


def _corner(digits: tuple[PlacedDigit, ...], rng: np.random.Generator) -> Turn | None:
    middle = IMAGE_SIZE / 2
    options = []
    for name, (right, low) in CORNERS.items():
        inside = [d for d in digits if (d.x > middle) == bool(right) and (d.y > middle) == bool(low)]
        clear = all(min(abs(d.x - middle), abs(d.y - middle)) >= CORNER_MARGIN for d in digits)
        if len(inside) == 1 and clear:
            options.append((name, inside[0].value))
    if not options:
        return None
    name, value = options[rng.integers(len(options))]
    return f"Which digit is in the {name}?", str(value)


def _extreme(digits: tuple[PlacedDigit, ...], rng: np.random.Generator) -> Turn:
    name = list(EXTREMES)[rng.integers(len(EXTREMES))]
    axis, sign = EXTREMES[name]
    return f"Which digit is {name}?", str(by_axis(digits, axis)[0 if sign > 0 else -1].value)


def _relation(digits: tuple[PlacedDigit, ...], rng: np.random.Generator) -> Turn:
    name = list(RELATIONS)[rng.integers(len(RELATIONS))]
    axis, step = RELATIONS[name]
    ordered = by_axis(digits, axis)
    at = int(rng.integers(0, len(ordered) - 1)) + (1 if step < 0 else 0)
    return f"Which digit is next {name} the {ordered[at].value}?", str(ordered[at + step].value)


def _choice(digits: tuple[PlacedDigit, ...], rng: np.random.Generator) -> Turn:
    present = [d.value for d in digits]
    absent = [v for v in range(10) if v not in present]
    options = [*rng.permutation(absent)[:3], rng.choice(present)]
    order = rng.permutation(4)
    listed = "\n".join(f"{letter}. {options[i]}" for letter, i in zip(LETTERS, order, strict=True))
    answer = LETTERS[int(np.flatnonzero(order == 3)[0])]
    return f"Which digit is in the image?\n{listed}", answer


def _order(digits: tuple[PlacedDigit, ...], rng: np.random.Generator) -> Turn:
    return "Read the digits from left to right.", " ".join(str(d.value) for d in by_axis(digits, "x"))


_MAKERS = {
    "exists": _exists,
    "count": _count,
    "corner": _corner,
    "extreme": _extreme,
    "relation": _relation,
    "choice": _choice,
    "order": _order,
}


def ask(kind: str, digits: tuple[PlacedDigit, ...], rng: np.random.Generator) -> Turn | None:
    """One (question, answer) of a kind, or None when the scene does not allow it (an empty or crowded corner).

    Raises:
        ValueError: unknown kind.
    """
    if kind not in _MAKERS:
        raise ValueError(f"question kind is {kind!r}, expected one of {', '.join(KINDS)}")
    return _MAKERS[kind](digits, rng)


def place_turn(digits: tuple[PlacedDigit, ...], rng: np.random.Generator) -> Turn:
    """Where a named digit is, or that it is not there. Only the training of the language model uses it: it teaches to
    find the patch that a word names, which yes/no answers alone teach late."""
    cell = IMAGE_SIZE / 10
    wanted = int(rng.choice([d.value for d in digits])) if rng.random() < 0.6 else int(rng.integers(10))
    found = [d for d in digits if d.value == wanted]
    answer = f"{wanted} at {int(found[0].x // cell)} {int(found[0].y // cell)}" if found else "No"
    return f"Describe the {wanted}.", answer


def text_turn(rng: np.random.Generator) -> Turn:
    """One question that needs no image."""
    a, b, c = (int(v) for v in rng.permutation(10)[:3])
    if rng.random() < 0.4:
        return f"Which is larger, {a} or {b}?", str(max(a, b))
    if rng.random() < 0.5:
        return f"Sort the digits {a} {b} {c}.", " ".join(str(v) for v in sorted((a, b, c)))
    low = int(rng.integers(0, 9))
    return f"What comes after {low}?", str(low + 1)
