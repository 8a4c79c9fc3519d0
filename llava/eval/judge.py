"""Let a chat model judge answers about videos, as the published numbers do.

OPENAI_API_BASE=https://host/v1 OPENAI_API_KEY=... python -m llava.eval.judge --judge-model MODEL \\
    --predictions merge.jsonl --out judged

With --result FILE.result.json, the answers of python -m llava.eval are judged and the figures go into that record, from
where python -m llava.eval.report takes them.

The endpoint and its key come from the environment. Every judgement is kept on disk, so that an interrupted run
continues and nothing is paid for twice. A judge's figures are comparable only with the same judge and prompt, so both
are stored beside them. Without --judge-model the answers are compared by rules, for which no network is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from duet.errors import main_guard
from llava.eval.answers import read_answers, write_json, write_lines
from llava.eval.chat import Chat, Endpoint
from llava.eval.files import Row, as_row, read_json, read_json_lines, short
from llava.eval.judging import PROMPT, Cache, Case, Judge, Outcome, Prompt, cases_of
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import BadEvalData, Score
from llava.eval.tasks.video_qa import RULES, Judged, VideoQA, add_judgement, rule_marks

CACHE_FILE = "judgements.jsonl"
RESULT_FILE = "judge.json"
ROWS_FILE = "judged.jsonl"
RESULT_SUFFIX = ".result.json"
_CHARACTERS_PER_TOKEN = 4
_SHOWN = 5


def read_predictions(paths: Iterable[Path]) -> list[Case]:
    """Read Video-LLaVA's predictions, `{id, question, answer, pred}` per line or as one array, from all files.

    Raises:
        BadEvalData: a file is malformed, holds nothing, or an id occurs twice.
    """
    cases: dict[str, Case] = {}
    for path in paths:
        for row in _rows(path):
            if "pred" not in row.data and {"text", "prompt"} <= row.data.keys():
                raise BadEvalData(
                    f"{row.where}: this is a file of llava.eval, without references; add --benchmark NAME"
                )
            name = str(row.get("id", str, int))
            if name in cases:
                raise BadEvalData(f"{row.where}: id {short(name)} occurs twice; the file was written twice")
            answer = str(row.get("answer", str, int))
            cases[name] = Case(name, row.get("question", str), answer, row.get("pred", str))
    if not cases:
        raise BadEvalData(f"no predictions in {', '.join(map(str, paths))}")
    return list(cases.values())


def _rows(path: Path) -> list[Row]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            array = file.read(1) == "["
    except (OSError, UnicodeDecodeError) as error:
        raise BadEvalData(f"predictions {path} cannot be read: {error}") from error
    if not array:
        return read_json_lines(path)
    return [as_row(data, f"{path}, record {number}") for number, data in enumerate(read_json(path, list))]


def score_predictions(cases: Sequence[Case], judged: Judged | None) -> Score:
    """Score predictions that carry their references, by rules and by a judge's verdicts where there are any."""
    marks = [rule_marks(case.prediction, case.answer) for case in cases]
    metrics = {rule: 100.0 * sum(mark[rule] for mark in marks) / len(marks) for rule in RULES}
    score = Score("contains", metrics, expected=len(cases), scored=len(cases))
    add_judgement(score, judged, [case.id for case in cases])
    return score


def estimate(judge: Judge, wanted: Sequence[Case]) -> str:
    """What judging these answers takes if every first reply can be read, in words; a token is about 4 letters."""
    letters = sum(len(message["content"]) for case in wanted for message in judge.prompt.messages(case))
    limit = judge.chat.options.get("max_completion_tokens", judge.chat.options.get("max_tokens"))
    replies = f"at most {len(wanted) * limit}" if isinstance(limit, int) else "any number of"
    return f"about {letters // _CHARACTERS_PER_TOKEN} prompt tokens, {replies} reply tokens without retries"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.judge",
        description="Judge answers about videos with a chat model; its endpoint and key come from OPENAI_API_BASE (or "
        "OPENAI_API_URL) and OPENAI_API_KEY.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--predictions", "--pred_path", nargs="+", type=Path, metavar="FILE",
        help="Video-LLaVA's predictions {id, question, answer, pred}; with --benchmark an answers file of llava.eval",
    )  # fmt: skip
    source.add_argument("--result", type=Path, help="a record of python -m llava.eval; its answers are judged")
    add("--out", "--output_dir", type=Path, help="folder for judgements and result (default: beside --result)")
    add("--judge-model", "--judge_model", help="the judge's name at the endpoint; without it: rules, no network")
    add("--benchmark", help="msvd_qa, msrvtt_qa or tgif_qa, with --predictions")
    add("--root", type=Path, default=Path("playground/data/eval"), help="where the benchmarks lie")
    add("--prompt-file", "--prompt_file", type=Path, help="other prompt: system text, a line ---, user text")
    add("--num-tasks", "--num_tasks", type=int, default=8, help="requests at a time")
    add("--max-calls", "--max_calls", type=int, help="requests at most, retries included (default: twice the answers)")
    add("--tries", type=int, default=3, help="replies to ask for until one can be read")
    add("--timeout", type=float, default=60.0, help="seconds that a connection or a read may take")
    add("--request-options", "--request_options", type=json.loads, default={}, metavar="JSON",
        help="further fields of a request; null removes one of ours (temperature, max_tokens)")  # fmt: skip
    add("--cache", type=Path, help=f"file of judgements (default: {CACHE_FILE} in --out); may serve several runs")
    add("--on-missing", "--on_missing", choices=("error", "skip"), default="error",
        help="skip: answers without a verdict do not make the exit status 2")  # fmt: skip
    add("--dry-run", "--dry_run", action="store_true", help="say what it would cost, and stop")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for values that cannot work."""
    for name in ("num_tasks", "tries", "max_calls"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if not isinstance(args.request_options, dict):
        raise ValueError("--request-options must be a JSON object")
    if args.benchmark and args.result:
        raise ValueError("--result names its benchmark itself; leave out --benchmark")
    if args.benchmark and len(args.predictions) > 1:
        raise ValueError("--benchmark takes one answers file")
    if not args.out and not args.result:
        raise ValueError("--out is missing: the folder for judgements and result")


@dataclasses.dataclass
class Work:
    """What is to be judged.

    Attributes:
        cases: the answers with their references.
        out: folder for judgements and result.
        score: scores the answers, given the verdicts or None.
        source: names of the files that hold the answers.
        benchmark: name of the benchmark, or None.
        record: the runner's record to be completed, or None.
    """

    cases: list[Case]
    out: Path
    score: Callable[[Judged | None], Score]
    source: list[str]
    benchmark: str | None = None
    record: dict[str, Any] | None = None


def read_work(args: argparse.Namespace) -> Work:
    """Read what the flags name.

    Raises:
        BadEvalData: a file is malformed, or there is nothing to judge.
        ValueError: the benchmark is unknown, or scored by a rule of its own.
    """
    record, files, name, out = None, args.predictions, args.benchmark, args.out
    if args.result:
        record = read_json(args.result, dict)
        name = as_row(record, str(args.result)).get("benchmark", str)
        stem = args.result.name.removesuffix(RESULT_SUFFIX)
        files, out = [args.result.with_name(f"{stem}.jsonl")], out or args.result.with_name(f"{stem}.judge")
    names = [file.name for file in files]
    if name is None:
        cases = read_predictions(files)
        return Work(cases, out, lambda judged: score_predictions(cases, judged), names)
    task = TASKS.get(name)()
    if not isinstance(task, VideoQA):
        raise ValueError(f"benchmark {name!r} is scored by its own rule and has no judge")
    answers = read_answers(files[0])
    cases = cases_of(task, args.root, answers)
    if not cases:
        raise BadEvalData(f"{files[0]} holds no answers")
    return Work(cases, out, lambda judged: task.score(args.root, answers, judged), names, name, record)


def run(args: argparse.Namespace) -> int:
    """Judge (or only compare) the predictions, write the result, and say it; returns the exit status.

    Raises:
        BadEvalData: a file is malformed.
        ValueError: a flag is.
        EndpointError: no endpoint is set.
    """
    check_arguments(args)
    work = read_work(args)
    work.out.mkdir(parents=True, exist_ok=True)
    judge, outcome = _judge(args, work) if args.judge_model else (None, Outcome())
    if outcome is None:
        return 0
    score = work.score(judge.judged(outcome) if judge else None)
    complete = not (score.missing or outcome.unparsed or outcome.failed or outcome.stopped)
    result = {
        "benchmark": work.benchmark,
        "predictions": work.source,
        "complete": complete,
        "score": dataclasses.asdict(score),
        "judge": judge.record(outcome) if judge else None,
        "judged": len(outcome.verdicts),
        "unparsed": outcome.unparsed,
        "failed": outcome.failed,
        "stopped": outcome.stopped,
        "spent_now": dataclasses.asdict(judge.chat.usage) if judge else None,
    }
    if judge:
        write_lines(work.out / ROWS_FILE, _rows_of(work.cases, outcome))
    write_json(work.out / RESULT_FILE, result)
    _say(result, score)
    if not complete and (args.on_missing == "error" or outcome.stopped):
        print("incomplete, so no headline: run the same command again, or add --on-missing skip", file=sys.stderr)
        return 2
    if work.record is not None and judge and outcome.verdicts:
        write_json(args.result, work.record | _changes(score, result["judge"]))
    print(f"{score.headline}: {score.value:.2f}")
    return 0


def _changes(score: Score, judge: dict[str, Any]) -> dict[str, Any]:
    """What a judge changes in the runner's record."""
    return {
        "headline": score.headline,
        "metrics": score.metrics,
        "n_unparsed": score.unparsed,
        "missing_skipped": bool(score.missing),
        "notes": score.notes,
        "judge": judge,
    }


def _judge(args: argparse.Namespace, work: Work) -> tuple[Judge, Outcome | None]:
    """Say what it will cost, and ask; no outcome where only that was wanted."""
    endpoint = Endpoint("http://dry-run") if args.dry_run else Endpoint.from_environment(args.timeout)
    prompt = Prompt.from_file(args.prompt_file) if args.prompt_file else PROMPT
    with Cache(args.cache or work.out / CACHE_FILE) as cache:
        chat = Chat(endpoint, args.judge_model, args.request_options)
        judge = Judge(chat, prompt, cache, args.tries)
        wanted = list(judge.open_cases(work.cases).values())
        chat.max_calls = args.max_calls or max(10, 2 * len(wanted))
        print(f"{len(wanted)} judgements to ask for, {len(work.cases)} answers: {estimate(judge, wanted)};")
        print(f"at most {chat.max_calls} requests (--max-calls)")
        if args.dry_run:
            return judge, None
        with tqdm(total=len(wanted), unit="answers", disable=not sys.stderr.isatty()) as bar:
            return judge, judge.run(work.cases, args.num_tasks, bar.update)


def _rows_of(cases: Iterable[Case], outcome: Outcome) -> Iterator[dict[str, Any]]:
    for case in cases:
        verdict = outcome.verdicts.get(case.id)
        said = None if verdict is None else {"pred": "yes" if verdict.right else "no", "score": verdict.score}
        yield {"id": case.id, "question": case.question, "answer": case.answer, "pred": case.prediction, "judge": said}


def _say(result: dict[str, Any], score: Score) -> None:
    for name, value in score.metrics.items():
        print(f"  {name}: {value:.2f}")
    for note in score.notes:
        print(f"note: {note}")
    if result["stopped"]:
        print(f"stopped: {result['stopped']}", file=sys.stderr)
    if score.missing:
        print(f"{len(score.missing)} questions have no answer: {_some(score.missing)}", file=sys.stderr)
    for what, reasons in (("could not be read", result["unparsed"]), ("failed", result["failed"])):
        if reasons:
            first = next(iter(reasons.values()))
            print(f"{len(reasons)} judgements {what}: {_some(list(reasons))}; the first: {first}", file=sys.stderr)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for wrong input, 2 where something is missing, 130 when interrupted."""
    return run(make_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
