"""TextVQA's answer normalisation and soft score, as M4C and the EvalAI server define them.

Published numbers depend on the oddities that the comments name, so they stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ANNOTATORS = 10
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COUNTING = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(value) for value, word in enumerate(_COUNTING)} | {"none": "0"}
ARTICLES = ("a", "an", "the")

# A period that no digit follows. The official pattern means to look behind as well, but does not, and its flag sits
# where the count belongs, so that it stops after 32 periods.
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32

# Contractions by ending, without most of those whose misspelling is another word (were, well, hell, id).
_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "I could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "I he it she somebody someone something there they we who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'m": "I",
}
_OTHERS = "ma'am o'clock 'twas y'all y'all'll y'all'd've 'ow's'at"
# Of the official table's entries two change nothing, and one works backwards.
_ODD = {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


def _contractions() -> Iterator[tuple[str, str]]:
    """Every spelling of a contraction in which exactly one apostrophe is left out, and the right one."""
    words = [stem + ending for ending, stems in _ENDINGS.items() for stem in stems.split()]
    for word in words + _OTHERS.split():
        for place, letter in enumerate(word):
            if letter == "'":
                yield word[:place] + word[place + 1 :], word


CONTRACTIONS = dict(_contractions()) | _ODD


def normalise(text: str) -> str:
    """Bring an answer into the form in which TextVQA compares answers.

    Lower case, no commas and question marks, punctuation removed or made a space, number words up to ten as digits, no
    articles, apostrophes put into contractions, single spaces.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in PUNCTUATION:
        # What decides is the text before any mark is replaced; one mark beside a space removes all of its kind.
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space else " ")
    cleaned = _PERIOD.sub("", cleaned, count=_MAX_PERIODS)
    words = [NUMBERS.get(word, word) for word in cleaned.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def answer_scores(answers: Sequence[str]) -> dict[str, float]:
    """Score every distinct answer of the annotators, normalised: 0 to 1.

    An answer's score is the mean, over the ten ways to leave one annotator out, of min(1, agreeing annotators / 3).

    Raises:
        ValueError: There are not ten answers.
    """
    if len(answers) != ANNOTATORS:
        raise ValueError(f"TextVQA's score needs {ANNOTATORS} annotators' answers, got {len(answers)}")
    given = [normalise(answer) for answer in answers]
    scores = {}
    for answer in set(given):
        count = given.count(answer)
        scores[answer] = sum(min(1.0, (count - (other == answer)) / 3) for other in given) / len(given)
    return scores


def soft_score(prediction: str, answers: Sequence[str]) -> float:
    """Score one prediction against ten annotators' answers: 0 to 1.

    Raises:
        ValueError: There are not ten answers.
    """
    return answer_scores(answers).get(normalise(prediction), 0.0)


class EvalAIAnswerProcessor:
    """`normalise` under the name and in the form that LLaVA's scripts import."""

    def __call__(self, item: str) -> str:
        """Normalise one answer."""
        return normalise(item)


class TextVQAAccuracyEvaluator:
    """`soft_score` over many predictions, under the name that LLaVA's scripts import."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Mean score, 0 to 1, of entries with `pred_answer` and the ten `gt_answers`.

        Raises:
            ValueError: The list is empty, or an entry has not ten answers.
        """
        if not pred_list:
            raise ValueError("there are no predictions to score")
        scores = [soft_score(entry["pred_answer"], entry["gt_answers"]) for entry in pred_list]
        return sum(scores) / len(scores)
