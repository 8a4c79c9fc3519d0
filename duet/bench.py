"""``python -m duet.bench``: what DUET saves in time and memory, next to what its FLOPs predict.

One process, one random-weight model, the configurations interleaved round by round (each round in another order), so
that drift of the machine meets all of them alike. Ratios are medians of the rounds' own ratios. Weights are random
because cost does not depend on them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import torch
from torch import nn

from duet import bench_plot, bench_report, methods
from duet.bench_device import pick_device, preprocessing_seconds
from duet.bench_eager import EAGER as EAGER_FAMILIES
from duet.bench_memory import run_equal_memory
from duet.bench_roofline import calibrate, predicted_flops
from duet.bench_run import EAGER, FULL, LANGUAGE, UNTOUCHED, Case, Entry, Plan, Row, configured, run_case
from duet.bench_shapes import PATCHES, SHAPES, QwenShape, Shape, bytes_needed, check_memory, memory_free
from duet.bench_stage1 import run_stage1
from duet.config import DuetConfig
from duet.errors import main_guard
from duet.probe import SECTIONS, PeakMemory

__all__ = [
    "FULL", "LANGUAGE", "SECTIONS", "SHAPES", "UNTOUCHED", "Case", "PeakMemory", "QwenShape", "Row", "Shape", "main",
    "make_parser", "pick_device", "predicted_flops",
]  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m duet.bench", description="Time and memory of full tokens, DUET and other methods."
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small model and few rounds: checks the tool, not the speed"
    )
    known = [name for name in SHAPES if "quick" not in name]
    parser.add_argument("--shape", default="mid", choices=known, help="the model's sizes; weights are random")
    parser.add_argument(
        "--visual_tokens",
        type=int,
        default=None,
        help="visual tokens of the picture (576; a Qwen: 1024, qwen-long 4096)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (ROCm devices are called cuda too)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--attention", default="sdpa", help="attention implementation of tower and decoder")
    parser.add_argument(
        "--batch", type=int, nargs="*", default=None, help="batch sizes of the prefill (1 4; quick: 1); may be none"
    )
    parser.add_argument("--train_batch", type=int, nargs="*", default=[1], help="batch sizes of the training step")
    parser.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        default=[192, 128, 64],
        help="rows of the paper's Table 12; of a picture with N visual tokens it is the N / 576th part of them",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="compare these at the same budgets, too: names of duet.methods, VISION+LANGUAGE, or all",
    )
    parser.add_argument(
        "--eager", action="store_true", help="every reduction a second time, forced to eager attention maps"
    )
    parser.add_argument(
        "--text",
        type=int,
        nargs="+",
        default=[64],
        help="text tokens: 35 before the image, as in LLaVA-1.5, and a short question after it",
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each configuration")
    parser.add_argument("--decode", type=int, default=8, help="decoding steps timed after each prefill; 0 for none")
    parser.add_argument(
        "--stage1_tokens",
        type=int,
        nargs="*",
        default=[],
        help="also time stage 1 alone at these numbers of visual tokens (576 and more)",
    )
    parser.add_argument(
        "--equal_memory",
        action="store_true",
        help="also time training steps with as many samples as fit where full tokens fit --train_batch of them",
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", default=None, help="write every single measurement here")
    parser.add_argument("--csv", default=None, help="write one line per case and configuration here")
    parser.add_argument("--markdown", default=None, help="write the report here")
    parser.add_argument("--plot", default=None, help="draw the report here (.png, .svg or .pdf; needs matplotlib)")
    return parser


def pick_shape(args: argparse.Namespace) -> Any:
    """Return the shape that the command line names; ``--quick`` takes a small one of the same family."""
    shape = SHAPES[args.shape]
    if args.quick:
        shape = SHAPES["qwen-quick" if isinstance(shape, QwenShape) else "quick"]
    return shape if args.visual_tokens is None else shape.with_tokens(args.visual_tokens)


def pick_cases(args: argparse.Namespace) -> list[Case]:
    """Return the cases, every batch size with every text length."""
    sizes: list[int] = [*(args.batch or []), *args.train_batch]
    if min(sizes, default=1) < 1 or min(args.text, default=0) < 2:
        raise ValueError("--batch and --train_batch must be 1 or more, and --text 2 or more")
    if args.rounds < 1 or args.decode < 0:
        raise ValueError("--rounds must be 1 or more, and --decode 0 or more")
    if args.stage1_tokens and min(args.stage1_tokens) < PATCHES:
        raise ValueError(f"--stage1_tokens must be {PATCHES} or more each")
    batches = ([1] if args.quick else [1, 4]) if args.batch is None else args.batch
    cases = [Case("prefill", batch, text, 0) for batch in batches for text in args.text]
    return cases + [Case("train", batch, text, text // 2) for batch in args.train_batch for text in args.text]


def pick_entries(args: argparse.Namespace, shape: Any) -> tuple[list[Entry], list[str]]:
    """Return the configurations to compare, and what ``--methods all`` had to leave out, with the reason."""
    entries, left_out = [Entry(UNTOUCHED, None), Entry(FULL, None)], []
    names = sorted(methods.METHODS) if args.methods == ["all"] else args.methods
    for budget in args.budgets:
        tokens = budget * shape.patches / PATCHES
        for name in ["duet", *(name for name in names if name != "duet")]:
            try:
                entries.append(Entry(f"{name}-{tokens:.0f}", _solve(name, budget, tokens, shape)))
            except ValueError as error:
                if args.methods != ["all"] or name == "duet":
                    raise
                left_out.append(f"{name}-{tokens:.0f}: {error}")
    if args.eager:
        entries += [Entry(entry.name + EAGER, entry.config, eager=True) for entry in entries[2:]]
    return entries, left_out


def _solve(name: str, budget: int, tokens: float, shape: Any) -> DuetConfig:
    if name == "duet" and shape.patches == PATCHES:
        return DuetConfig.preset("llava-1.5-7b", tokens=budget)
    return methods.solve(name, tokens, shape.patches, shape.layers)


def check_entries(model: nn.Module, entries: list[Entry], may_leave_out: bool) -> tuple[list[Entry], list[str]]:
    """Attach each configuration once, so that none fails in the middle of a run.

    Returns those that work with this model, and the others with the reason.

    Raises:
        ValueError: one does not work, and none may be left out.
    """
    good, left_out = [], []
    for entry in entries:
        try:
            if entry.eager and model.config.model_type not in EAGER_FAMILIES:  # type: ignore[union-attr]
                raise ValueError(f"no eager stand-in for {model.config.model_type}")  # type: ignore[union-attr]
            with configured(model, entry):
                good.append(entry)
        except ValueError as error:
            if not may_leave_out:
                raise
            left_out.append(f"{entry.name}: {error}")
    return good, left_out


@main_guard
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 when it ran, whatever the numbers say."""
    args = make_parser().parse_args(arguments)
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.plot:
        bench_plot.check_plotting()
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    started, load = time.time(), os.getloadavg()[0]
    shape, cases = pick_shape(args), pick_cases(args)
    entries, left_out = pick_entries(args, shape)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    check_memory(shape, bytes_needed(shape, cases, dtype, args.eager), memory_free(device), device)
    machine = calibrate(device, dtype, args.quick)
    results, fits = [], []
    if cases:
        model = shape.build(device, dtype, args.attention)
        entries, more = check_entries(model, entries, args.methods == ["all"])
        left_out += more
        plan = Plan(rounds, min(args.decode, 2) if args.quick else args.decode, machine, say)
        results = [(case, run_case(model, shape, case, entries, plan)) for case in cases]
        training = [case for case in cases if case.kind == "train" and args.equal_memory]
        fits = [(case, run_equal_memory(model, shape, case, entries, plan)) for case in training]
    points = run_stage1(shape, args.stage1_tokens, rounds, device, dtype, say) if args.stage1_tokens else []

    prepared = preprocessing_seconds(shape)
    facts = bench_report.environment(device) | {
        "model": f"{shape}",
        "visual_tokens": shape.patches,
        "dtype": args.dtype,
        "attention": args.attention,
        "text_tokens": args.text[0] if len(args.text) == 1 else args.text,
        "rounds": rounds,
        **machine.facts(),
        "image preprocessing": "no processor" if prepared is None else f"{1e3 * prepared:.1f} ms a photo of 640 x 480",
        "load_before": round(load, 2),
        "seconds_in_all": round(time.time() - started),
        "command": "python -m duet.bench " + " ".join(arguments if arguments is not None else sys.argv[1:]),
    }
    facts |= {"left out": "; ".join(left_out)} if left_out else {}
    text = bench_report.markdown(
        results, facts, SECTIONS, LANGUAGE, FULL, judge=not args.quick, points=points, fits=fits
    )
    print(text)
    bench_report.write(args.markdown, lambda: text)
    if results or not points:
        bench_report.write(args.csv, lambda: bench_report.csv_text(results, SECTIONS, LANGUAGE, FULL))
    if args.csv and points:
        path = args.csv.removesuffix(".csv") + "_stage1.csv"
        bench_report.write(path, lambda: bench_report.stage1_csv(points))
    bench_report.write(args.json, lambda: bench_report.json_text(results, facts, points, fits))
    if args.plot:
        bench_plot.save_plot(args.plot, results, points, f"{shape.name}, {facts['device']}, {facts['date']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
