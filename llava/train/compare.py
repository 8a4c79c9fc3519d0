"""Train one model with several reductions from the same start, evaluate each, and compare: paper Tables 3 and 6.

    python -m llava.train.compare --methods duet,visionzip,random --budgets 192,128,64 --seeds 0,1,2 --benchmarks tiny \
        --root playground/tiny/eval --out results/training -- --max_steps 75

Every run is `scripts/finetune_duet.sh` (`scripts/finetune.sh` for the one without reduction) with the seed of its
column, then `python -m llava.eval` with the reduction that it was trained with. With PROJECTOR set to the projector of
one stage 1, all runs start from it. Flags after `--` are training flags and hold for all runs; RECIPE, LAUNCHER,
NUM_DEVICES and the scripts' other variables work here, too. A complete run is not repeated, an interrupted one is
resumed; `--part 1/2` and `--part 2/2` share the runs between two machines with a common folder. Weights are deleted
once a run is evaluated, unless `--keep-models` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import AutoConfig

from duet.cells import markdown_cell
from duet.errors import main_guard
from llava.eval.lines import Line, Run, make_lines
from llava.eval.plans import Geometry, Plan, choose_methods, draws, numbers, solved_plans
from llava.eval.plots import against_cost
from llava.eval.report import columns, number, read_records
from llava.eval.tables import conditions, content, markdown, write_csv
from llava.jsonl import read_lines
from llava.model.multimodal_encoder.clip_encoder import tower_geometry
from llava.sanity import SHORT_RUN
from llava.train.checkpoints import write_json_atomically
from llava.train.launch import Runner, build_tiny_data, comparable, run_stage
from llava.train.plan import Plan as TrainingPlan
from llava.train.plan import resolve

DONE = "training.json"
WEIGHTS = ("*.safetensors", "*.bin", "checkpoint-*")


@dataclass(frozen=True)
class Trial:
    """One model to train.

    Attributes:
        plan: with which reduction.
        seed: of its data order and everything else that is random.
        out: the comparison's folder.
    """

    plan: Plan
    seed: int
    out: Path

    @property
    def column(self) -> str:
        """What trials of one seed have in common; each is a percentage of the one without reduction."""
        return f"seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where its answers and scores go."""
        return self.out / self.column / self.plan.name

    @property
    def done(self) -> bool:
        """Whether it was trained and evaluated."""
        return (self.folder / DONE).is_file()

    def resolve(self, overrides: Sequence[str]) -> TrainingPlan:
        """Work out the training run.

        Raises:
            ValueError: a training flag cannot be used.
        """
        env = {**os.environ, "SEED": str(self.seed), "OUTPUT_ROOT": str(self.folder / "model")}
        if self.plan.config is None:
            return resolve("finetune", env, overrides)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "reduction.json"
        path.write_text(json.dumps(self.plan.config.to_dict()), encoding="utf-8")
        flags = ["--reduction_config", str(path)]
        flags += ["--reduction_seed", str(self.seed)] if draws(self.plan.config) else []
        return resolve("finetune_duet", env, [*overrides, *flags])


def read_geometry(plan: TrainingPlan) -> Geometry:
    """Patches of the tower and layers of the language model that will be put together."""
    flags = plan.stages[-1].flags
    tower: Any = tower_geometry(str(flags["vision_tower"]), None)
    layers = AutoConfig.from_pretrained(str(flags["model_name_or_path"])).num_hidden_layers
    return Geometry((tower.image_size // tower.patch_size) ** 2, layers)


def make_trials(
    methods: Sequence[str], budgets: Sequence[int], seeds: Sequence[int], geometry: Geometry, out: Path
) -> tuple[list[Trial], list[str]]:
    """The models to train, seed by seed, the one without reduction first; and what cannot be trained and why."""
    plans, refused = solved_plans(methods, budgets, [0], geometry, tolerant=True)
    return [Trial(plan, seed, out) for seed in seeds for plan in plans], refused


def train(trial: Trial, resolved: TrainingPlan, runner: Any) -> dict[str, Any] | None:
    """Train one model and return what it took; None when training failed."""
    if resolved.recipe.name == "tiny" and build_tiny_data(resolved, runner) != 0:
        return None
    for stage in resolved.stages:
        if run_stage(resolved, stage, runner) != 0:
            return None
    stage = resolved.stages[-1]
    return {"flags": comparable(stage), "model": str(stage.output)} | measured(stage.output / "train_log.jsonl")


def measured(log: Path) -> dict[str, Any]:
    """Seconds and tokens of a training step, from the run's log; the first interval warms up and is left out.

    Raises:
        ValueError: the run was too short to time a step.
    """
    lines = read_lines(log)
    steps = [line for line in lines if line.get("kind") == "metrics" and "seconds_per_step" in line]
    if not steps:
        raise ValueError(f"{log} has no timed step; train more steps than --logging_steps, or lower that")
    steady = steps[1:] or steps
    names = ("seconds_per_step", "seconds_language", "seconds_vision", "tokens_per_second")
    means = {name: fmean(line[name] for line in steady if name in line) for name in names if name in steady[0]}
    return means | {"steps": lines[-1].get("step"), "final_loss": steps[-1].get("loss")}


def evaluate(trial: Trial, facts: dict[str, Any], args: argparse.Namespace, runner: Any) -> bool:
    """Answer and score the benchmarks with the reduction that the checkpoint names.

    A result that is none (see `llava.sanity`) counts as a failure; after a training of some length chance is one, too.
    """
    command = [sys.executable, "-m", "llava.eval", "--model-path", facts["model"], "--benchmarks", args.benchmarks]
    command += ["--root", str(args.root), "--out", str(trial.out / trial.column), "--name", trial.plan.name]
    if (facts.get("steps") or 0) >= SHORT_RUN:
        command.append("--after-training")
    command += ["--device", args.device, "--batch", str(args.batch), "--workers", str(args.workers)]
    return runner.run(f"evaluate: {trial.plan.name}, {trial.column}", command) == 0


def delete_weights(folder: Path) -> None:
    """Delete what is large below a finished run's folder."""
    for pattern in WEIGHTS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_runs(trials: Sequence[Trial]) -> list[Run]:
    """Records of the complete trials, of the seeds whose run without reduction is complete."""
    complete = [trial for trial in trials if trial.done]
    bases = {trial.column for trial in complete if trial.plan.config is None}
    return [(trial.plan, trial.column, read_records(trial.folder)) for trial in complete if trial.column in bases]


def training_table(lines: Sequence[Line], trials: Sequence[Trial]) -> list[str]:
    """Measured training time of every line."""
    took: dict[tuple, list[dict[str, Any]]] = {}
    for trial in trials:
        if trial.done:
            facts = json.loads((trial.folder / DONE).read_text(encoding="utf-8"))
            took.setdefault(trial.plan.line, []).append(facts)
    base = fmean(one["seconds_per_step"] for line in lines if not line.plan.config for one in took[line.plan.line])
    rows = ["| method | budget | seconds a step | percent of full | steps | final loss |", "|---|---|---|---|---|---|"]
    for line in lines:
        facts, plan = took[line.plan.line], line.plan
        seconds = fmean(one["seconds_per_step"] for one in facts)
        loss = fmean(one["final_loss"] for one in facts)
        cells = [
            markdown_cell(plan.label),
            number(plan.budget or None, "g"),
            f"{seconds:.3f}",
            f"{100 * seconds / base:.0f} %",
        ]
        rows.append("| " + " | ".join([*cells, str(facts[0]["steps"]), f"{loss:.3f}"]) + " |")
    return rows


def write(trials: Sequence[Trial], refused: Sequence[str], geometry: Geometry, args: argparse.Namespace) -> None:
    """Write the table, its data and its plot, over what is complete."""
    runs = read_runs(trials)
    if not runs:
        return
    lines = make_lines(runs)
    names = columns([result.row for line in lines for result in line.results])
    missing = [f"{t.plan.label} at {t.plan.budget:g}, {t.column}: not trained yet" for t in trials if not t.done]
    flags = " ".join(args.flags) or "the recipe alone"
    heading = f"# Trained with each reduction\n\n{conditions(runs)} Training flags: {flags}."
    text = markdown(lines, names, geometry.patches, [*refused, *missing], heading)
    text += "\n## Training time\n\n" + "\n".join(training_table(lines, trials)) + "\n"
    (args.out / "training.md").write_text(text, encoding="utf-8")
    write_csv(args.out / "training.csv", lines, names)
    write_json_atomically(args.out / "training_lines.json", content(lines, [*refused, *missing]))
    against_cost(args.out / "training.png", lines)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.train.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default="duet,duet-all,duet-salient,visionzip,pyramiddrop,random,average_pool")
    parser.add_argument("--budgets", default="192,128,64", help="visual tokens per layer on average")
    parser.add_argument("--seeds", default="0,1,2", help="one training of everything for each")
    parser.add_argument("--benchmarks", default="tiny", help="names, separated by commas")
    parser.add_argument("--root", type=Path, default=Path("playground/data/eval"), help="where the benchmarks lie")
    parser.add_argument("--out", type=Path, default=Path("results/training"), help="where everything goes")
    parser.add_argument("--part", default="1/1", help="I/N: train only every N-th model, from the I-th on")
    parser.add_argument("--keep-models", action="store_true", help="keep the weights of evaluated models")
    parser.add_argument("--device", default="cuda", help="for the evaluation: cuda (NVIDIA and AMD) or cpu")
    parser.add_argument("--batch", type=int, default=8, help="questions at once")
    parser.add_argument("--workers", type=int, default=2, help="processes that load pictures")
    return parser


def parse_part(text: str) -> tuple[int, int]:
    """Read `--part`.

    Raises:
        ValueError: it is not I/N with 1 <= I <= N.
    """
    pieces = text.split("/")
    if len(pieces) == 2 and all(piece.isdigit() for piece in pieces) and 1 <= int(pieces[0]) <= int(pieces[1]):
        return int(pieces[0]), int(pieces[1])
    raise ValueError(f"--part {text}: expected I/N, for example 1/2 on one machine and 2/2 on the other")


def run(args: argparse.Namespace, make_runner: Callable[[Any], Any] = Runner) -> int:
    """Train and evaluate everything; returns the exit status.

    Args:
        args: the command line; `flags` holds the training flags.
        make_runner: what carries out a command, given the devices.

    Raises:
        ValueError: a wrong request.
    """
    part, parts = parse_part(args.part)
    methods, _ = choose_methods(args.methods)
    seeds = numbers("seeds", args.seeds)
    first = resolve("finetune", {**os.environ, "OUTPUT_ROOT": str(args.out / "model")}, args.flags)
    if not first.can_run:
        raise ValueError("; ".join(f"{item.what}: {item.remedy}" for item in first.missing))
    geometry = read_geometry(first)
    trials, refused = make_trials(methods, numbers("budgets", args.budgets, 1), seeds, geometry, args.out)
    mine = trials[part - 1 :: parts]
    for place, trial in enumerate(mine, start=1):
        print(f"[{place} of {len(mine)}] {trial.plan.label} at {trial.plan.budget:g}, {trial.column}", flush=True)
        if trial.done:
            continue
        resolved = trial.resolve(args.flags)
        with make_runner(resolved.devices) as runner:
            facts = train(trial, resolved, runner)
            if facts is None or not evaluate(trial, facts, args, runner):
                return 1
        write_json_atomically(trial.folder / DONE, facts)
        if not args.keep_models:
            delete_weights(Path(facts["model"]))
        write(trials, refused, geometry, args)
    write(trials, refused, geometry, args)
    return 0


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    own, flags = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    args = make_parser().parse_args(own)
    args.flags = flags
    return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
