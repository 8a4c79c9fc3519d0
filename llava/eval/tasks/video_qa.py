"""MSVD-QA, MSRVTT-QA and TGIF-QA in the layout of Video-LLaVA's zero-shot evaluation.

The published numbers come from a chat model that judges every answer (`llava.eval.judge`). Without a judge the answers
are compared by rules that need no network; those numbers are for comparing runs with each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from llava.eval.files import Row, as_row, read_json, short
from llava.eval.lemmas import same_words
from llava.eval.m4c_evaluator import normalise
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import Answer, BadEvalData, Needed, Question, Score, Task, join_answers
from llava.eval.video import FRAMES, VIDEO_SUFFIXES, find_videos, read_frames

RULES = ("contains", "em", "em_lemma")
NOT_COMPARABLE = "scored by rules without a judge: not comparable with published numbers"
_SOURCE = "Video-LLaVA's TRAIN_AND_VALIDATE.md, section 'data for validating'; it goes below GPT_Zero_Shot_QA"


@dataclass(frozen=True)
class Verdict:
    """A judge's opinion of one answer: right or wrong, and a score from 0 to 5."""

    right: bool
    score: int


@dataclass(frozen=True)
class Judged:
    """Verdicts by question key, and who gave them, in words."""

    judge: str
    verdicts: Mapping[str, Verdict]


def rule_marks(prediction: str, answer: str) -> dict[str, bool]:
    """Compare a prediction with the reference by the three rules.

    em: equal after TextVQA's normalisation. contains: the reference's words stand in a row in the prediction.
    em_lemma: equal word for word when forms of one word count as equal. A text of which normalisation leaves nothing
    (an article) is compared as it is, in lower case.
    """
    given, right = _words(prediction), _words(answer)
    starts = range(len(given) - len(right) + 1)
    return {
        "contains": any(given[start : start + len(right)] == right for start in starts),
        "em": given == right,
        "em_lemma": same_words(given, right),
    }


def _words(text: str) -> list[str]:
    return normalise(text).split() or text.lower().split()


def missing_videos(questions: Iterable[Question]) -> list[str]:
    """Files, named once each, that questions ask about and that are not there."""
    paths = dict.fromkeys(path for question in questions for path in question.visuals)
    return [str(path) for path in paths if not path.is_file()]


class VideoQA(Task):
    """Open questions about short videos.

    Attributes:
        frames: pictures that the model sees of a video.
        video_folder: where the videos are, below the benchmark's folder.
        published: rows of the published set.
    """

    video = True
    max_new_tokens = 1024
    frames: ClassVar[int] = FRAMES
    video_folder: ClassVar[str]
    published: ClassVar[int]

    def needed(self, root: Path) -> list[Needed]:
        home = self.home(root)
        return [
            Needed(home / "test_q.json", "questions: [{video_name, question, question_id}]", _SOURCE),
            Needed(home / "test_a.json", "answers: [{answer, type, question_id}]", _SOURCE),
            Needed(home / self.video_folder, f"videos ({' '.join(VIDEO_SUFFIXES)})", _SOURCE),
        ]

    def questions(self, root: Path) -> list[Question]:
        """Return all questions in the order of test_q.json.

        A video is found by its name with any of `VIDEO_SUFFIXES`; a question whose video is absent names the .mp4 file
        that should be there.

        Raises:
            BadEvalData: a file is malformed, an id occurs twice, or the ids of the two files differ.
        """
        home = self.home(root)
        asked = self._by_id(home / "test_q.json")
        answered = self._by_id(home / "test_a.json")
        self._check_ids(asked, answered)
        folder = home / self.video_folder
        videos = find_videos(folder)
        return [self._question(key, row, answered[key], folder, videos) for key, row in asked.items()]

    def _question(self, key: str, row: Row, answer: Row, folder: Path, videos: Mapping[str, Path]) -> Question:
        name = _text(row, "video_name")
        path = videos.get(name, folder / f"{name}.mp4")
        kind = answer.data.get("type")
        reference = str(answer.get("answer", str, int)).strip()
        if not reference:
            raise BadEvalData(f"{answer.where}: field 'answer' is empty; restore the published file")
        return Question(
            key=key,
            question_id=row.data["question_id"],
            text=_text(row, "question"),
            visuals=(path,),
            category="" if kind is None else str(kind),
            extra={"answer": reference, "video_name": name},
        )

    def _by_id(self, path: Path) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for number, data in enumerate(read_json(path, list)):
            row = as_row(data, f"{path}, record {number}")
            key = str(row.get("question_id", str, int))
            if key in rows:
                raise BadEvalData(f"{row.where}: question_id {short(key)} occurs twice; restore the published file")
            rows[key] = row
        if not rows:
            raise BadEvalData(f"{path} holds no records; restore the published file")
        return rows

    def _check_ids(self, asked: Mapping[str, Row], answered: Mapping[str, Row]) -> None:
        for what, keys in (
            ("questions of test_q.json have no answer in test_a.json", asked.keys() - answered.keys()),
            ("answers of test_a.json have no question in test_q.json", answered.keys() - asked.keys()),
        ):
            if keys:
                raise BadEvalData(
                    f"{self.name}: {len(keys)} {what}, first question_id: {', '.join(sorted(keys)[:5])}; "
                    "the two files belong to different versions"
                )

    def open_frames(self, path: Path) -> list[Image.Image]:
        """Read what the model sees of one video; see `llava.eval.video.read_frames` for the errors."""
        return read_frames(path, self.frames)

    def score(self, root: Path, answers: Sequence[Answer], judged: Judged | None = None) -> Score:
        """Score by rules, and by a judge's verdicts where there are any.

        Args:
            root: evaluation root.
            answers: in any order. A question without an answer counts as wrong everywhere.
            judged: makes `judge_accuracy` the headline, see `add_judgement`.

        Raises:
            BadEvalData: an answer belongs to no question, or a question has two answers.
        """
        questions = self.questions(root)
        found, missing = join_answers(questions, answers, self.name)
        right: dict[str, int] = defaultdict(int)
        rows: dict[str, int] = defaultdict(int)
        for question in questions:
            answer = found.get(question.key)
            marks = rule_marks(answer.text, question.extra["answer"]) if answer else dict.fromkeys(RULES, False)
            for group in ("", f"/{question.category}") if question.category else ("",):
                for rule in RULES:
                    rows[rule + group] += 1
                    right[rule + group] += marks[rule]
        names = [*RULES, *sorted(rows.keys() - set(RULES))]
        score = Score(
            headline="contains",
            metrics={name: 100.0 * right[name] / rows[name] for name in names},
            expected=len(questions),
            scored=len(found),
            missing=missing,
            notes=self._size_note(len(questions)),
        )
        add_judgement(score, judged, found.keys())
        return score

    def _size_note(self, count: int) -> list[str]:
        return [] if count == self.published else [f"{count} questions; the published set has {self.published}"]


def _text(row: Row, name: str) -> str:
    text = row.get(name, str)
    if not text.strip():
        raise BadEvalData(f"{row.where}: field '{name}' is empty; restore the published file")
    return text


def add_judgement(score: Score, judged: Judged | None, answered: Collection[str]) -> None:
    """Put a judge's figures into a score by rules, and say in its notes what the headline may be compared with.

    `judge_accuracy` is in percent and `judge_score` the mean of 0 to 5, both over the answers with a verdict and the
    questions without an answer; an answer without a verdict counts neither way, as upstream.

    Args:
        score: changed in place.
        judged: the verdicts; None where there was no judge.
        answered: keys of the questions that have an answer.
    """
    verdicts = [judged.verdicts[key] for key in answered if key in judged.verdicts] if judged else []
    if judged is None or not verdicts:
        score.notes.insert(0, NOT_COMPARABLE)
        return
    rows = len(verdicts) + len(score.missing)
    score.headline = "judge_accuracy"
    score.metrics["judge_accuracy"] = 100.0 * sum(verdict.right for verdict in verdicts) / rows
    score.metrics["judge_score"] = sum(verdict.score for verdict in verdicts) / rows
    score.unparsed = len(answered) - len(verdicts)
    score.notes.insert(0, f"judged by {judged.judge}; comparable only with numbers from the same judge and prompt")
    if score.unparsed:
        score.notes.append(f"{score.unparsed} answers have no verdict and count neither way in judge_accuracy")


@TASKS.register("msvd_qa")
class MsvdQA(VideoQA):
    """MSVD-QA: 13,157 questions."""

    name = "msvd_qa"
    title = "MSVD"
    folder = "GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA"
    video_folder = "videos"
    published = 13_157


@TASKS.register("msrvtt_qa")
class MsrvttQA(VideoQA):
    """MSRVTT-QA: 72,821 questions."""

    name = "msrvtt_qa"
    title = "MSRVTT"
    folder = "GPT_Zero_Shot_QA/MSRVTT_Zero_Shot_QA"
    video_folder = "videos/all"
    published = 72_821


@TASKS.register("tgif_qa")
class TgifQA(VideoQA):
    """TGIF-QA, questions about one frame: 25,751."""

    name = "tgif_qa"
    title = "TGIF"
    folder = "GPT_Zero_Shot_QA/TGIF_Zero_Shot_QA"
    video_folder = "mp4"
    published = 25_751
