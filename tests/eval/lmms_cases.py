"""Generated answers for six benchmarks, and the known ways in which lmms-eval scores them otherwise than we do."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

COUNT = 6000


def listed(*lines: str) -> tuple[str, ...]:
    """Things that are written one after the other with bars between."""
    return tuple(thing for line in lines for thing in line.split("|"))


SHAPES = listed(
    "{}.|{}..|{}!|{}?|{},|{}:|.{}|...{}|({})|[{}]|'{}'|**{}**|-{}|{}-|{}/{}|{}'s|\"{}\"",
    "{}。|{}\u00a0|{}\u2026|\u201c{}\u201d|\u00bf{}?",
)
SENTENCES = (
    "The answer is {}.",
    "The answer is {}",
    "the answer is {}.",
    "The answer is {}!",
    "It is {}.",
    "It's {}",
    "Answer: {}",
    "a {}",
    "an {}",
    "the {}",
    "{}, there is one.",
    "{} because it says so",
    "{}. It is in the picture.",
    "{} or {}",
    "{}\nBecause.",
    "\n{}\t",
    "  {} .",
    "I think {}, but I am not sure.",
)
CASES: tuple[Callable[[str], str], ...] = (str, str, str.lower, str.upper, str.capitalize, str.title, str.swapcase)


@dataclass(frozen=True)
class Case:
    """One question as lmms-eval's data set has it, and an answer of a model."""

    doc: dict[str, Any]
    text: str


class Dice(random.Random):
    """Draws that are the same in every Python version: only `random()` is promised to be."""

    def one(self, things: Sequence[Any]) -> Any:
        """One of these."""
        return things[int(self.random() * len(things))]

    def number(self, low: int, high: int) -> int:
        """A whole number between both, inclusive."""
        return low + int(self.random() * (high - low + 1))


def dress(dice: Dice, word: str) -> str:
    """What a model may make of an answer: itself in two of five cases, else with marks or in a sentence."""
    word = dice.one(CASES)(word)
    kind = dice.random()
    if kind < 0.4:
        return word
    shape = dice.one(SHAPES if kind < 0.75 else SENTENCES)
    return shape.replace("{}", word)


YES_NO = listed(
    "yes|no|Yes|No|YES|NO|nO|yEs|y|n|Y|N|yeah|yep|nope|not|none|nothing|know|north|unknown|maybe|eyes|noon|nay|oui|non|ja",
    "nein|да|нет|はい|いいえ|yes,no|no,yes|yes.no|n.o|ye.s||not sure|there is no dog|there isn't one|I don't think so",
    "yes and no|no one|can not tell",
)
GQA_ANSWERS = listed(
    "yes|no|left|right|red|blue|brown|man|woman|table|t-shirt|x-ray|2|10|jalapeno|jalapeño|café|bed|polo-shirt|skis|top",
    "bottom|outdoors|wood|metal|sofa|light blue|dining table|fire hydrant|mother's|st. bernard|bell pepper",
)
TEXTVQA_ANSWERS = listed(
    "nokia|Nokia|coca-cola|Coca-Cola|12,000|12:30|$5.99|3.5|10%|r&b|7-eleven|and/or|a_b|C++|#1|o'clock|oclock|dont|don't",
    "two|Two|2|ten|10|none|0|zero|a|the|an|THE|it's|Bob's|Bobs|St.Louis|usa|U.S.A.|naïve|Ünal|№5|«да»|®|yes|no",
    "unanswerable|nokia phone|the u.s.a.|st. louis|a dog|answering does not require reading text|x - y|",
)
CHOICES = listed("a dog|the sample A|Boston|it is solid|B. cells|2 m|Äpfel|south")
LETTERS = listed("A|B|C|D|E|F|a|b|c|d|A.|B.|C.|D.|A)|(B)|A:|A.dog|B.dog||A. dog|B. cat|C. |D dog")


def pope(seed: int = 1) -> list[Case]:
    """Yes/no questions."""
    dice = Dice(seed)
    found = []
    for number in range(COUNT):
        doc = {"question_id": str(number), "answer": dice.one(("yes", "no"))}
        found.append(Case(doc, dress(dice, dice.one(YES_NO))))
    return found


def gqa(seed: int = 2) -> list[Case]:
    """Short answers; about half are meant to be right."""
    dice = Dice(seed)
    found = []
    for number in range(COUNT):
        gold = dice.one(GQA_ANSWERS)
        said = gold if dice.random() < 0.6 else dice.one(GQA_ANSWERS)
        found.append(Case({"id": str(number), "answer": gold}, dress(dice, said)))
    return found


def textvqa(seed: int = 3) -> list[Case]:
    """Ten annotators who agree more or less, and write in their own way."""
    dice = Dice(seed)
    found = []
    for number in range(COUNT):
        pool = [dice.one(TEXTVQA_ANSWERS) for _ in range(dice.number(1, 4))]
        answers = [dress(dice, dice.one(pool)) for _ in range(10)]
        said = dice.one(answers) if dice.random() < 0.8 else dress(dice, dice.one(TEXTVQA_ANSWERS))
        found.append(Case({"question_id": number, "answers": answers}, said))
    return found


PERCEPTION = listed("existence|count|position|color|posters|celebrity|scene|landmark|artwork|OCR")
COGNITION = listed("commonsense_reasoning|numerical_calculation|text_translation|code_reasoning")


def mme(seed: int = 4) -> list[Case]:
    """Two questions a picture, one yes and one no."""
    dice = Dice(seed)
    found = []
    for number in range(COUNT // 2):
        category = (PERCEPTION + COGNITION)[number % 14]
        for label in ("Yes", "No"):
            said = label if dice.random() < 0.5 else dice.one(YES_NO)
            doc = {"question_id": f"{category}/{number:04d}.png", "category": category, "answer": label}
            found.append(Case(doc, dress(dice, said)))
    return found


def scienceqa(seed: int = 5) -> list[Case]:
    """Two to five choices."""
    dice = Dice(seed)
    found = []
    for number in range(COUNT):
        choices = [dice.one(CHOICES) for _ in range(dice.number(2, 5))]
        index = dice.number(0, len(choices) - 1)
        letter = "ABCDE"[index]
        said = letter if dice.random() < 0.5 else dice.one(LETTERS)
        said = f"{letter}. {choices[index]}" if dice.random() < 0.1 else said
        found.append(Case({"id": str(number), "choices": choices, "answer": index}, dress(dice, said)))
    return found


def seed_image(seed: int = 6) -> list[Case]:
    """Four choices."""
    dice = Dice(seed)
    found = []
    for number in range(COUNT):
        letter = dice.one("ABCD")
        said = letter if dice.random() < 0.5 else dice.one(LETTERS)
        found.append(Case({"question_id": number, "data_type": "image", "answer": letter}, dress(dice, said)))
    return found


GENERATED = {
    "pope": pope,
    "gqa": gqa,
    "textvqa": textvqa,
    "mme": mme,
    "scienceqa": scienceqa,
    "seed_image": seed_image,
}


@dataclass(frozen=True)
class Difference:
    """A known class of answers that are scored otherwise.

    Attributes:
        name: as in the table of docs/lmms_eval.md.
        example: an answer of this class.
        right: who counts it as right ("ours" or "lmms-eval"), the other one does not.
        when: does an answer belong to it?
        count: how many of the generated answers do, and are scored otherwise.
    """

    name: str
    example: str
    right: str
    when: Callable[[dict[str, Any], str], bool]
    count: int


def _bare(text: str) -> str:
    return text.strip().lower()


# Why: docs/lmms_eval.md, which has the same names.
DIFFERENCES: dict[str, tuple[Difference, ...]] = {
    "pope": (
        Difference(
            "neither yes nor no",
            "maybe",
            "ours",
            lambda doc, text: doc["answer"] == "yes" and not re.search("yes|no", _bare(text)),
            1309,
        ),
        Difference(
            "more than the word", "Yes, there is.", "ours", lambda doc, text: _bare(text) not in ("yes", "no"), 1497
        ),
        Difference(
            "NO in capitals",
            "NO",
            "lmms-eval",
            lambda doc, text: doc["answer"] == "no" and text.strip() in ("NO", "nO"),
            44,
        ),
        Difference(
            "NO in capitals where yes is right",
            "NO",
            "ours",
            lambda doc, text: doc["answer"] == "yes" and text.strip() in ("NO", "nO"),
            44,
        ),
    ),
    "gqa": (
        Difference(
            "punctuation",
            "(red)",
            "lmms-eval",
            lambda doc, text: bool(re.search(r"[!-/:-@\[-`{-~]", text.strip().rstrip("."))),
            743,
        ),
    ),
    "textvqa": (),
    "mme": (
        Difference("single letter", "Y", "lmms-eval", lambda doc, text: _bare(text).replace(".", "") in ("y", "n"), 60),
        Difference(
            "full stop before or inside the word",
            "...yes",
            "lmms-eval",
            lambda doc, text: "." in _bare(text)[:4] and _bare(text).replace(".", "") not in ("y", "n"),
            120,
        ),
    ),
    "scienceqa": (
        Difference("small letter", "b", "lmms-eval", lambda doc, text: text.strip() in tuple("abcde"), 358),
        Difference(
            "letter and full stop without a space",
            "B.",
            "lmms-eval",
            lambda doc, text: bool(re.match(r"[A-E]\.([^ ]|$)", text.strip())),
            142,
        ),
        Difference("The answer is X.", "The answer is B.", "ours", lambda doc, text: "The answer is " in text, 99),
    ),
    "seed_image": (
        Difference("small letter", "b", "lmms-eval", lambda doc, text: text.strip() in tuple("abcd"), 439),
        Difference("more than the letter", "B. cat", "lmms-eval", lambda doc, text: len(text.strip()) > 1, 1165),
    ),
}
