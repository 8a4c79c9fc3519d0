"""MME: two yes/no questions about every picture, in ten sub-tasks of perception and four of cognition.

Source: the release's own text files and its `eval_tool/calculation.py`; prompts and ids as in LLaVA's question file.
The published number of the paper is perception + cognition, in points.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from llava.eval.files import Row, read_json_lines
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import SHORT_ANSWER, Answer, BadEvalData, Needed, Question, Score, Task, join_answers

RELEASE = "MME_Benchmark_release_version"
QUESTION_FILE = "llava_mme.jsonl"
SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation (MME, by request)"

# The numbers of questions in the release are: 60 for the first four, then 294, 340, 400, 400, 400, 40; 140, 40, 40, 40.
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = PERCEPTION + COGNITION

_REQUEST = re.compile(r"\s*Please answer yes or no\.?")


def parse_mme(text: str) -> str:
    """Read an answer by the official rule; returns "yes", "no" or "other", which is always wrong.

    Only the first four characters count; a yes among them wins over a no.
    """
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def mme_scores(rows: Iterable[tuple[str, str, str, str]]) -> dict[str, float]:
    """Score parsed answers.

    Args:
        rows: (category, picture, label, answer) of every question, in any order; label and answer are "yes" or "no",
            any other answer is wrong.

    Returns:
        Points of every category in `rows` (100 times the part of right answers plus 100 times the part of pictures with
        two right answers), and their sums: perception, cognition, total.

    Raises:
        BadEvalData: a picture does not have exactly two rows, or a category is unknown.
    """
    pictures: dict[str, dict[str, list[bool]]] = {}
    for category, picture, label, answer in rows:
        if category not in CATEGORIES:
            raise BadEvalData(f"mme: unknown category {category!r}; known: {', '.join(CATEGORIES)}")
        pictures.setdefault(category, {}).setdefault(picture, []).append(answer == label)
    points: dict[str, float] = {}
    for category in CATEGORIES:
        found = pictures.get(category, {})
        for picture, right in found.items():
            if len(right) != 2:
                raise BadEvalData(f"mme: {category}/{picture} has {len(right)} questions instead of two")
        if found:
            questions = [right for pair in found.values() for right in pair]
            points[category] = 100 * sum(questions) / len(questions) + 100 * sum(map(all, found.values())) / len(found)
    perception = sum(points.get(category, 0.0) for category in PERCEPTION)
    cognition = sum(points.get(category, 0.0) for category in COGNITION)
    return {"total": perception + cognition, "perception": perception, "cognition": cognition, **points}


def bare_question(text: str) -> str:
    """A question without LLaVA's line for a short answer and without MME's own request."""
    return _REQUEST.sub("", text.replace(SHORT_ANSWER.strip(), "")).strip()


@dataclass(frozen=True)
class Picture:
    """One picture of the release: its category, its file's stem, the file and the two (question, label)."""

    category: str
    stem: str
    image: Path
    asked: tuple[tuple[str, str], ...]

    def key(self, index: int) -> str:
        """What identifies one of its questions."""
        return f"{self.category}/{self.stem}/{index}"


def read_release(release: Path) -> dict[tuple[str, str], Picture]:
    """Read the release by (category, stem), in the official order of categories.

    A category's pictures and text files lie side by side, or in `images` and `questions_answers_YN`. A category that is
    not there is left out.

    Raises:
        BadEvalData: no category is there, one is empty, a row is malformed, or a picture has not exactly two questions.
    """
    pictures = {}
    for category in CATEGORIES:
        folder = release / category
        if not folder.is_dir():
            continue
        split = (folder / "images").is_dir()
        images, texts = (folder / "images", folder / "questions_answers_YN") if split else (folder, folder)
        files = {path.stem: path for path in sorted(images.glob("[!.]*")) if path.suffix.lower() != ".txt"}
        found = sorted(texts.glob("[!.]*.txt"))
        if not found:
            raise BadEvalData(f"{texts} has no text files with questions; get the whole release from {SOURCE}")
        for path in found:
            image = files.get(path.stem, images / f"{path.stem}.jpg")
            pictures[category, path.stem] = Picture(category, path.stem, image, _read_pair(path))
    if not pictures:
        raise BadEvalData(f"{release} has none of MME's categories; get the release from {SOURCE}")
    return pictures


def _read_pair(path: Path) -> tuple[tuple[str, str], ...]:
    pairs = []
    for place, line in _lines(path):
        parts = line.strip().split("\t")
        if len(parts) != 2 or parts[1].lower() not in ("yes", "no"):
            raise BadEvalData(f"{place}: expected a question, a tab, and Yes or No, found {line!r}")
        pairs.append((parts[0], parts[1]))
    if len(pairs) != 2:
        raise BadEvalData(f"{path} has {len(pairs)} questions; every picture of MME has exactly two")
    return tuple(pairs)


def _lines(path: Path) -> list[tuple[str, str]]:
    """(place, line) of every line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadEvalData(f"{path} cannot be read as UTF-8 text: {error}") from error
    return [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def picture_key(question_id: str | int) -> tuple[str, str]:
    """(category, stem) of an id such as `artwork/images/1.jpg`; LLaVA's rule."""
    path = PurePosixPath(str(question_id))
    return path.parts[0] if path.parts else "", path.stem


def read_questions(release: Path, question_file: Path | None) -> list[Question]:
    """Read questions; `extra` has the label, and `asked`, the question as the release words it.

    Args:
        release: The folder `MME_Benchmark_release_version`.
        question_file: LLaVA's question file; without it the questions are built from the release with the same prompts.

    Raises:
        BadEvalData: A file is malformed, or the question file does not ask exactly what the release asks.
    """
    pictures = read_release(release)
    if question_file is None:
        return [
            _question(picture, index, bare_question(asked) + SHORT_ANSWER, _id_of(picture, release))
            for picture in pictures.values()
            for index, (asked, _) in enumerate(picture.asked)
        ]
    questions: dict[str, Question] = {}
    for row in read_json_lines(question_file):
        question = _from_row(row, pictures, questions)
        questions[question.key] = question
    absent = [p.key(i) for p in pictures.values() for i in range(2) if p.key(i) not in questions]
    if absent:
        raise BadEvalData(
            f"{question_file} lacks {len(absent)} questions of {release}, first: {', '.join(absent[:5])}; every "
            "picture has two. Restore the published file, or remove it to ask what the release asks"
        )
    return list(questions.values())


def _id_of(picture: Picture, release: Path) -> str:
    return picture.image.relative_to(release).as_posix()


def _from_row(row: Row, pictures: Mapping[tuple[str, str], Picture], known: Mapping[str, Question]) -> Question:
    question_id, text = row.get("question_id", str), row.get("text", str)
    picture = pictures.get(picture_key(question_id))
    if picture is None:
        raise BadEvalData(
            f"{row.where}: the release has no questions about {question_id!r}; get the whole release from {SOURCE}"
        )
    same = [i for i, (asked, _) in enumerate(picture.asked) if bare_question(asked) == bare_question(text)]
    if not same:
        raise BadEvalData(f"{row.where}: the release does not ask {bare_question(text)!r} about {question_id!r}")
    free = [index for index in same if picture.key(index) not in known]
    if not free:
        raise BadEvalData(f"{row.where}: asks {bare_question(text)!r} about {question_id!r} once more than the release")
    return _question(picture, free[0], text, question_id)


def _question(picture: Picture, index: int, text: str, question_id: str) -> Question:
    asked, label = picture.asked[index]
    return Question(
        key=picture.key(index),
        question_id=question_id,
        text=text,
        visuals=(picture.image,),
        category=picture.category,
        extra={"label": label, "asked": asked},
    )


def match_answers(questions: Sequence[Question], answers: Sequence[Answer]) -> tuple[dict[str, Answer], list[str]]:
    """Match answers as `join_answers` does; one without a key by picture and question, whatever its suffix.

    Raises:
        BadEvalData: an answer belongs to no question, or a question has two answers.
    """
    keys: dict[tuple[str, str, str], list[str]] = {}
    for q in questions:
        keys.setdefault(_asked(q.question_id, q.text), []).append(q.key)
    keyed = []
    for answer in answers:
        same = [] if answer.key else keys.get(_asked(answer.question_id, answer.prompt), [])
        key = same.pop(0) if len(same) > 1 else same[0] if same else answer.key
        keyed.append(replace(answer, key=key))
    return join_answers(questions, keyed, "mme")


def _asked(question_id: str | int, text: str) -> tuple[str, str, str]:
    return (*picture_key(question_id), bare_question(text))


def write_results(questions: Sequence[Question], answers: Sequence[Answer], folder: Path) -> list[Path]:
    """Write `<category>.txt` for the official calculation: text file, question, label and answer, tab-separated.

    A picture's two questions stand next to each other; tabs and line ends in an answer become spaces.

    Raises:
        BadEvalData: a question has no answer, or `match_answers` finds a fault.
    """
    found, missing = match_answers(questions, answers)
    if missing:
        raise BadEvalData(f"mme: {len(missing)} questions have no answer, first: {', '.join(missing[:5])}")
    lines: dict[str, dict[str, list[str]]] = {}
    for question in questions:
        category, stem = picture_key(question.question_id)
        text = re.sub(r"[\t\r\n]", " ", found[question.key].text)
        columns = (f"{stem}.txt", question.extra["asked"], question.extra["label"], text)
        lines.setdefault(category, {}).setdefault(stem, []).append("\t".join(columns) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for category, pictures in lines.items():
        path = folder / f"{category}.txt"
        path.write_text("".join(line for pair in pictures.values() for line in pair), encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


def score_folder(folder: Path) -> dict[str, float]:
    """Score a folder of `<category>.txt` as the official calculation does: two lines at a time; see `mme_scores`.

    A category without a file is left out.

    Raises:
        BadEvalData: there is no file, one is malformed, or two lines that belong together name different pictures.
    """
    rows = []
    for category in CATEGORIES:
        path = folder / f"{category}.txt"
        lines = _lines(path) if path.exists() else []
        if len(lines) % 2:
            raise BadEvalData(f"{path} has {len(lines)} lines; expected two for every picture")
        before = ""
        for number, (place, line) in enumerate(lines):
            parts = line.split("\t")
            if len(parts) != 4 or parts[2].lower() not in ("yes", "no"):
                raise BadEvalData(f"{place}: expected picture, question, Yes or No, and answer between tabs: {line!r}")
            if number % 2 and parts[0] != before:
                raise BadEvalData(f"{place}: {parts[0]} follows {before}; a picture's two lines must be neighbours")
            before = parts[0]
            rows.append((category, f"{number // 2}: {before}", parts[2].lower(), parse_mme(parts[3])))
    if not rows:
        raise BadEvalData(f"{folder} has no <category>.txt; write them with llava.eval.convert_answer_to_mme")
    return mme_scores(rows)


def absent_categories(points: Mapping[str, float]) -> list[str]:
    """Categories that a score lacks."""
    return [category for category in CATEGORIES if category not in points]


@TASKS.register("mme")
class Mme(Task):
    """MME, in points: perception + cognition (at most 2800). LLaVA's question file may be absent."""

    name = "mme"
    title = "MME"
    folder = "MME"

    def needed(self, root: Path) -> list[Needed]:
        """The release: a folder per category."""
        return [Needed(self.home(root) / RELEASE, "MME's pictures and questions", SOURCE)]

    def questions(self, root: Path) -> list[Question]:
        """In the order of LLaVA's question file; see `read_questions`."""
        question_file = self.home(root) / QUESTION_FILE
        return read_questions(self.home(root) / RELEASE, question_file if question_file.exists() else None)

    def score(self, root: Path, answers: Sequence[Answer]) -> Score:
        """Points; a question without an answer is wrong."""
        questions = self.questions(root)
        found, missing = match_answers(questions, answers)
        said = {key: parse_mme(answer.text) for key, answer in found.items()}
        rows = []
        for question in questions:
            category, stem = picture_key(question.question_id)
            rows.append((category, stem, question.extra["label"].lower(), said.get(question.key, "other")))
        metrics = mme_scores(rows)
        notes = ["points: perception (at most 2000) + cognition (at most 800); LLaVA's 1510.7 is perception alone"]
        if absent := absent_categories(metrics):
            notes.append(f"not the whole benchmark: the sums lack {', '.join(absent)}")
        return Score(
            headline="total",
            metrics=metrics,
            expected=len(questions),
            scored=len(found),
            missing=missing,
            unparsed=sum(answer == "other" for answer in said.values()),
            notes=notes,
        )
