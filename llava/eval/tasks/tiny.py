"""The tiny world's own held-out questions: digits on photographs, seven kinds of question, exact match.

Files: `tiny/heldout.json` and `tiny/images/`, as `python -m playground.tiny.export_eval` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path

from llava.eval.files import as_row, read_json
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import Answer, Needed, Question, Score, Task, join_answers
from llava.sanity import Group, guessing

SOURCE = "python -m playground.tiny.export_eval --out with the folder that --root names"


@TASKS.register("tiny")
class Tiny(Task):
    """Held-out questions of the tiny world, in percent. `Question.category` is the kind, `extra` holds the answer."""

    name = "tiny"
    title = "Tiny"
    folder = "tiny"
    max_new_tokens = 12

    def question_file(self, root: Path) -> Path:
        """Questions and answers."""
        return self.home(root) / "heldout.json"

    def needed(self, root: Path) -> list[Needed]:
        return [
            Needed(self.question_file(root), "the tiny world's held-out questions", SOURCE),
            Needed(self.home(root) / "images" / "heldout", "their pictures", SOURCE),
        ]

    def questions(self, root: Path) -> list[Question]:
        found = []
        path = self.question_file(root)
        for number, data in enumerate(read_json(path, list)):
            row = as_row(data, f"{path}, record {number}")
            name, image, kind, text, answer = (
                row.get(field, str) for field in ("id", "image", "kind", "question", "answer")
            )
            found.append(Question(name, name, text, (self.home(root) / image,), kind, {"answer": answer}))
        return found

    def groups(self, questions: Sequence[Question], score: Score) -> dict[str, Group]:
        """Every kind of question, where guessing is the best constant answer."""
        truths: dict[str, list[str]] = {}
        for question in questions:
            truths.setdefault(question.category, []).append(question.extra["answer"])
        return {
            kind: Group(score.metrics[f"accuracy_{kind}"] / 100 * len(own), len(own), guessing(own))
            for kind, own in truths.items()
        }

    def score(self, root: Path, answers: Sequence[Answer]) -> Score:
        """Share of all questions whose answer is the expected text; `kind_mean` is the mean over the kinds instead."""
        questions = self.questions(root)
        found, missing = join_answers(questions, answers, self.name)
        right: dict[str, list[bool]] = {}
        for question in questions:
            said = found[question.key].text.strip() if question.key in found else None
            right.setdefault(question.category, []).append(said == question.extra["answer"])
        kinds = {kind: 100 * sum(marks) / len(marks) for kind, marks in right.items()}
        share = sum(map(sum, right.values())) / len(questions)
        metrics = {
            "accuracy": 100 * share,
            "accuracy_stderr": 100 * sqrt(share * (1 - share) / len(questions)),
            "kind_mean": sum(kinds.values()) / len(kinds),
        }
        notes = ["exact match over all questions; metrics hold every kind, and kind_mean, the mean over kinds"]
        if self.pictures is not None:
            notes.append(f"{len(questions)} questions about {len({q.visuals for q in questions})} pictures, not all")
        return Score(
            headline="accuracy",
            metrics=metrics | {f"accuracy_{kind}": value for kind, value in kinds.items()},
            expected=len(questions),
            scored=len(found),
            missing=missing,
            notes=notes,
        )
