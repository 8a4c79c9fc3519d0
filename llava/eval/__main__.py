"""Evaluate a model on the paper's benchmarks.

    python -m llava.eval --model-path MODEL --benchmarks pope,gqa --duet_tokens 192
    torchrun --nproc_per_node 8 -m llava.eval --model-path MODEL --benchmarks all

An interrupted run goes on where it stopped when the same command is given again. The table over all runs of a results
folder: python -m llava.eval.report RESULTS --baseline NAME. Exit status: 0; 1 for a wrong request; 2 if a file, a
picture or an answer is missing; 3 if what came out is no result (NaN, empty or identical answers, and with
--after-training chance): it is written and marked, and the reason is printed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duet.errors import INTERRUPTED, MISTAKES, UserError, main_guard, report
from llava.eval.generate import Answerer, template_for
from llava.eval.plans import read_geometry
from llava.eval.processes import Processes
from llava.eval.runner import (
    BenchmarkRun,
    RunOptions,
    load_questions,
    make_settings,
    missing_pictures,
    summary,
    versions,
)
from llava.eval.settings import model_fingerprint
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import BadEvalData, Question, Task, part_of
from llava.eval.video import require_reader
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.pictures import add_arguments as add_picture_arguments
from llava.reduction import ReductionArguments
from llava.sanity import BROKEN, BrokenResult, refuse, require_finite_weights

SHOWN = 10


class Incomplete(UserError):
    """Something that the run needs is not there; the message says what."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument("--name", default=None, help="row of the table (default: the model's name and its reduction)")
    parser.add_argument("--no-reduction", action="store_true", help="ignore the reduction that the checkpoint names")
    ReductionArguments.add_arguments(parser)
    return parser


def add_run_arguments(parser: argparse.ArgumentParser, model_help: str = "checkpoint folder or hub name") -> None:
    """Add the flags that say which model answers which benchmarks, where and how fast."""
    parser.add_argument("--model-path", required=True, help=model_help)
    parser.add_argument("--model-base", default=None, help="base model of a LoRA or projector folder")
    parser.add_argument("--benchmarks", required=True, help="names, separated by commas; all: every picture benchmark")
    parser.add_argument("--root", type=Path, default=Path("playground/data/eval"), help="where the benchmarks lie")
    parser.add_argument("--out", type=Path, default=Path("results/eval"), help="where answers and results go")
    parser.add_argument("--batch", type=int, default=8, help="questions at once; the answers do not depend on it")
    parser.add_argument("--workers", type=int, default=2, help="processes that load pictures, for each rank")
    parser.add_argument("--limit", type=int, default=None, help="ask only the first so many questions; no score")
    parser.add_argument(
        "--limit-pictures", type=int, default=None, metavar="N",
        help="ask and score questions about N pictures only, spread evenly",
    )  # fmt: skip
    add_picture_arguments(parser)
    parser.add_argument("--conv-mode", default=None, help="template (default: the model's own, else vicuna_v1)")
    parser.add_argument("--device", default="cuda", help="cuda (NVIDIA and AMD) or cpu")
    parser.add_argument("--dtype", default=None, help="float16, bfloat16 or float32 (default: fp16; fp32 on a CPU)")
    parser.add_argument("--load-8bit", action="store_true")
    parser.add_argument("--load-4bit", action="store_true")
    parser.add_argument(
        "--after-training", action="store_true",
        help="the model was trained for these benchmarks: scores at or below chance are an error",
    )  # fmt: skip
    parser.add_argument(
        "--on-missing", choices=("error", "skip"), default="error",
        help="skip: leave out benchmarks whose files are missing, and score with unanswered questions counted as wrong",
    )  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse contradicting or impossible flags.

    Raises:
        ValueError: naming the flag.
    """
    for flag, least in (("batch", 1), ("workers", 0), ("limit", 1), ("limit_pictures", 1), ("latency", 0)):
        value = getattr(args, flag, None)
        if value is not None and value < least:
            raise ValueError(f"--{flag.replace('_', '-')} {value} must be at least {least}")


def check_row(args: argparse.Namespace) -> None:
    """Refuse a name or a reduction that cannot be.

    Raises:
        ValueError: naming the flag.
    """
    given = ReductionArguments.from_namespace(args).given()
    if args.no_reduction and given:
        raise ValueError(f"--no-reduction contradicts --{next(iter(given))}; give one of them")
    if args.name is not None and (Path(args.name).name != args.name or args.name in (".", "..")):
        raise ValueError(f"--name {args.name!r} becomes a folder's name; leave out slashes")


def check_reduction(args: argparse.Namespace) -> None:
    """Refuse a reduction that does not fit the model, before its weights are loaded.

    Raises:
        ValueError: what does not fit.
    """
    if args.no_reduction or not ReductionArguments.from_namespace(args).given():
        return  # what the checkpoint itself names is checked when it is loaded
    geometry = read_geometry(args.model_path, args.model_base)
    config = ReductionArguments.from_namespace(args).to_config(geometry.reduction, geometry.preset)
    if config is not None:
        config.validate(geometry.patches, geometry.layers)


def choose_tasks(names: str, pictures: int | None = None) -> list[Task]:
    """The benchmarks by name; `all` is every one about pictures that has a column of its own in the paper's tables.

    Args:
        names: separated by commas.
        pictures: of how many pictures, None for all.

    Raises:
        ValueError: one is unknown, or cannot be asked in part.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if wanted == ["all"]:
        wanted = ["pope", "gqa", "textvqa", "mme", "scienceqa", "seed_image"]
    if not wanted:
        raise ValueError("--benchmarks names no benchmark")
    kinds = [TASKS.get(name) for name in dict.fromkeys(wanted)]
    return [kind() if pictures is None else part_of(kind, pictures) for kind in kinds]


def find_questions(
    tasks: list[Task], root: Path, limit: int | None, skip_missing: bool
) -> list[tuple[Task, list[Question]]]:
    """Check all files, then read the questions.

    Raises:
        Incomplete: files or pictures are missing; with `skip_missing` only if no benchmark is left.
        BadEvalData: a file is wrong.
        ImportError: there are videos, and what reads them is not installed.
    """
    problems: list[str] = []
    found = []
    for task in tasks:
        missing = [item for item in task.needed(root) if not item.path.exists()]
        problems += [
            f"{task.name}: {item.path} is missing ({item.what}); get it from {item.source}" for item in missing
        ]
        if missing:
            continue
        questions = load_questions(task, root)
        if task.video and any(path.suffix.lower() != ".gif" for q in questions for path in q.visuals):
            require_reader()
        gone = missing_pictures(questions[:limit])
        if gone:
            shown = "\n".join(f"  question {key}: {reason}" for key, reason in gone[:SHOWN])
            problems.append(f"{task.name}: {len(gone)} questions have no picture, among them\n{shown}")
        if not gone or skip_missing:
            found.append((task, questions))
    if problems and (not skip_missing or not found):
        advice = "no benchmark is left" if skip_missing else "--on-missing skip leaves these out"
        raise Incomplete("\n".join([*problems, f"nothing was run; {advice}"]))
    for problem in problems:
        print(problem, file=sys.stderr)
    return found


def load(args: argparse.Namespace, processes: Processes) -> tuple[Any, Any, Any]:
    """Load the model on this process's device.

    Raises:
        ValueError: it cannot take pictures, or it cannot be loaded.
    """
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        get_model_name_from_path(args.model_path),
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        device=processes.device(args.device),
        dtype=args.dtype,
        duet_config="none" if getattr(args, "no_reduction", True) else ReductionArguments.from_namespace(args),
    )
    if image_processor is None:
        raise ValueError(f"{args.model_path} is a plain language model; it cannot look at pictures")
    return tokenizer, model, image_processor


def default_name(model_name: str, model: Any) -> str:
    """The model's name, and the visual tokens that its reduction gives on average, if that is known."""
    if model.reduction is None:
        return model_name
    if model.reduction.adaptive:
        return f"{model_name}-duet-{model.reduction.stage1}"
    tokens = model.reduction.average_tokens(model.get_vision_tower().num_patches, model.config.num_hidden_layers)
    return f"{model_name}-duet-{round(tokens)}"


@dataclass(frozen=True)
class Session:
    """A loaded model and the benchmarks that it is asked.

    Attributes:
        args: the command line.
        processes: this process among all.
        found: benchmarks with their questions.
        tokenizer, model, image_processor: what answers.
        fingerprint: of the model's weights.
        broken: what says that a result is none, by its name; see `llava.sanity`.
    """

    args: argparse.Namespace
    processes: Processes
    found: list[tuple[Task, list[Question]]]
    tokenizer: Any
    model: Any
    image_processor: Any
    fingerprint: str
    broken: dict[str, list[str]] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        """The model's name, as its path says."""
        return get_model_name_from_path(self.args.model_path)

    def run(self, options: RunOptions) -> bool:
        """Run all benchmarks with the model's present reduction; returns whether every question was answered."""
        return self.records(options)[1]

    def records(self, options: RunOptions) -> tuple[list[dict[str, Any]], bool]:
        """Run all benchmarks with the model's present reduction.

        Returns:
            Their records (none in other processes than the first, and with a limit), and whether every question was
            answered.
        """
        args, model = self.args, self.model
        dtype = str(model.dtype).removeprefix("torch.") + ", 8 bit" * args.load_8bit + ", 4 bit" * args.load_4bit
        about = {
            "model_path": args.model_path,
            "model_base": args.model_base,
            "model_name": self.model_name,
            "device": str(model.device),
            "versions": versions(),
        }
        complete, records, broken = True, [], {}
        for task, questions in self.found:
            template = template_for(self.model_name, model.config, args.conv_mode, task.video)
            answerer = Answerer(model, self.tokenizer, self.image_processor, template)
            settings = make_settings(task, questions, args.root, answerer, self.fingerprint, dtype)
            run = BenchmarkRun(task, questions, answerer, settings, options, self.processes, about)
            record = run.run()
            if record is not None:
                records.append(record)
            if self.processes.first:
                complete &= report_run(run, record)
                broken[f"{options.name}, {task.name}"] = run.findings
        self.broken.update(self.processes.from_first(broken))
        return records, bool(self.processes.from_first(complete))


def open_session(args: argparse.Namespace, processes: Processes) -> Session:
    """Check flags and files, then load the model.

    Raises:
        Incomplete: a file or a picture is missing.
        ValueError: a wrong request, or wrong data.
    """
    check_arguments(args)
    tasks = choose_tasks(args.benchmarks, args.limit_pictures)
    for task in tasks:
        task.orientation = args.image_orientation
    found = find_questions(tasks, args.root, args.limit, args.on_missing == "skip")
    tokenizer, model, image_processor = load(args, processes)
    require_finite_weights(model, args.model_path)
    fingerprint = processes.from_first(
        model_fingerprint(args.model_path, args.model_base, model.config) if processes.first else None
    )
    return Session(args, processes, found, tokenizer, model, image_processor, fingerprint)


def run_options(args: argparse.Namespace, name: str) -> RunOptions:
    """How to run one row of the table."""
    skip = args.on_missing == "skip"
    return RunOptions(args.root, args.out, name, args.batch, args.workers, args.limit, skip, args.after_training)


def evaluate(args: argparse.Namespace, processes: Processes) -> bool:
    """Run all benchmarks with one reduction; returns whether every question was answered.

    Raises:
        Incomplete: a file or a picture is missing.
        ValueError: a wrong request, or wrong data.
        BrokenResult: what came out is no result.
    """
    check_row(args)
    check_reduction(args)
    session = open_session(args, processes)
    complete = session.run(run_options(args, args.name or default_name(session.model_name, session.model)))
    refuse(session.broken)
    return complete


def report_run(run: BenchmarkRun, record: dict[str, Any] | None) -> bool:
    """Print what came out of one benchmark; returns whether every question was answered."""
    if record is None:
        print(f"{run.task.name}: asked the first {len(run.questions)} of {len(run.all_questions)} questions, no score")
    else:
        print(summary(record))
    for key, reason in run.failures[:SHOWN]:
        print(f"  no answer to {key}: {reason}", file=sys.stderr)
    if len(run.failures) > SHOWN:
        print(f"  and {len(run.failures) - SHOWN} more", file=sys.stderr)
    for finding in run.findings:
        print(f"  BROKEN: {finding}")
    print(f"  {run.answers_path}")
    return not run.failures and (record is None or not record["n_missing"])


def guarded(args: argparse.Namespace, function: Callable[[argparse.Namespace, Processes], bool]) -> int:
    """Join the other processes, run, and turn errors into a line and an exit status."""
    processes = Processes()
    try:
        processes = Processes.join()
        complete = function(args, processes)
    except (Incomplete, BadEvalData) as error:
        if processes.first:
            report(error)
        return 2
    except BrokenResult as error:
        if processes.first:
            report(error)
        processes.leave()
        return BROKEN
    except MISTAKES as error:
        report(error)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    processes.leave()
    return 0 if complete or args.on_missing == "skip" else 2


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return guarded(make_parser().parse_args(argv), evaluate)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
