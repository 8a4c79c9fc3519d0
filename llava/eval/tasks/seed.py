"""SEED-Bench, image part: questions with four options in nine types.

Source: the official `SEED-Bench.json`; prompts and scoring as in LLaVA. An answer is right only if it is the letter and
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava.eval.files import Row, as_row, read_json, read_json_lines, short
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import LETTER_ANSWER, Answer, BadEvalData, Needed, Question, Score, Task, join_answers

ANNOTATIONS = "SEED-Bench.json"
QUESTION_FILE = "llava-seed-bench.jsonl"
IMAGES = "SEED-Bench-image"
SOURCE = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench (v1)"

LETTERS = ("A", "B", "C", "D")
DATA_TYPES = ("image", "video")
_REVISION = "SEED-Bench.json was revised; LLaVA's questions belong to its first version (see the dataset's history)"


@dataclass(frozen=True)
class Problem:
    """One row of the annotations.

    Attributes:
        question_id: as spelled there.
        kind: its type's name.
        data_type: image or video.
        answer: the right letter.
        row: all fields.
    """

    question_id: str | int
    kind: str
    data_type: str
    answer: str
    row: Row

    @property
    def prompt(self) -> str:
        """The question with its options, as LLaVA asks it."""
        options = (f"{letter}. {self.row.get(f'choice_{letter.lower()}', str, int, float)}" for letter in LETTERS)
        return "\n".join([self.row.get("question", str), *options]) + LETTER_ANSWER


def plain_id(value: str | int) -> str | int:
    """An id as a number where it is one, by which LLaVA compares ids."""
    try:
        return int(value)
    except ValueError:
        return value


def seed_scores(rows: Iterable[tuple[str, str, str, str | None]]) -> dict[str, float]:
    """Score answers.

    Args:
        rows: (type's name, "image" or "video", right letter, answer or None) of every question.

    Returns:
        Percent of right answers: image, video, and total where both are there, then every type by name.
    """
    hits: dict[str, list[bool]] = {"image": [], "video": [], "total": []}
    for kind, data_type, letter, answer in rows:
        for part in (data_type, "total", kind):
            hits.setdefault(part, []).append(answer == letter)
    if not (hits["image"] and hits["video"]):
        del hits["total"]
    return {name: 100 * sum(found) / len(found) for name, found in hits.items() if found}


def read_problems(path: Path) -> dict[str | int, Problem]:
    """Read `SEED-Bench.json` by id, see `plain_id`.

    Raises:
        BadEvalData: It is missing or malformed, or an id repeats.
    """
    data = as_row(read_json(path, dict), str(path))
    names = {type_id: name for name, type_id in data.get("question_type", dict).items()}
    problems: dict[str | int, Problem] = {}
    for number, content in enumerate(data.get("questions", list)):
        row = as_row(content, f"{path}, question {number}")
        question_id = row.get("question_id", str, int)
        row = replace(row, where=f"{row.where} (question_id {question_id!r})")
        kind, data_type, answer = row.get("question_type_id", int), row.get("data_type", str), row.get("answer", str)
        for name, value, allowed in (
            ("question_type_id", kind, tuple(names)),
            ("data_type", data_type, DATA_TYPES),
            ("answer", answer, LETTERS),
        ):
            if value not in allowed:
                raise BadEvalData(f"{row.where}: {name!r} must be one of {allowed}, found {short(value)}")
        if plain_id(question_id) in problems:
            raise BadEvalData(f"{row.where}: this id was used before; ids must be unique")
        problems[plain_id(question_id)] = Problem(question_id, names[kind], data_type, answer, row)
    return problems


def read_questions(problems: Mapping[str | int, Problem], question_file: Path | None, home: Path) -> list[Question]:
    """Return the questions about images.

    Args:
        problems: See `read_problems`.
        question_file: LLaVA's questions; without them they are built from `problems` with the same prompts.
        home: Folder with `SEED-Bench-image`.

    Raises:
        BadEvalData: A row is malformed, an id repeats, or question file and annotations do not belong together.
    """
    wanted = {key: problem for key, problem in problems.items() if problem.data_type == "image"}
    if question_file is None:
        return [
            _question(key, problem, problem.prompt, home / IMAGES / problem.row.get("data_id", str))
            for key, problem in wanted.items()
        ]
    questions: dict[str | int, Question] = {}
    for row in read_json_lines(question_file):
        key = plain_id(row.get("question_id", int, str))
        if key not in problems:
            raise BadEvalData(f"{row.where}: {ANNOTATIONS} has no question_id {key!r}; {_REVISION}")
        if key in questions:
            raise BadEvalData(f"{row.where}: question_id {key!r} was used before; ids must be unique")
        if key in wanted:
            questions[key] = _question(key, problems[key], row.get("text", str), home / row.get("image", str))
    absent = [str(key) for key in wanted if key not in questions]
    if absent:
        raise BadEvalData(
            f"{question_file} lacks {len(absent)} image questions of {ANNOTATIONS}, first: {', '.join(absent[:5])}; "
            + _REVISION
        )
    return list(questions.values())


def _question(key: str | int, problem: Problem, text: str, image: Path) -> Question:
    return Question(
        key=str(key),
        question_id=key,
        text=text,
        visuals=(image,),
        category=problem.kind,
        extra={"answer": problem.answer},
    )


@dataclass
class SeedResult:
    """Scored answers.

    Attributes:
        texts: answers by id, see `plain_id`.
        metrics: see `seed_scores`, types in the order of their ids; no video where no video question was answered.
        expected: ids of the questions that count; missing: those without an answer, which are wrong.
    """

    texts: dict[str | int, str]
    metrics: dict[str, float]
    expected: list[str | int]
    missing: list[str]


def score_answers(problems: Mapping[str | int, Problem], answers: Sequence[Answer]) -> SeedResult:
    """Score answers in any order. Video questions count if at least one was answered.

    Raises:
        BadEvalData: an answer belongs to no question, or a question has two answers.
    """
    ids = [Question(key=str(key), question_id=key, text="") for key in problems]
    plain = [replace(answer, question_id=plain_id(answer.question_id)) for answer in answers]
    found, _ = join_answers(ids, plain, "seed_image")
    texts = {key: found[str(key)].text for key in problems if str(key) in found}
    video = any(problems[key].data_type == "video" for key in texts)
    expected = [key for key, problem in problems.items() if video or problem.data_type == "image"]
    by_type = sorted(expected, key=lambda key: problems[key].row.data["question_type_id"])
    rows = ((problems[key].kind, problems[key].data_type, problems[key].answer, texts.get(key)) for key in by_type)
    return SeedResult(texts, seed_scores(rows), expected, [str(key) for key in expected if key not in texts])


@TASKS.register("seed_image")
class SeedImage(Task):
    """SEED-Bench's image questions, in percent. LLaVA's question file may be absent."""

    name = "seed_image"
    title = "SEED-I"
    folder = "seed_bench"
    chance = 0.25  # four options

    def needed(self, root: Path) -> list[Needed]:
        """The annotations and the pictures."""
        return [
            Needed(self.home(root) / ANNOTATIONS, "SEED-Bench's questions and answers", SOURCE),
            Needed(self.home(root) / IMAGES, "SEED-Bench's pictures", f"SEED-Bench-image.zip from {SOURCE}"),
        ]

    def questions(self, root: Path) -> list[Question]:
        """The image questions in the order of LLaVA's question file; see `read_questions`."""
        home = self.home(root)
        question_file = home / QUESTION_FILE
        problems = read_problems(home / ANNOTATIONS)
        return read_questions(problems, question_file if question_file.exists() else None, home)

    def score(self, root: Path, answers: Sequence[Answer]) -> Score:
        """Accuracy over image questions, and per type; a file that also answers videos gets video and total too."""
        result = score_answers(self.restrict(root, read_problems(self.home(root) / ANNOTATIONS)), answers)
        unread = sum(text not in LETTERS for text in result.texts.values())
        notes = ["only an answer that is one letter and nothing else can be right"]
        if unread:
            notes.append(f"{unread} answers are not one of A to D and count as wrong")
        return Score(
            headline="image",
            metrics=result.metrics,
            expected=len(result.expected),
            scored=len(result.texts),
            missing=result.missing,
            unparsed=unread,
            notes=notes,
        )
