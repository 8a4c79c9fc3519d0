"""Questions about a scene in the forms that benchmarks ask: yes or no, and lettered options.

The wording is that of `questions.py` wherever it has one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from playground.tiny.questions import EXTREMES, LETTERS, Turn, ask, by_axis, text_turn
from playground.tiny.scenes import MAX_DIGITS, MIN_DIGITS, PlacedDigit

CLAIMS = ("existence", "count", "position")
QUIZZES = ("identity", "corner", "extreme", "relation", "count", "order")
OCR_LINE = "\nReference OCR token: "
WRONG = 3  # wrong options of a lettered question


@dataclass(frozen=True)
class Quiz:
    """A question with its right answer and plausible wrong ones, all different."""

    question: str
    answer: str
    wrong: tuple[str, ...]

    def options(self, place: int) -> list[str]:
        """All options, the right one at index `place`."""
        return [*self.wrong[:place], self.answer, *self.wrong[place:]]

    def lettered(self, place: int) -> str:
        """The question with one option a line, the right one at index `place`."""
        options = zip(LETTERS, self.options(place), strict=False)
        return "\n".join([self.question, *(f"{letter}. {option}" for letter, option in options)])


def is_there(value: int) -> str:
    """The question whether a digit is on the scene."""
    return f"Is there {'an' if value == 8 else 'a'} {value}?"


def claim_pair(kind: str, digits: tuple[PlacedDigit, ...], rng: np.random.Generator) -> tuple[str, str]:
    """Two questions of one kind about a scene; the answer to the first is yes, to the second no.

    Raises:
        ValueError: unknown kind.
    """
    present = [d.value for d in digits]
    if kind == "existence":
        return is_there(int(rng.choice(present))), is_there(int(rng.choice([v for v in range(10) if v not in present])))
    if kind == "count":
        others = [n for n in range(MIN_DIGITS, MAX_DIGITS + 1) if n != len(digits)]
        return f"Are there {len(digits)} digits?", f"Are there {rng.choice(others)} digits?"
    if kind == "position":
        name = list(EXTREMES)[rng.integers(len(EXTREMES))]
        axis, sign = EXTREMES[name]
        right, *others = [d.value for d in by_axis(digits, axis)][::sign]
        return f"Is the {right} {name}?", f"Is the {rng.choice(others)} {name}?"
    raise ValueError(f"claim kind is {kind!r}, expected one of {', '.join(CLAIMS)}")


def _other_orders(answer: str, spare: list[int], rng: np.random.Generator) -> tuple[str, ...]:
    """Wrong readings: other orders of the same digits, then readings with one digit misread as a spare one."""
    right = answer.split(" ")
    orders = [" ".join(order) for order in permutations(right) if list(order) != right]
    slips = [" ".join([*right[:i], str(v), *right[i + 1 :]]) for i in range(len(right)) for v in spare]
    return tuple([*(str(o) for o in rng.permutation(orders)), *(str(s) for s in rng.permutation(slips))][:WRONG])


def quiz(kind: str, digits: tuple[PlacedDigit, ...], rng: np.random.Generator) -> Quiz | None:
    """A question with options, or None when the scene does not allow it (an empty or crowded corner).

    Raises:
        ValueError: unknown kind.
    """
    if kind not in QUIZZES:
        raise ValueError(f"quiz kind is {kind!r}, expected one of {', '.join(QUIZZES)}")
    present = [d.value for d in digits]
    absent = [int(v) for v in rng.permutation([v for v in range(10) if v not in present])]
    if kind == "identity":
        return Quiz("Which digit is in the image?", str(rng.choice(present)), tuple(str(v) for v in absent[:WRONG]))
    turn = ask(kind, digits, rng)
    if turn is None:
        return None
    question, answer = turn
    if kind == "order":
        return Quiz(question, answer, _other_orders(answer, absent, rng))
    if kind == "count":
        wrong = rng.permutation([n for n in range(1, MAX_DIGITS + 2) if n != len(digits)])
    else:
        named = {int(v) for v in re.findall(r"\d", question)} | {int(answer)}
        wrong = [*rng.permutation([v for v in present if v not in named]).astype(int), *absent]
    return Quiz(question, answer, tuple(str(v) for v in wrong[:WRONG]))


def text_quiz(rng: np.random.Generator) -> Quiz:
    """A question with options that needs no image."""
    question, answer = text_turn(rng)
    named = re.findall(r"\d", question)
    if len(named) == 1:
        wrong = rng.permutation([v for v in range(10) if str(v) not in (answer, named[0])])
        return Quiz(question, answer, tuple(str(v) for v in wrong[:WRONG]))
    if len(named) == 2:
        return Quiz(question, answer, tuple(v for v in named if v != answer))
    return Quiz(question, answer, _other_orders(answer, [], rng))


def ocr_line(digits: tuple[PlacedDigit, ...]) -> str:
    """All digits from top to bottom as TextVQA's OCR tokens; that order gives no answer away."""
    return OCR_LINE + ", ".join(str(d.value) for d in by_axis(digits, "y"))


def lettered_turn(asked: Quiz, rng: np.random.Generator) -> Turn:
    """A question with options in random order, and the right letter."""
    place = int(rng.integers(len(asked.wrong) + 1))
    return asked.lettered(place), LETTERS[place]


def exam_turns(digits: tuple[PlacedDigit, ...], rng: np.random.Generator, count: int) -> list[Turn]:
    """Training turns in all forms that the exported benchmarks ask; what gives every digit away comes last."""
    turns = [turn for kind in ("exists", "corner", "extreme", "relation") if (turn := ask(kind, digits, rng))]
    for kind in CLAIMS:
        no = int(rng.integers(2))
        turns.append((claim_pair(kind, digits, rng)[no], ("Yes", "No")[no]))
    kinds = rng.permutation([kind for kind in QUIZZES if kind != "order"])[:3]
    turns += [lettered_turn(asked, rng) for kind in kinds if (asked := quiz(kind, digits, rng))]
    question, answer = ask("order", digits, rng)
    last = (question + (ocr_line(digits) if rng.random() < 0.5 else ""), answer)
    if rng.random() < 0.4:
        last = lettered_turn(quiz("order", digits, rng), rng)
    return [*(turns[i] for i in rng.permutation(len(turns))[: count - 1]), last]
