"""TextVQA, validation split: questions about text in pictures, with and without OCR tokens in the prompt.

Source: TextVQA 0.5.1, LLaVA's prompts, M4C's soft score. LLaVA's rows carry the picture's id as question_id, so that an
answer is matched by that id and the question in its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from llava.eval.files import Row, as_row, read_json, read_json_lines, short
from llava.eval.m4c_evaluator import ANNOTATORS, soft_score
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import SHORT_ANSWER, Answer, BadEvalData, Needed, Question, Score, Task, join_answers

OCR_LINE = "Reference OCR token: "
PAGE = "https://textvqa.org/dataset"
_FIRST_LAYOUT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)

Pair = tuple[str, str]


def question_of_prompt(prompt: str) -> str:
    """Recover the question from a prompt, in lower case.

    Known layouts: question / OCR line / instruction, the same with the OCR line first, question / instruction, and the
    older "OCR tokens: ... Question: ... Short answer:".

    Raises:
        BadEvalData: The prompt has none of them.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = _FIRST_LAYOUT.search(prompt)
        if match:
            return match.group(1).lower()
    elif OCR_LINE in prompt and len(lines) == 3:
        return lines[prompt.startswith(OCR_LINE.rstrip())].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise BadEvalData(
        f"no question can be recovered from the prompt {short(prompt)}; it must be the question, a line "
        f"'{OCR_LINE}...' if OCR was used, and the instruction"
    )


def build_prompt(question: str, ocr_tokens: Sequence[str] | None) -> str:
    """LLaVA's prompt: the question with only its first letter large, the OCR line (if empty too), the instruction."""
    ocr = "" if ocr_tokens is None else f"\n{OCR_LINE}{', '.join(ocr_tokens)}"
    return question.capitalize() + ocr + SHORT_ANSWER


def read_annotations(path: Path) -> dict[str, Row]:
    """Read the official annotation file: rows by question_id, in the file's order.

    Raises:
        BadEvalData: A row is malformed or has not ten answers, or a question_id is there twice.
    """
    found: dict[str, Row] = {}
    data = Row(read_json(path, dict), str(path)).get("data", list)
    for index, item in enumerate(data):
        row = as_row(item, f"{path}, data[{index}]")
        key = str(row.get("question_id", int, str))
        row = replace(row, where=f"{row.where} (question_id {key})")
        row.get("image_id", str)
        row.get("question", str)
        answers = row.get("answers", list)
        if len(answers) != ANNOTATORS or not all(isinstance(answer, str) for answer in answers):
            raise BadEvalData(
                f"{row.where}: field 'answers' must be a list of {ANNOTATORS} texts, got {short(answers)}; the test "
                "split has none, use TextVQA_0.5.1_val.json"
            )
        if key in found:
            raise BadEvalData(f"{row.where}: question_id {key} is there twice; get the published file")
        found[key] = row
    if not found:
        raise BadEvalData(f"{path}: 'data' holds no questions; get the published file")
    return found


def pair_of(row: Row) -> Pair:
    """What LLaVA's scripts know a question by: the picture's id and the question in lower case."""
    return row.data["image_id"], row.data["question"].lower()


def ground_truth(annotations: Mapping[str, Row]) -> dict[str, list[str]]:
    """Annotators' answers by question_id; of questions that are asked twice about a picture the last row counts."""
    by_pair = {pair_of(row): row.data["answers"] for row in annotations.values()}
    return {key: by_pair[pair_of(row)] for key, row in annotations.items()}


def textvqa_scores(predictions: Mapping[str, str], truth: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Soft score, 0 to 1, of every prediction; both are by question_id."""
    return {key: soft_score(text, truth[key]) for key, text in predictions.items()}


class _Pairs:
    """Hands out the question_ids of a pair one by one, in the annotations' order."""

    def __init__(self, annotations: Mapping[str, Row]) -> None:
        self._left: dict[Pair, list[str]] = {}
        for key, row in annotations.items():
            self._left.setdefault(pair_of(row), []).append(key)

    def take(self, pair: Pair) -> str:
        """The next question_id, the last one again when all are taken, or a description of an unknown pair."""
        keys = self._left.get(pair)
        if keys is None:
            return f"{pair[0]} {pair[1]!r}"
        return keys.pop(0) if len(keys) > 1 else keys[0]


def match_answers(annotations: Mapping[str, Row], answers: Sequence[Answer]) -> tuple[dict[str, Answer], list[str]]:
    """Match answers to annotations; returns answers by question_id, and the question_ids that have none.

    Raises:
        BadEvalData: An answer belongs to no question, its prompt cannot be read, or a question has two answers.
    """
    pairs = _Pairs(annotations)
    keyed = []
    for answer in answers:
        if not answer.key:
            try:
                question = question_of_prompt(answer.prompt)
            except BadEvalData as error:
                raise BadEvalData(f"textvqa: answer with question_id {answer.question_id}: {error}") from error
            answer = replace(answer, key=pairs.take((str(answer.question_id), question)))
        keyed.append(answer)
    questions = [Question(key, row.data["image_id"], row.data["question"]) for key, row in annotations.items()]
    return join_answers(questions, keyed, "textvqa")


@TASKS.register("textvqa")
class TextVqa(Task):
    """TextVQA with OCR tokens in the prompt, as in LLaVA's table."""

    name = "textvqa"
    title = "TextVQA"
    folder = "textvqa"
    ocr: ClassVar[bool] = True

    def annotation_file(self, root: Path) -> Path:
        """Questions and annotators' answers."""
        return self.home(root) / "TextVQA_0.5.1_val.json"

    def question_file(self, root: Path) -> Path:
        """LLaVA's questions, with OCR tokens."""
        return self.home(root) / "llava_textvqa_val_v051_ocr.jsonl"

    def ocr_file(self, root: Path) -> Path:
        """The OCR tokens that TextVQA publishes."""
        return self.home(root) / "TextVQA_Rosetta_OCR_v0.2_val.json"

    def image_folder(self, root: Path) -> Path:
        """Pictures of training and validation split."""
        return self.home(root) / "train_images"

    def needed(self, root: Path) -> list[Needed]:
        needed = [
            Needed(
                self.annotation_file(root), "TextVQA's questions and answers", f"TextVQA_0.5.1_val.json from {PAGE}"
            ),
            Needed(self.image_folder(root), "TextVQA's pictures", f"train_val_images.zip from {PAGE}"),
        ]
        if self.ocr and not self._has_tokens(root):
            source = f"eval.zip of LLaVA; or {self.ocr_file(root).name} from {PAGE} beside it; or run textvqa_no_ocr"
            needed.append(Needed(self.question_file(root), "LLaVA's questions with OCR tokens", source))
        return needed

    def _has_tokens(self, root: Path) -> bool:
        if self.question_file(root).is_file() or self.ocr_file(root).is_file():
            return True
        annotations = self.annotation_file(root)
        return annotations.is_file() and b'"ocr_tokens"' in annotations.read_bytes()

    def questions(self, root: Path) -> list[Question]:
        annotations = read_annotations(self.annotation_file(root))
        if self.question_file(root).is_file():
            return self._published(root, annotations)
        tokens = self._tokens(root, annotations) if self.ocr else {}
        return [
            self._question(root, key, row.data["image_id"], build_prompt(row.data["question"], tokens.get(key)))
            for key, row in annotations.items()
        ]

    def _published(self, root: Path, annotations: Mapping[str, Row]) -> list[Question]:
        """LLaVA's questions, in their order."""
        path = self.question_file(root)
        pairs = _Pairs(annotations)
        found: dict[str, Question] = {}
        for row in read_json_lines(path):
            image_id, text = row.get("question_id", str), row.get("text", str)
            try:
                key = pairs.take((image_id, question_of_prompt(text)))
            except BadEvalData as error:
                raise BadEvalData(f"{row.where}: {error}") from error
            if key not in annotations:
                raise BadEvalData(f"{row.where}: {key} is no question of {self.annotation_file(root)}")
            if key in found:
                raise BadEvalData(f"{row.where}: {pair_of(annotations[key])} is there twice; get the published file")
            if not self.ocr:
                text = build_prompt(annotations[key].data["question"], None)
            found[key] = self._question(root, key, image_id, text, row.get("image", str))
        lacking = [key for key in annotations if key not in found]
        if lacking:
            raise BadEvalData(
                f"{path}: {len(lacking)} questions of {self.annotation_file(root)} are not in it, first: question_id "
                f"{', '.join(lacking[:5])}; get both files complete"
            )
        return list(found.values())

    def _question(self, root: Path, key: str, image_id: str, text: str, image: str = "") -> Question:
        return Question(key, image_id, text, (self.image_folder(root) / (image or f"{image_id}.jpg"),))

    def _tokens(self, root: Path, annotations: Mapping[str, Row]) -> dict[str, list[str]]:
        """OCR tokens by question_id: from the annotations where they hold them, or from TextVQA's OCR file."""
        if all("ocr_tokens" in row.data for row in annotations.values()):
            return {key: _texts(row) for key, row in annotations.items()}
        path = self.ocr_file(root)
        data = Row(read_json(path, dict), str(path)).get("data", list)
        rows = [as_row(item, f"{path}, data[{index}]") for index, item in enumerate(data)]
        by_image = {row.get("image_id", str): row for row in rows}
        found = {}
        for key, annotation in annotations.items():
            image_id = annotation.data["image_id"]
            if image_id not in by_image:
                raise BadEvalData(
                    f"{path}: no row for image_id {image_id}, which {annotation.where} asks about; get the file for "
                    "the validation split"
                )
            found[key] = _texts(by_image[image_id])
        return found

    def score(self, root: Path, answers: Sequence[Answer]) -> Score:
        annotations = self.restrict(root, read_annotations(self.annotation_file(root)))
        found, missing = match_answers(annotations, answers)
        scores = textvqa_scores({key: answer.text for key, answer in found.items()}, ground_truth(annotations))
        note = "with OCR tokens in the prompt" if self.ocr else "without OCR tokens, not comparable with LLaVA's table"
        return Score(
            headline="accuracy",
            metrics={"accuracy": 100 * sum(scores.values()) / len(annotations)},
            expected=len(annotations),
            scored=len(found),
            missing=missing,
            notes=[note],
        )


def _texts(row: Row) -> list[str]:
    """The field `ocr_tokens`, checked."""
    tokens = row.get("ocr_tokens", list)
    if not all(isinstance(token, str) for token in tokens):
        raise BadEvalData(f"{row.where}: field 'ocr_tokens' must be a list of texts, got {short(tokens)}")
    return tokens


@TASKS.register("textvqa_no_ocr")
class TextVqaNoOcr(TextVqa):
    """TextVQA without OCR tokens, as lmms-eval asks by default."""

    name = "textvqa_no_ocr"
    title = "TextVQA (no OCR)"
    ocr = False
