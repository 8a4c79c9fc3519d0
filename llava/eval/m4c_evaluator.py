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
_GROUPED_DIGITS = re.compile(r"(?<=\d),+(?=\d)")

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
    text = plain_letters(text).replace("\n", " ").replace("\t", " ").strip()
    return plain_words(without_punctuation(text))


def plain_letters(text: str) -> str:
    """First step of `normalise`: lower case, no commas and question marks, a space before 's."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def without_punctuation(text: str) -> str:
    """Second step of `normalise`: every mark removed or made a space, periods removed that no digit follows."""
    # A comma between digits removes every mark; the first step leaves no comma, so only callers from outside see this.
    grouped = _GROUPED_DIGITS.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        # What decides is the text before any mark is replaced; one mark beside a space removes all of its kind.
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or grouped else " ")
    return _PERIOD.sub("", cleaned, count=_MAX_PERIODS)


def plain_words(text: str) -> str:
    """Third step of `normalise`: lower case, number words as digits, no articles, contractions, single spaces."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
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
    """`normalise` and its steps under the names and in the form that LLaVA's scripts import."""

    PUNCTUATIONS = tuple(PUNCTUATION)
    CONTRACTIONS = CONTRACTIONS
    NUMBER_MAP = NUMBERS
    ARTICLES = ARTICLES
    PERIOD_STRIP = _PERIOD
    COMMA_STRIP = _GROUPED_DIGITS

    def word_tokenize(self, word: str) -> str:
        """See `plain_letters`."""
        return plain_letters(word)

    def process_punctuation(self, in_text: str) -> str:
        """See `without_punctuation`."""
        return without_punctuation(in_text)

    def process_digit_article(self, in_text: str) -> str:
        """See `plain_words`."""
        return plain_words(in_text)

    def __call__(self, item: str) -> str:
        """Normalise one answer."""
        return normalise(item)


def _mean(scores: Sequence[float]) -> float:
    if not scores:
        raise ValueError("there are no predictions to score")
    return sum(scores) / len(scores)


class TextVQAAccuracyEvaluator:
    """`soft_score` over many predictions, under the name that LLaVA's scripts import."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def _compute_answer_scores(self, raw_answers: Sequence[str]) -> dict[str, float]:
        """See `answer_scores`."""
        return answer_scores(raw_answers)

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Mean score, 0 to 1, of entries with `pred_answer` and the ten `gt_answers`.

        Raises:
            ValueError: The list is empty, or an entry has not ten answers.
        """
        return _mean([soft_score(entry["pred_answer"], entry["gt_answers"]) for entry in pred_list])


class STVQAAccuracyEvaluator:
    """ST-VQA's accuracy: the normalised answer is one of the normalised references."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Mean, 0 to 1, over entries with `pred_answer` and `gt_answers`.

        Raises:
            ValueError: The list is empty.
        """
        clean = self.answer_processor
        return _mean([float(clean(entry["pred_answer"]) in map(clean, entry["gt_answers"])) for entry in pred_list])


def edit_distance(first: Sequence, second: Sequence) -> int:
    """Levenshtein's distance: insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(second) + 1))
    for number, item in enumerate(first, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(second, start=1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (item != other))
    return row[-1]


class STVQAANLSEvaluator:
    """ST-VQA's ANLS: one minus the edit distance over the longer length, 0 where that is below one half."""

    def __init__(self) -> None:
        self.get_edit_distance = edit_distance

    def get_anls(self, s1: str, s2: str) -> float:
        """Similarity of two answers, 0 or 0.5 to 1; two empty ones are alike."""
        s1, s2 = s1.lower().strip(), s2.lower().strip()
        longest = max(len(s1), len(s2))
        similarity = 1 - self.get_edit_distance(s1, s2) / longest if longest else 1.0
        return similarity if similarity >= 0.5 else 0.0

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Mean, over entries with `pred_answer` and `gt_answers`, of the best similarity to a reference.

        Raises:
            ValueError: The list is empty.
        """
        return _mean(
            [max(self.get_anls(entry["pred_answer"], gt) for gt in entry["gt_answers"]) for entry in pred_list]
        )


class TextCapsBleu4Evaluator:
    """TextCaps' BLEU-4, by the package pycocoevalcap, whose tokenizer needs Java.

    Raises:
        ImportError: The package is not installed.
    """

    def __init__(self) -> None:
        try:
            from pycocoevalcap.bleu.bleu import Bleu  # pyright: ignore[reportMissingImports]
            from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "TextCaps' BLEU-4 needs the package pycocoevalcap: pip install pycocoevalcap (and a Java runtime)"
            ) from error
        self.tokenizer = PTBTokenizer()
        self.scorer = Bleu(4)

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """BLEU-4, 0 to 1, of entries with `pred_answer` and `gt_answers`."""
        references = {n: [{"caption": text} for text in entry["gt_answers"]] for n, entry in enumerate(pred_list)}
        captions = {n: [{"caption": entry["pred_answer"]}] for n, entry in enumerate(pred_list)}
        tokenize = self.tokenizer.tokenize
        return self.scorer.compute_score(tokenize(references), tokenize(captions))[0][3]
