"""POPE: is an object in the picture? Three sets of yes/no questions about COCO pictures.

Source: labels of AoiDragon/POPE, questions and scoring of LLaVA's `eval_pope`. The published number is the mean of the
three F1 scores. LLaVA's script matches answers with labels by position; here they are matched by category, picture and
question, which gives the same on the official order and cannot shift.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.files import read_json_lines
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import SHORT_ANSWER, Answer, BadEvalData, Needed, Question, Score, Task, join_answers

COMMIT = "e3e39262c85a6a83f26cf5094022a782cb0df58d"
QUESTION_FILE = "llava_pope_test.jsonl"

# LLaVA's order of the sets, and what its question file adds to a row's place in its set (from 1) to form the id.
CATEGORIES = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}

_VERSION = f"LLaVA's question file belongs to AoiDragon/POPE at commit {COMMIT}"
_NO = {"No", "not", "no"}
_OPPOSITE = {"yes": "no", "no": "yes"}


def parse_pope(text: str) -> str:
    """Read an answer by the official rule; returns "yes" or "no".

    Only the text before the first full stop counts. It means no when one of its words is No, not or no, and yes
    otherwise, whatever it says.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if _NO.intersection(words) else "yes"


def says_neither(text: str) -> bool:
    """Does the official rule take this for a yes although it has no such word?"""
    return parse_pope(text) == "yes" and "yes" not in text.lower()


@dataclass(frozen=True)
class PopeCounts:
    """Outcomes of one set of questions; yes is the positive class. Fractions with an empty denominator are 0."""

    tp: int = 0
    fp: int = 0
    tn: int = 0
    fn: int = 0

    @property
    def total(self) -> int:
        """How many questions."""
        return self.tp + self.fp + self.tn + self.fn

    @property
    def accuracy(self) -> float:
        """Right answers among all."""
        return _ratio(self.tp + self.tn, self.total)

    @property
    def precision(self) -> float:
        """Right answers among those that say yes."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Found objects among those that are there."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        """Answers that say yes among all."""
        return _ratio(self.tp + self.fp, self.total)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def pope_metrics(pairs: Iterable[tuple[str, str]]) -> PopeCounts:
    """Count outcomes of (label, answer) pairs, both "yes" or "no".

    Raises:
        ValueError: one is something else.
    """
    counts = {("yes", "yes"): 0, ("no", "yes"): 0, ("no", "no"): 0, ("yes", "no"): 0}
    for pair in pairs:
        if tuple(pair) not in counts:
            raise ValueError(f"a pair must be (label, answer) of 'yes' and 'no', got {pair!r}")
        counts[pair] += 1
    return PopeCounts(*counts.values())


@dataclass
class PopeResult:
    """Scored answers: outcomes per category, keys without an answer (wrong), answers with neither a yes nor a no."""

    counts: dict[str, PopeCounts]
    missing: list[str] = field(default_factory=list)
    unparsed: int = 0

    def mean(self, metric: str) -> float:
        """A metric's unweighted mean over the categories, as a fraction."""
        return sum(getattr(counts, metric) for counts in self.counts.values()) / len(self.counts)


def bare_question(text: str) -> str:
    """The question without the line that asks for a short answer and without POPE's own misspelling "imange"."""
    return " ".join(text.strip().split("\n")[0].replace("imange", "image").split())


def label_file(folder: Path, category: str) -> Path:
    """Where the labels of a category are."""
    return folder / f"coco_pope_{category}.json"


def read_questions(folder: Path, question_file: Path | None, images: Path) -> list[Question]:
    """Read questions with their labels (`extra["label"]`).

    Args:
        folder: Has `coco_pope_<category>.json` for every category.
        question_file: LLaVA's question file; without it the questions are built in its order from the label files.
        images: Folder of the pictures.

    Raises:
        BadEvalData: A row is malformed, an id repeats, or question file and label files do not belong together.
    """
    labels = {category: _read_labels(label_file(folder, category)) for category in CATEGORIES}
    if question_file is None:
        return [
            _question(CATEGORIES[category] + number, row, row["text"].strip() + SHORT_ANSWER, category, images)
            for category, rows in labels.items()
            for number, row in enumerate(rows, 1)
        ]
    return _with_labels(_read_question_file(question_file), labels, folder, images)


def _read_labels(path: Path) -> list[dict[str, str]]:
    rows = []
    for row in read_json_lines(path):
        found = {name: row.get(name, str) for name in ("image", "text", "label")}
        if found["label"] not in _OPPOSITE:
            raise BadEvalData(f"{row.where}: 'label' must be 'yes' or 'no', found {found['label']!r}")
        rows.append(found)
    if not rows:
        raise BadEvalData(f"{path} has no rows; get it from AoiDragon/POPE at commit {COMMIT}")
    return rows


def _read_question_file(path: Path) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for row in read_json_lines(path):
        question_id = row.get("question_id", int, str)
        if str(question_id) in rows:
            raise BadEvalData(f"{row.where}: question_id {question_id!r} was used before; ids must be unique")
        found = {name: row.get(name, str) for name in ("image", "text", "category")}
        if found["category"] not in CATEGORIES:
            raise BadEvalData(
                f"{row.where}: 'category' must be one of {', '.join(CATEGORIES)}, found {found['category']!r}"
            )
        rows[str(question_id)] = {**found, "question_id": question_id, "where": row.where}
    return list(rows.values())


def _with_labels(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, Sequence[Mapping[str, str]]], folder: Path, images: Path
) -> list[Question]:
    """Match by category, picture and question; what is asked twice gets its labels in the files' order."""
    waiting: dict[tuple[str, str, str], list[str]] = {}
    for category, known in labels.items():
        asked = sum(row["category"] == category for row in rows)
        if asked != len(known):
            raise BadEvalData(
                f"{label_file(folder, category)} has {len(known)} rows, but {QUESTION_FILE} asks {asked} questions of "
                f"category {category!r}; {_VERSION}"
            )
        for row in known:
            waiting.setdefault((category, row["image"], bare_question(row["text"])), []).append(row["label"])
    questions = []
    for row in rows:
        category, asked = row["category"], bare_question(row["text"])
        match = waiting.get((category, row["image"], asked))
        if not match:
            raise BadEvalData(
                f"{row['where']} (question_id {row['question_id']!r}): {label_file(folder, category)} has no row for "
                f"{row['image']} with {asked!r}; {_VERSION}"
            )
        label = match.pop(0)
        questions.append(_question(row["question_id"], {**row, "label": label}, row["text"], category, images))
    return questions


def _question(question_id: str | int, row: Mapping[str, str], text: str, category: str, images: Path) -> Question:
    return Question(
        key=str(question_id),
        question_id=question_id,
        text=text,
        visuals=(images / row["image"],),
        category=category,
        extra={"label": row["label"]},
    )


def score_answers(questions: Sequence[Question], answers: Sequence[Answer]) -> PopeResult:
    """Score answers in any order; a question without an answer counts as answered wrongly.

    Raises:
        BadEvalData: an answer belongs to no question, belongs to another question than its id says, or comes twice.
    """
    found, missing = join_answers(questions, answers, "pope")
    result = PopeResult({}, missing)
    pairs: dict[str, list[tuple[str, str]]] = {category: [] for category in CATEGORIES}
    for question in questions:
        label = question.extra["label"]
        answer = found.get(question.key)
        if answer is None:
            pairs[question.category].append((label, _OPPOSITE[label]))
            continue
        if answer.prompt and bare_question(answer.prompt) != bare_question(question.text):
            raise BadEvalData(
                f"pope: the answer to question_id {question.question_id!r} was asked {bare_question(answer.prompt)!r}, "
                f"the benchmark asks {bare_question(question.text)!r}; the answers belong to another version of POPE"
            )
        result.unparsed += says_neither(answer.text)
        pairs[question.category].append((label, parse_pope(answer.text)))
    result.counts = {category: pope_metrics(found_pairs) for category, found_pairs in pairs.items()}
    return result


@TASKS.register("pope")
class Pope(Task):
    """POPE on COCO, in percent. Files as in LLaVA's `eval.zip`; its question file may be absent."""

    name = "pope"
    title = "POPE"
    folder = "pope"

    def needed(self, root: Path) -> list[Needed]:
        """The three label files and COCO's pictures."""
        home = self.home(root)
        source = f"https://github.com/AoiDragon/POPE at commit {COMMIT}, folder output/coco"
        files = [
            Needed(label_file(home / "coco", category), f"POPE's labels, {category} set", source)
            for category in CATEGORIES
        ]
        pictures = "http://images.cocodataset.org/zips/val2014.zip"
        return [*files, Needed(home / "val2014", "COCO val2014 pictures", pictures)]

    def questions(self, root: Path) -> list[Question]:
        """In the order of LLaVA's question file; see `read_questions`."""
        home = self.home(root)
        question_file = home / QUESTION_FILE
        given = question_file if question_file.exists() else None
        return read_questions(home / "coco", given, home / "val2014")

    def score(self, root: Path, answers: Sequence[Answer]) -> Score:
        """Mean F1 of the three sets; the pooled values are what lmms-eval's `pope` reports."""
        questions = self.questions(root)
        result = score_answers(questions, answers)
        metrics = {name: 100 * result.mean(name) for name in ("f1", "accuracy", "precision", "recall", "yes_ratio")}
        for category, counts in result.counts.items():
            for name in ("f1", "accuracy", "precision", "recall", "yes_ratio"):
                metrics[f"{name}_{category}"] = 100 * getattr(counts, name)
        every = result.counts.values()
        pooled = PopeCounts(*(sum(getattr(c, name) for c in every) for name in ("tp", "fp", "tn", "fn")))
        metrics |= {"f1_pooled": 100 * pooled.f1, "accuracy_pooled": 100 * pooled.accuracy}
        notes = ["the score is the unweighted mean of the F1 of the random, popular and adversarial sets"]
        if result.unparsed:
            notes.append(f"{result.unparsed} answers say neither yes nor no; the official rule counts them as yes")
        return Score(
            headline="f1",
            metrics=metrics,
            expected=len(questions),
            scored=len(questions) - len(result.missing),
            missing=result.missing,
            unparsed=result.unparsed,
            notes=notes,
        )
