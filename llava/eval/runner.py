"""Run one benchmark: ask what has not been answered yet, merge all processes' answers, score, and write a record."""

from __future__ import annotations

import functools
import hashlib
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import duet
from llava.eval.answers import AnswersFile, cut_torn_line, read_rows, refuse_repeated, write_json, write_lines
from llava.eval.files import require_inside
from llava.eval.generate import Answerer
from llava.eval.ledger import ModelShape, costs, sample_metadata, summarise, tiled_tokens
from llava.eval.pictures import PictureBatches, load_batches, open_with, refuse_long
from llava.eval.processes import Processes
from llava.eval.settings import Settings, questions_digest
from llava.eval.tasks.base import Answer, BadEvalData, Question, Score, Task
from llava.sanity import about_answers, about_chance

RESULT_SUFFIX = ".result.json"


@dataclass(frozen=True)
class RunOptions:
    """How to run.

    Attributes:
        root: where the benchmarks lie.
        out: the results' folder.
        name: row of the table; a folder below `out`.
        batch: samples at once.
        workers: processes that load pictures.
        limit: ask only the first so many questions, and do not score; None asks all.
        skip_missing: score although questions have no answer.
        trained: the model was trained for this, so that scores at chance are an error.
    """

    root: Path
    out: Path
    name: str
    batch: int = 8
    workers: int = 2
    limit: int | None = None
    skip_missing: bool = False
    trained: bool = False

    @property
    def folder(self) -> Path:
        """The row's folder."""
        return self.out / self.name


@dataclass(frozen=True)
class Item:
    """A question, ready to be asked."""

    question: Question
    pictures: int
    ids: tuple[int, ...]


def load_questions(task: Task, root: Path) -> list[Question]:
    """Read a benchmark's questions.

    Raises:
        BadEvalData: a file is wrong, there are none, two share a key, or a picture lies outside the benchmark's folder.
    """
    questions = task.questions(root)
    for question in questions:
        for path in question.visuals:
            require_inside(path, task.home(root), f"{task.name}, question {question.key}")
    if not questions:
        raise BadEvalData(f"{task.name}: no question in {task.home(root)}")
    refuse_repeated([question.key for question in questions], f"{task.name}, the questions")
    return questions


def missing_pictures(questions: Sequence[Question]) -> list[tuple[str, str]]:
    """(key, reason) of the questions whose picture or video is not there."""
    gone = {path for path in {path for q in questions for path in q.visuals} if not path.is_file()}
    return [(q.key, f"{path} does not exist") for q in questions for path in q.visuals if path in gone]


def make_settings(
    task: Task, questions: Sequence[Question], root: Path, answerer: Answerer, fingerprint: str, dtype: str
) -> Settings:
    """Say what this benchmark's answers depend on."""
    config = answerer.model.config
    frames = f"{_frames(task)} frames, " if task.video else ""
    return Settings(
        benchmark=task.name,
        questions=questions_digest(questions, root),
        model=fingerprint,
        reduction=getattr(config, "duet", None),
        template=answerer.conv_mode,
        decoding={"do_sample": False, "num_beams": 1, "max_new_tokens": task.max_new_tokens},
        dtype=dtype,
        attention=str(getattr(config, "_attn_implementation", None)),
        visuals=f"{frames}{getattr(config, 'image_aspect_ratio', None) or 'processor'}"
        + (f", {task.orientation} orientation" if task.orientation != "exif" else ""),
    )


def _frames(task: Task) -> int:
    return getattr(task, "frames", 8)


def make_batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Group questions about one picture, which is then encoded once, and prompts of similar length.

    Long prompts come first: if memory runs out, it does so at once.
    """
    longest: dict[tuple[Path, ...], int] = {}
    for item in items:
        visuals = item.question.visuals
        longest[visuals] = max(longest.get(visuals, 0), len(item.ids))

    def place(item: Item) -> tuple:
        return item.pictures, longest[item.question.visuals], item.question.visuals, len(item.ids)

    ordered = sorted(items, key=place, reverse=True)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class BenchmarkRun:
    """One benchmark with one model and one group of settings.

    Files below `options.folder`, all named by benchmark and settings: a `.settings.json`, a `.rank<N>.jsonl` of each
    process while it answers, at the end the answers in the benchmark's order (`.jsonl`) and the record.

    Args:
        task: the benchmark.
        questions: all its questions.
        answerer: the model.
        settings: what the answers depend on.
        options: how to run.
        processes: this process among all.
        about: facts to be recorded that the answers do not depend on.

    Attributes:
        failures: (key, reason) of the questions that could not be answered, of all processes, after `run`.
        answers_path: the answers in the benchmark's order.
        findings: what says that the result is broken, after `run`; see `llava.sanity`.
    """

    def __init__(
        self,
        task: Task,
        questions: Sequence[Question],
        answerer: Answerer,
        settings: Settings,
        options: RunOptions,
        processes: Processes,
        about: dict[str, Any],
    ):
        self.task, self.answerer, self.settings, self.options = task, answerer, settings, options
        self.processes, self.about = processes, about
        self.all_questions = list(questions)
        self.questions = self.all_questions[: options.limit]
        self.failures: list[tuple[str, str]] = []
        self.findings: list[str] = []
        self.answers_path = options.folder / f"{settings.stem}.jsonl"

    def run(self) -> dict[str, Any] | None:
        """Answer, merge and score.

        Returns:
            The record; None in other processes than the first, and with a limit.

        Raises:
            BadEvalData: what was stored is damaged, or the benchmark cannot be scored.
        """
        self._prepare()
        self.failures = [failure for own in self.processes.gather(self._answer()) for failure in own]
        if not self.processes.first:
            return None
        rows = self._merge()
        if self.options.limit is not None:
            self.findings = self._look_at(rows, None)
            return None
        record = self._record(rows)
        write_json(self.options.folder / f"{self.settings.stem}{RESULT_SUFFIX}", record)
        return record

    def _shards(self) -> list[Path]:
        return sorted(self.options.folder.glob(f"{self.settings.stem}.rank*.jsonl"))

    def _prepare(self) -> None:
        """Repair what an interrupted run left, before any process reads it."""
        if self.processes.first:
            self.options.folder.mkdir(parents=True, exist_ok=True)
            for shard in self._shards():
                cut_torn_line(shard)
            write_json(self.options.folder / f"{self.settings.stem}.settings.json", asdict(self.settings) | self.about)
        self.processes.wait()

    def _done(self) -> dict[str, dict[str, Any]]:
        rows = [row for shard in self._shards() for row in read_rows(shard)]
        refuse_repeated([row["key"] for row in rows], self.options.folder / f"{self.settings.stem}.rank*.jsonl")
        return {row["key"]: row for row in rows}

    def _answer(self) -> list[tuple[str, str]]:
        """Answer this process's share; returns (key, reason) of what cannot be answered.

        Batches do not depend on what is answered already or on the number of processes, so that rounding is the same
        after an interruption.
        """
        done = self._done()
        self.processes.wait()
        batches = make_batches([self._item(question) for question in self.questions], self.options.batch)
        mine = batches[self.processes.rank :: self.processes.world]
        total = sum(map(len, mine))
        open_batches = [batch for batch in mine if any(item.question.key not in done for item in batch)]
        opener = functools.partial(open_with, self.task)
        config = self.answerer.model.config
        pictures = PictureBatches(
            [[item.question.visuals for item in batch] for batch in open_batches],
            opener, self.answerer.image_processor, config,
        )  # fmt: skip
        failures: list[tuple[str, str]] = []
        path = self.options.folder / f"{self.settings.stem}.rank{self.processes.rank}.jsonl"
        bar = tqdm(
            total=total, initial=total - sum(map(len, open_batches)), unit="sample", desc=self.task.name,
            disable=not self.processes.first,
        )  # fmt: skip
        with AnswersFile(path) as file, bar:
            # Another start of the same command may have answered since `done` was read, before the file was ours.
            done |= {row["key"]: row for row in file.rows}
            begin = time.perf_counter()
            for loaded in load_batches(pictures, self.options.workers):
                batch = open_batches[loaded.index]
                ids = [self._ids(batch[place], count) for place, count in zip(loaded.kept, loaded.counts, strict=True)]
                ids = refuse_long(loaded, ids, self.answerer, self.task.max_new_tokens)
                failures += [(batch[place].question.key, reason) for place, reason in loaded.failures]
                kept = [batch[place] for place in loaded.kept]
                rows = self._rows(kept, ids, loaded)
                seconds = (time.perf_counter() - begin) / max(len(rows), 1)
                file.append([row | {"seconds": seconds} for row in rows if row["key"] not in done])
                bar.update(len(batch))
                begin = time.perf_counter()
        return failures

    def _item(self, question: Question) -> Item:
        pictures = len(question.visuals) * (_frames(self.task) if self.task.video else 1)
        return Item(question, pictures, tuple(self.answerer.prompt_ids(question.text, pictures)))

    def _ids(self, item: Item, count: int) -> Sequence[int]:
        return item.ids if item.pictures == count else self.answerer.prompt_ids(item.question.text, count)

    def _rows(self, kept: Sequence[Item], ids: Sequence[Sequence[int]], loaded: Any) -> list[dict[str, Any]]:
        """Ask one batch."""
        with duet.trace(images=False) as trace:
            texts = self.answerer.generate(ids, loaded.images(), loaded.sizes, self.task.max_new_tokens)
        model = self.answerer.model
        patches = [passes * model.get_vision_tower().num_patches for passes in loaded.passes]
        unreduced = tiled_tokens(model, loaded.sizes, loaded.counts)
        bad = self.answerer.non_finite
        metadata = sample_metadata(trace, patches, getattr(model.config, "tokenizer_model_max_length", None), unreduced)
        return [
            {
                "question_id": item.question.question_id,
                "prompt": self.task.stored_prompt(item.question),
                "text": text,
                "answer_id": hashlib.sha256(f"{self.settings.digest} {item.question.key}".encode()).hexdigest()[:22],
                "model_id": self.about["model_name"],
                "metadata": facts | ({"non_finite": True} if non_finite else {}),
                "key": item.question.key,
            }
            for item, text, facts, non_finite in zip(kept, texts, metadata, bad, strict=True)
        ]

    def _merge(self) -> list[dict[str, Any]]:
        """Write all answers in the benchmark's order."""
        done = self._done()
        rows = [done[question.key] for question in self.all_questions if question.key in done]
        write_lines(self.answers_path, ({k: v for k, v in row.items() if k != "seconds"} for row in rows))
        return rows

    def _look_at(self, rows: Sequence[dict[str, Any]], score: Score | None) -> list[str]:
        """What says that these answers are no result."""
        share = None if score is None or score.value > 100 else score.value / 100
        bad = sum(bool(row["metadata"].get("non_finite")) for row in rows)
        found = about_answers([row["text"] for row in rows], share, bad)
        if score is None or not self.options.trained:
            return found
        return found + about_chance(self.task.groups(self.all_questions, score))

    def _record(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        answers = [Answer(row["question_id"], row["prompt"], row["text"], row["key"]) for row in rows]
        score: Score = self.task.score(self.options.root, answers)
        self.findings = self._look_at(rows, score)
        model = self.answerer.model
        metadata = [row["metadata"] for row in rows]
        ledger = summarise(metadata, model.reduction, model.config.num_hidden_layers)
        ledger |= costs(metadata, model.reduction, ModelShape.of(model))
        seconds = [row["seconds"] for row in rows]
        return {
            "name": self.options.name,
            "benchmark": self.task.name,
            "title": self.task.title,
            "headline": score.headline,
            "metrics": score.metrics,
            "n_expected": score.expected,
            "n_scored": score.scored,
            "n_missing": len(score.missing),
            "n_unparsed": score.unparsed,
            "missing_skipped": bool(score.missing) and self.options.skip_missing,
            "missing": score.missing,
            "broken": self.findings,
            "failures": [{"key": key, "reason": reason} for key, reason in self.failures],
            "notes": score.notes,
            "visual_tokens": ledger,
            "seconds_per_sample": round(sum(seconds) / len(seconds), 6) if seconds else None,
            "processes": self.processes.world,
            "batch": self.options.batch,
            "digest": self.settings.digest,
            "settings": asdict(self.settings),
            "about": self.about,
        }


def versions() -> dict[str, str]:
    """Library versions and machine, for the record."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    }


def summary(record: dict[str, Any]) -> str:
    """One line about a benchmark's result."""
    tokens, seconds = record["visual_tokens"]["average_tokens"], record["seconds_per_sample"]
    parts = [f"{record['n_scored']} of {record['n_expected']} questions"]
    parts += [f"{record['n_missing']} without an answer"] if record["n_missing"] else []
    parts += [f"{tokens:g} visual tokens on average"] if tokens is not None else []
    parts += [f"{seconds:.4f} s a sample"] if seconds is not None else []
    if record["n_missing"] and not record["missing_skipped"]:
        value = "no score"
    else:
        value = f"{record['headline']} {record['metrics'][record['headline']]:.2f}"
    return f"{record['benchmark']}: {value} ({', '.join(parts)})"
