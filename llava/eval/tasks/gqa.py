"""GQA, testdev-balanced: short answers, exact match.

Source: the official evaluator's accuracy, binary and open numbers after LLaVA's conversion of the answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.files import Row, as_row, read_json, read_json_lines
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import SHORT_ANSWER, Answer, BadEvalData, Needed, Question, Score, Task, join_answers

ANNOTATIONS = "testdev_balanced_questions.json"


def prediction(text: str) -> str:
    """Turn a model's answer into what is compared with the annotation: lower case, no periods at the end."""
    return text.rstrip(".").lower()


def predictions_file(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """What the official evaluator reads: one object with questionId and prediction for each answer.

    Raises:
        BadEvalData: A question has two answers.
    """
    counts = Counter(str(answer.question_id) for answer in answers)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise BadEvalData(f"gqa: {len(twice)} questions have two answers, first: {', '.join(twice[:5])}")
    return [{"questionId": answer.question_id, "prediction": prediction(answer.text)} for answer in answers]


def is_open(structural: str) -> bool:
    """Whether a structural type (verify, query, choose, logical, compare) asks openly; all others count as binary."""
    return structural == "query"


def gqa_scores(predictions: Mapping[str, str], annotations: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Score converted answers; a question without one is wrong.

    Args:
        predictions: what `prediction` gave, by question id.
        annotations: the official questions by id.

    Returns:
        accuracy, binary and open in percent, over the balanced questions; a part without questions is left out.
    """
    hits: dict[str, list[bool]] = {"accuracy": [], "binary": [], "open": []}
    for key, question in annotations.items():
        if question["isBalanced"]:
            hit = predictions.get(key) == question["answer"]
            hits["accuracy"].append(hit)
            hits["open" if is_open(question["types"]["structural"]) else "binary"].append(hit)
    return {name: 100 * sum(part) / len(part) for name, part in hits.items() if part}


@TASKS.register("gqa")
class Gqa(Task):
    """GQA testdev-balanced; `Question.extra` is empty, scoring reads the annotations."""

    name = "gqa"
    title = "GQA"
    folder = "gqa"

    def annotation_file(self, root: Path) -> Path:
        """The official questions: in data/questions, or where the official evaluator looks for them, in data."""
        beside = self.home(root) / "data" / ANNOTATIONS
        return beside if beside.is_file() else self.home(root) / "data" / "questions" / ANNOTATIONS

    def question_file(self, root: Path) -> Path:
        """LLaVA's questions, which are optional."""
        return self.home(root) / "llava_gqa_testdev_balanced.jsonl"

    def image_folder(self, root: Path) -> Path:
        """Pictures, named <imageId>.jpg."""
        return self.home(root) / "data" / "images"

    def needed(self, root: Path) -> list[Needed]:
        source = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
        return [
            Needed(self.annotation_file(root), "GQA's testdev-balanced questions", f"questions1.2.zip from {source}"),
            Needed(self.image_folder(root), "GQA's pictures", f"images.zip from {source}"),
        ]

    def annotations(self, root: Path) -> dict[str, dict[str, Any]]:
        """Read the balanced questions by id.

        Raises:
            BadEvalData: The file or a record in it is malformed, or no question is balanced.
        """
        path = self.annotation_file(root)
        found = {}
        for key, data in read_json(path, dict).items():
            row = as_row(data, f"{path}, question {key}")
            for field in ("question", "answer", "imageId"):
                row.get(field, str)
            as_row(row.get("types", dict), f"{row.where}, types").get("structural", str)
            if row.get("isBalanced", bool):
                found[key] = row.data
        if not found:
            raise BadEvalData(f"{path}: no question with isBalanced true; use {ANNOTATIONS} of questions1.2.zip")
        return found

    def questions(self, root: Path) -> list[Question]:
        annotations = self.annotations(root)
        path = self.question_file(root)
        if not path.is_file():
            return [
                self._question(root, key, row["question"] + SHORT_ANSWER, row["imageId"] + ".jpg")
                for key, row in annotations.items()
            ]
        found: dict[str, Question] = {}
        for row in read_json_lines(path):
            key = self._known(row, annotations)
            if key in found:
                raise BadEvalData(f"{row.where}: question_id {key} is there twice; get the published file")
            found[key] = self._question(root, row.data["question_id"], row.get("text", str), row.get("image", str))
        lacking = [key for key in annotations if key not in found]
        if lacking:
            raise BadEvalData(
                f"{path}: {len(lacking)} questions of {self.annotation_file(root)} are not in it, first: "
                f"{', '.join(lacking[:5])}; get both files complete, or remove {path.name} to ask all of them"
            )
        return list(found.values())

    def _known(self, row: Row, annotations: Mapping[str, Any]) -> str:
        key = str(row.get("question_id", str, int))
        if key not in annotations:
            raise BadEvalData(f"{row.where}: question_id {key} is no balanced question of {ANNOTATIONS}")
        return key

    def _question(self, root: Path, question_id: str | int, text: str, image: str) -> Question:
        return Question(str(question_id), question_id, text, (self.image_folder(root) / image,))

    def score(self, root: Path, answers: Sequence[Answer]) -> Score:
        found, missing = join_answers(self.questions(root), answers, self.name)
        annotations = self.restrict(root, self.annotations(root))
        predictions = {key: prediction(answer.text) for key, answer in found.items()}
        return Score(
            headline="accuracy",
            metrics=gqa_scores(predictions, annotations),
            expected=len(annotations),
            scored=len(found),
            missing=missing,
        )
