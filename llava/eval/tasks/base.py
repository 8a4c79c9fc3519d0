"""What a benchmark is to the runner: files to find, questions to ask, answers to score.

A benchmark is one module in this package that registers one `Task`. It reads the benchmark's official files as they are
published and scores by the official rule; it knows nothing about models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from PIL import Image

from llava.pictures import PictureError, read_picture
from llava.sanity import Group

# What LLaVA's prompts end with. Benchmarks are sensitive to every character of them.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."


K = TypeVar("K")
V = TypeVar("V")


class BadEvalData(ValueError):
    """A file of a benchmark is missing or wrong; the message names file, row and field, and says what to do."""


@dataclass(frozen=True)
class Needed:
    """A file or folder that a benchmark needs.

    Attributes:
        path: where it is expected.
        what: what it is.
        source: where to get it.
    """

    path: Path
    what: str
    source: str


@dataclass(frozen=True)
class Question:
    """One question to ask.

    Attributes:
        key: unique within the benchmark; what an interrupted run continues by.
        question_id: the id that goes into the answers file, as the official files spell it.
        text: the user's whole turn without image marks.
        visuals: image files, or one video file; empty for a question without a picture.
        category: the benchmark's own class of the question, empty where it has none.
        extra: what scoring needs besides, in JSON types.
    """

    key: str
    question_id: str | int
    text: str
    visuals: tuple[Path, ...] = ()
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One row of an answers file: `question_id`, `prompt` (the question without the template) and `text`.

    `key` is our addition to LLaVA's row; in a file that LLaVA wrote it is absent and left empty.
    """

    question_id: str | int
    prompt: str
    text: str
    key: str = ""


@dataclass
class Score:
    """The result of one benchmark.

    Attributes:
        headline: the metric that goes into a comparison table.
        metrics: all metrics, in the unit in which the benchmark is published (percent, or points for MME).
        expected: questions of the benchmark; scored: those that count in the metrics.
        missing: keys of questions without an answer.
        unparsed: answers that the official rule could not read (they count as it says).
        notes: what a reader of the number must know.
    """

    headline: str
    metrics: dict[str, float]
    expected: int
    scored: int
    missing: list[str] = field(default_factory=list)
    unparsed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def value(self) -> float:
        """The headline number."""
        return self.metrics[self.headline]


class Task(ABC):
    """A benchmark.

    Attributes:
        name: how the command line calls it.
        title: column head in a table.
        folder: its place below the evaluation root (`playground/data/eval`).
        max_new_tokens: as in LLaVA's script for it.
        video: whether `Question.visuals` is a video, to be read as frames.
        pictures: of how many pictures it asks; None is all, see `part_of`.
        orientation: how pictures are turned, see `llava.pictures.ORIENTATIONS`; the command line sets it.
        chance: the share of right answers that guessing gives, where the headline is a share in percent; else None.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folder: ClassVar[str]
    max_new_tokens: ClassVar[int] = 128
    video: ClassVar[bool] = False
    pictures: ClassVar[int | None] = None
    orientation: str = "exif"
    chance: ClassVar[float | None] = None

    def home(self, root: Path) -> Path:
        """The benchmark's folder."""
        return root / self.folder

    @abstractmethod
    def needed(self, root: Path) -> list[Needed]:
        """Return every file and folder that must be there; the runner checks before it loads a model."""

    @abstractmethod
    def questions(self, root: Path) -> list[Question]:
        """Return all questions in the official order.

        Raises:
            BadEvalData: a file is malformed, or two questions share a key.
        """

    @abstractmethod
    def score(self, root: Path, answers: Sequence[Answer]) -> Score:
        """Score answers by the official rule.

        Answers may come in any order. Questions without an answer are listed in `Score.missing` and count as wrong.

        Raises:
            BadEvalData: an answer belongs to no question, or a question has two answers; names the ids.
        """

    def groups(self, questions: Sequence[Question], score: Score) -> dict[str, Group]:
        """Return what is compared with chance: right answers and the level of guessing, by name; nothing if unknown.

        Args:
            questions: all that were asked.
            score: what they got.
        """
        if self.chance is None:
            return {}
        return {self.title: Group(score.value / 100 * score.expected, score.expected, self.chance)}

    def restrict(self, root: Path, by_key: Mapping[K, V]) -> dict[K, V]:
        """Leave what belongs to the questions that are asked; scoring restricts the annotations so.

        Args:
            root: the evaluation root.
            by_key: what belongs to each question, by its key or a number that spells it.
        """
        if self.pictures is None:
            return dict(by_key)
        keys = {question.key for question in self.questions(root)}
        return {key: value for key, value in by_key.items() if str(key) in keys}

    def stored_prompt(self, question: Question) -> str:
        """What an answers file holds as the prompt of a question; LLaVA's scorers recover the question from it."""
        return question.text

    def open_visual(self, path: Path) -> Image.Image:
        """Open one picture for the model; RGB unless the benchmark's protocol says otherwise.

        Raises:
            BadEvalData: it cannot be opened; names it.
        """
        return self._read(path)

    def _read(self, path: Path, keep_palette: bool = False) -> Image.Image:
        try:
            return read_picture(path, self.orientation, keep_palette=keep_palette)
        except PictureError as error:
            raise BadEvalData(f"{self.name}: {error}") from error


def pick(questions: Sequence[Question], pictures: int) -> list[Question]:
    """Leave the questions about some of the pictures, spread evenly over them in the order of their names."""
    names = sorted({path for question in questions for path in question.visuals})
    count = min(pictures, len(names))
    chosen = {names[index * len(names) // count] for index in range(count)}
    return [question for question in questions if question.visuals and chosen.issuperset(question.visuals)]


def part_of(kind: type[Task], pictures: int) -> Task:
    """Return a benchmark on some of its pictures, under a name that says so.

    Raises:
        ValueError: it asks about videos, or no picture is left.
    """
    if pictures < 1:
        raise ValueError(f"a benchmark on {pictures} pictures has no questions; ask for at least 1")
    if kind.video:
        raise ValueError(f"{kind.name} asks about videos, not pictures; leave --limit-pictures out")

    def questions(self: Task, root: Path) -> list[Question]:
        return pick(kind.questions(self, root), pictures)

    named = {"name": f"{kind.name}_{pictures}_pictures", "title": f"{kind.title}, {pictures} pictures"}
    content = named | {"pictures": pictures, "questions": questions, "__doc__": kind.__doc__}
    return type(f"{kind.__name__}Part", (kind,), content)()


def join_answers(
    questions: Sequence[Question], answers: Sequence[Answer], name: str
) -> tuple[dict[str, Answer], list[str]]:
    """Match answers to questions; returns answers by question key, and the keys that have none.

    A row with a `key` is matched by it; a row that LLaVA's scripts wrote, by (question_id, prompt), then by question_id
    where that is unique.

    Raises:
        BadEvalData: an answer belongs to no question, or a question has two answers.
    """
    by_key = {q.key: q for q in questions}
    by_pair = {(str(q.question_id), q.text): q for q in questions}
    by_id: dict[str, list[Question]] = {}
    for q in questions:
        by_id.setdefault(str(q.question_id), []).append(q)
    found: dict[str, Answer] = {}
    twice: list[str] = []
    strangers: list[str] = []
    for answer in answers:
        same = by_id.get(str(answer.question_id), [])
        question = by_key.get(answer.key) if answer.key else by_pair.get((str(answer.question_id), answer.prompt))
        if question is None and not answer.key and len(same) == 1:
            question = same[0]
        if question is None:
            strangers.append(str(answer.key or answer.question_id))
        elif question.key in found:
            twice.append(question.key)
        else:
            found[question.key] = answer
    for what, keys in (("belong to no question", strangers), ("repeat a question", twice)):
        if keys:
            raise BadEvalData(
                f"{name}: {len(keys)} answers {what} of this benchmark, first: {', '.join(keys[:5])}; "
                "the answers file belongs to other questions or was written twice"
            )
    return found, [q.key for q in questions if q.key not in found]
