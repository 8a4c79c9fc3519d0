"""ScienceQA, test split: multiple choice with context, about half of it with a picture.

Source: lupantech/ScienceQA, the layout of LLaVA's published question file ("CQM-A") and LLaVA's scoring. 69.5 for
LLaVA-1.5-7B is the accuracy over all questions, 66.8 that over questions with a picture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.files import Row, as_row, read_json
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import LETTER_ANSWER, Answer, BadEvalData, Needed, Question, Score, Task, join_answers

OPTIONS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"
SOURCE = "data/scienceqa of https://github.com/lupantech/ScienceQA"

_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def parse_choice(text: str, options: Sequence[str] = OPTIONS) -> str:
    """Read the letter that an answer chooses, or "FAILED".

    A lone letter, a letter followed by ". ", or one sentence "The answer is X" with any character after the letter.
    """
    if text in list(options):
        return text
    if len(text) >= 3 and text[0] in list(options) and text[1:3] == ". ":
        return text[0]
    return sentence_choice(text)


def sentence_choice(text: str) -> str:
    """Read the letter in an answer's one sentence "The answer is X", or "FAILED"."""
    letters = _SENTENCE.findall(text)
    return letters[0] if len(letters) == 1 else FAILED


def choice_index(letter: str, choices: int, options: Sequence[str] = OPTIONS) -> int:
    """The place of a letter among the first `choices` options, or -1."""
    known = list(options[:choices])
    return known.index(letter) if letter in known else -1


def is_right(text: str, problem: Mapping[str, Any], options: Sequence[str] = OPTIONS) -> bool:
    """Whether an answer chooses the problem's right option."""
    return choice_index(parse_choice(text, options), len(problem["choices"]), options) == problem["answer"]


def scienceqa_scores(
    texts: Mapping[str, str], problems: Mapping[str, Mapping[str, Any]], options: Sequence[str] = OPTIONS
) -> dict[str, float]:
    """Score answers; a question without one is wrong.

    Args:
        texts: answers by question id.
        problems: the split's problems by id.
        options: the options' letters.

    Returns:
        accuracy and img_accuracy (questions with a picture) in percent; a part without questions is left out.
    """
    hits = {key: is_right(texts.get(key, FAILED), problem, options) for key, problem in problems.items()}
    parts = {
        "accuracy": list(hits.values()),
        "img_accuracy": [hit for key, hit in hits.items() if problems[key]["image"] is not None],
    }
    return {name: 100 * sum(part) / len(part) for name, part in parts.items() if part}


def cqm_a_record(key: str, problem: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a problem to a record of LLaVA's published question file.

    The question's text is a line "Context: hint" where there is a hint, the question, and a line "A. choice" for each
    choice; in front a line with the image mark where there is a picture. The answer is the bare letter.
    """
    lines = [DEFAULT_IMAGE_TOKEN] if problem["image"] is not None else []
    if problem["hint"].strip():
        lines.append(f"Context: {problem['hint']}")
    lines.append(problem["question"])
    lines += [f"{letter}. {choice}" for letter, choice in zip(OPTIONS, problem["choices"], strict=False)]
    picture = {"image": f"{key}/{problem['image']}"} if problem["image"] is not None else {}
    turns = [
        {"from": "human", "value": "\n".join(lines)},
        {"from": "gpt", "value": OPTIONS[problem["answer"]]},
    ]
    return {"id": key, **picture, "conversations": turns}


def read_problems(folder: Path, split: str = "test") -> dict[str, dict[str, Any]]:
    """Read a split's problems by id, in the split's order.

    Args:
        folder: Has `pid_splits.json` and `problems.json`.
        split: A split of `pid_splits.json`.

    Raises:
        BadEvalData: A file or a problem is malformed, or the split is unknown, empty, repeats an id, or names a problem
            that is not there.
    """
    splits = Row(read_json(folder / "pid_splits.json", dict), str(folder / "pid_splits.json"))
    keys = splits.get(split, list)
    path = folder / "problems.json"
    problems = read_json(path, dict)
    found: dict[str, dict[str, Any]] = {}
    for key in keys:
        if not isinstance(key, str) or key not in problems:
            raise BadEvalData(f"{splits.where}, {split}: id {key!r} is not in {path}; get both files of one version")
        if key in found:
            raise BadEvalData(f"{splits.where}, {split}: id {key} is there twice; get the published file")
        found[key] = _checked(as_row(problems[key], f"{path}, problem {key}"))
    if not found:
        raise BadEvalData(f"{splits.where}: split {split!r} is empty; get the published file")
    return found


def _checked(row: Row) -> dict[str, Any]:
    choices = row.get("choices", list)
    if not 1 <= len(choices) <= len(OPTIONS) or not all(isinstance(choice, str) for choice in choices):
        raise BadEvalData(f"{row.where}: field 'choices' must hold 1 to {len(OPTIONS)} texts, got {len(choices)}")
    answer = row.get("answer", int)
    if not 0 <= answer < len(choices):
        raise BadEvalData(f"{row.where}: field 'answer' is {answer}, but there are {len(choices)} choices")
    row.get("question", str)
    row.get("hint", str)
    row.get("image", str, type(None))
    return row.data


@TASKS.register("scienceqa")
class ScienceQa(Task):
    """ScienceQA, questions with and without a picture."""

    name = "scienceqa"
    title = "SQA"
    folder = "scienceqa"
    max_new_tokens = 1024

    def question_file(self, root: Path) -> Path:
        """LLaVA's questions, which are optional."""
        return self.home(root) / "llava_test_CQM-A.json"

    def image_folder(self, root: Path) -> Path:
        """Pictures, named <id>/image.png."""
        return self.home(root) / "images" / "test"

    def needed(self, root: Path) -> list[Needed]:
        return [
            Needed(self.home(root) / "problems.json", "ScienceQA's problems", SOURCE),
            Needed(self.home(root) / "pid_splits.json", "ScienceQA's splits", SOURCE),
            Needed(self.image_folder(root), "ScienceQA's test pictures", "tools/download.sh of the same repository"),
        ]

    def questions(self, root: Path) -> list[Question]:
        problems = read_problems(self.home(root))
        path = self.question_file(root)
        if not path.is_file():
            records = [cqm_a_record(key, problem) for key, problem in problems.items()]
            return [self._question(root, as_row(record, f"problem {record['id']}")) for record in records]
        found: dict[str, Question] = {}
        for index, record in enumerate(read_json(path, list)):
            row = as_row(record, f"{path}, record {index}")
            question = self._question(root, row)
            if question.key not in problems:
                raise BadEvalData(f"{row.where}: id {question.key} is not in the test split of pid_splits.json")
            if question.key in found:
                raise BadEvalData(f"{row.where}: id {question.key} is there twice; get the published file")
            if bool(question.visuals) != (problems[question.key]["image"] is not None):
                raise BadEvalData(
                    f"{row.where}: id {question.key} has {'a' if question.visuals else 'no'} picture, unlike "
                    "problems.json; get both files of one version"
                )
            found[question.key] = question
        lacking = [key for key in problems if key not in found]
        if lacking:
            raise BadEvalData(
                f"{path}: {len(lacking)} ids of the test split are not in it, first: {', '.join(lacking[:5])}; "
                f"get both files complete, or remove {path.name} to ask all of them"
            )
        return list(found.values())

    def _question(self, root: Path, row: Row) -> Question:
        key = row.get("id", str)
        turns = row.get("conversations", list)
        text = as_row(turns[0] if turns else None, f"{row.where}, conversations[0]").get("value", str)
        visuals = (self.image_folder(root) / row.get("image", str),) if "image" in row.data else ()
        return Question(key, key, text.replace(DEFAULT_IMAGE_TOKEN, "").strip() + LETTER_ANSWER, visuals)

    def score(self, root: Path, answers: Sequence[Answer]) -> Score:
        problems = self.restrict(root, read_problems(self.home(root)))
        found, missing = match_answers(problems, answers)
        note = "accuracy is over the whole test split, img_accuracy over its questions with a picture"
        return _score("accuracy", problems, found, missing, note)

    def stored_prompt(self, question: Question) -> str:
        """With the image mark in front where there is a picture, by which LLaVA's scorer picks those questions."""
        return f"{DEFAULT_IMAGE_TOKEN}\n{question.text}" if question.visuals else question.text

    def open_visual(self, path: Path) -> Image.Image:
        """Open a picture so that padding and conversion give what LLaVA's script for ScienceQA gets.

        It hands over the file as opened. A palette picture is therefore padded as one, which replaces its palette, and
        stays one here. All other modes come out as RGB without their transparency, which newer versions of
        transformers would blend with white instead.

        Raises:
            BadEvalData: it cannot be opened; names it.
        """
        return self._read(path, keep_palette=True)


def match_answers(problems: Mapping[str, Any], answers: Sequence[Answer]) -> tuple[dict[str, Answer], list[str]]:
    """Match answers to problems by id; returns answers by id, and the ids that have none.

    Raises:
        BadEvalData: An answer belongs to no problem, or a problem has two answers.
    """
    return join_answers([Question(key, key, "") for key in problems], answers, "scienceqa")


def _score(
    headline: str, problems: Mapping[str, Any], found: Mapping[str, Answer], missing: list[str], note: str
) -> Score:
    texts = {key: answer.text for key, answer in found.items()}
    return Score(
        headline=headline,
        metrics=scienceqa_scores(texts, problems),
        expected=len(problems),
        scored=len(found),
        missing=missing,
        unparsed=sum(parse_choice(text) == FAILED for text in texts.values()),
        notes=[note],
    )


@TASKS.register("scienceqa_img")
class ScienceQaImg(ScienceQa):
    """The questions with a picture only; answers to the others are left aside."""

    name = "scienceqa_img"
    title = "SQA-IMG"

    def questions(self, root: Path) -> list[Question]:
        pictured = _pictured(read_problems(self.home(root)))
        return [question for question in super().questions(root) if question.key in pictured]

    def score(self, root: Path, answers: Sequence[Answer]) -> Score:
        problems = self.restrict(root, read_problems(self.home(root)))
        pictured = _pictured(problems)
        found, missing = match_answers(problems, answers)
        kept = {key: answer for key, answer in found.items() if key in pictured}
        lacking = [key for key in missing if key in pictured]
        score = _score("img_accuracy", pictured, kept, lacking, "over the test split's questions with a picture")
        score.metrics.pop("accuracy")
        return score


def _pictured(problems: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The problems with a picture.

    Raises:
        BadEvalData: There are none.
    """
    found = {key: problem for key, problem in problems.items() if problem["image"] is not None}
    if not found:
        raise BadEvalData("scienceqa_img: no problem of the test split has a picture; get problems.json again")
    return found
