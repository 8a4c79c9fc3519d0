"""``python -m duet.bench``: what DUET saves in time and memory, next to what its FLOPs predict.

One process, one random-weight LLaVA, the configurations interleaved round by round (each round in another order), so
that drift of the machine meets all of them alike. Ratios are medians of the rounds' own ratios. Weights are random
because cost does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from duet import bench_report
from duet.attach import attach
from duet.budget import DecoderShape, vision_flops
from duet.config import DuetConfig
from duet.probe import SECTIONS, Parts, PeakMemory, Probe, peak_memory

UNTOUCHED = "transformers"  # the model as the library runs it
FULL = "full"  # all tokens, through DUET's code
PATCH = 14
IMAGE = 336
PATCHES = (IMAGE // PATCH) ** 2
BEFORE_IMAGE = 35  # text tokens of LLaVA-1.5's template in front of the image


@dataclass(frozen=True)
class Shape:
    """A LLaVA by its sizes (widths in elements)."""

    name: str
    tower_width: int
    tower_heads: int
    tower_layers: int
    width: int
    heads: int
    layers: int
    mlp_width: int
    vocabulary: int

    def build(self, device: torch.device, dtype: torch.dtype, attention: str) -> nn.Module:
        """Make the model with random weights, frozen tower, everything else trainable."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        vision = CLIPVisionConfig(
            hidden_size=self.tower_width,
            intermediate_size=4 * self.tower_width,
            num_hidden_layers=self.tower_layers,
            num_attention_heads=self.tower_heads,
            image_size=IMAGE,
            patch_size=PATCH,
        )
        text = LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocabulary,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.vocabulary - 1,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        config._attn_implementation = attention
        torch.manual_seed(0)
        model: nn.Module = LlavaForConditionalGeneration(config)
        model = nn.Module.to(model, device=device, dtype=dtype)
        Parts.of_llava(model)  # fail here, not in the middle of a run
        model.get_submodule("model.vision_tower").requires_grad_(False)
        return model.eval()


SHAPES = {
    "mid": Shape("mid", 1024, 16, 24, 1024, 16, 16, 2752, 32000),
    "quick": Shape("quick", 64, 2, 3, 64, 2, 8, 172, 512),
}


@dataclass(frozen=True)
class Case:
    """One kind of work: prefill or training step at one batch size."""

    kind: str
    batch: int
    text: int
    supervised: int

    def inputs(self, model: nn.Module, shape: Shape, device: torch.device) -> dict[str, torch.Tensor]:
        """System prompt, image, question; labels on the last ``supervised`` positions."""
        generator = torch.Generator().manual_seed(1)
        before = min(BEFORE_IMAGE, self.text // 2)
        after = self.text - before
        image_id = shape.vocabulary - 1
        text = torch.randint(3, shape.vocabulary - 1, (self.batch, self.text), generator=generator)
        image = torch.full((self.batch, PATCHES), image_id)
        ids = torch.cat([text[:, :before], image, text[:, before:]], dim=1)
        pixels = torch.randn(self.batch, 3, IMAGE, IMAGE, generator=generator)
        out = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels.to(next(model.parameters()).dtype),
        }
        if self.kind == "train":
            labels = torch.full_like(ids, -100)
            labels[:, -min(self.supervised, after) :] = ids[:, -min(self.supervised, after) :]
            out["labels"] = labels
        return {name: value.to(device) for name, value in out.items()}


@dataclass
class Row:
    """What was measured and predicted for one configuration of one case.

    ``flops`` counts what a causal kernel computes, ``flops_square`` bills attention as the full square.
    """

    name: str
    tokens_entering: int
    tokens_average: float
    flops: dict[str, float]
    flops_square: dict[str, float]
    seconds: list[dict[str, float]] = field(default_factory=list)
    memory: PeakMemory | None = None

    def median(self, *sections: str) -> float:
        """Median seconds of the sum of some sections."""
        return statistics.median(sum(run[s] for s in sections) for run in self.seconds)

    def spread(self, section: str) -> tuple[float, float]:
        """Smallest and largest seconds of a section."""
        values = [run[section] for run in self.seconds]
        return min(values), max(values)


LANGUAGE = ("decoder", "stage2", "head", "backward")


def predicted_flops(
    shape: Shape, case: Case, config: DuetConfig | None, untouched: bool = False, causal: bool = False
) -> dict[str, float]:
    """FLOPs of the vision part and of the language part (multiply and add count as two).

    In a training step the tower runs forward only, the projector costs 2.5 times its forward (nothing asks for the
    gradient of the features) and the language model three times. The decoder's attention is billed as the full square,
    or with ``causal`` as the triangle that is computed.
    """
    config = config or DuetConfig.none()
    layers = shape.tower_layers - (0 if untouched else 1)
    entering = config.entering_tokens(PATCHES)
    tower = vision_flops(PATCHES, shape.tower_width, 4 * shape.tower_width, layers)
    tower += 2 * 3 * PATCH * PATCH * shape.tower_width * PATCHES
    projector = 2 * entering * (shape.tower_width * shape.width + shape.width * shape.width)
    decoder = DecoderShape(
        layers=shape.layers,
        width=shape.width,
        mlp_width=shape.mlp_width,
        heads=shape.heads,
        kv_heads=shape.heads,
        head_dim=shape.width // shape.heads,
        vocabulary=shape.vocabulary,
    )
    positions = [case.text + n for n in config.tokens_per_layer(PATCHES, shape.layers)]
    train = case.kind == "train"
    # With labels a Hugging Face model returns the logits of every position that reaches the head.
    language = decoder.prefill_flops(positions, head_positions=positions[-1] if train else 1, causal=causal)
    scale = case.batch
    return {
        "vision": scale * (tower + projector * (2.5 if train else 1)),
        "language": scale * language * (3 if train else 1),
    }


def run_once(model: nn.Module, inputs: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """One prefill (no optimizer) or one training step, unmeasured."""
    if optimizer is None:
        with torch.inference_mode():
            model(**inputs, use_cache=True, logits_to_keep=1)
        return
    model(**inputs, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def time_once(
    model: nn.Module, parts: Parts, inputs: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer | None
) -> dict[str, float]:
    """Seconds of each section of one prefill or training step, and their sum under ``total``."""
    device = next(model.parameters()).device
    probe = Probe(parts, device)
    if optimizer is None:
        with torch.inference_mode(), probe:
            model(**inputs, use_cache=True, logits_to_keep=1)
        return probe.seconds() | {"backward": 0.0, "optimizer": 0.0}
    with probe:
        loss = model(**inputs, use_cache=False).loss
    forward = probe.seconds()
    start = time.perf_counter()
    loss.backward()
    middle = _now(device)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    end = _now(device)
    forward["total"] += end - start
    return forward | {"backward": middle - start, "optimizer": end - middle}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def configured(model: nn.Module, name: str, config: DuetConfig | None) -> Iterator[None]:
    """The model with a configuration attached; untouched for the row that says so."""
    if name == UNTOUCHED:
        yield
    else:
        with attach(model, config or DuetConfig.none()):
            yield


def run_case(
    model: nn.Module,
    shape: Shape,
    case: Case,
    configs: dict[str, DuetConfig | None],
    rounds: int,
    say: Callable[[str], None],
) -> list[Row]:
    """Measure all configurations of a case, interleaved."""
    device = next(model.parameters()).device
    inputs = case.inputs(model, shape, device)
    parts = Parts.of_llava(model)
    optimizer = None
    if case.kind == "train":
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-6, fused=True)
    model.train(case.kind == "train")
    rows = []
    for name, config in configs.items():
        used = config or DuetConfig.none()
        rows.append(
            Row(
                name,
                used.entering_tokens(PATCHES),
                used.average_tokens(PATCHES, shape.layers),
                predicted_flops(shape, case, config, untouched=name == UNTOUCHED, causal=True),
                predicted_flops(shape, case, config, untouched=name == UNTOUCHED),
            )
        )
    for row in rows:  # also the warm-up: every configuration has run twice before it is timed
        with configured(model, row.name, configs[row.name]):
            gc.collect()
            row.memory = peak_memory(lambda: run_once(model, inputs, optimizer), device)
    for number in range(rounds):
        shift = number % len(rows)
        for row in rows[shift:] + rows[:shift]:
            gc.collect()
            with configured(model, row.name, configs[row.name]):
                row.seconds.append(time_once(model, parts, inputs, optimizer))
        say(f"{case.kind} batch {case.batch}: round {number + 1} of {rounds}")
    return rows


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m duet.bench", description="Time and memory of full tokens and DUET."
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small model and few rounds: checks the tool, not the speed"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (ROCm devices are called cuda too)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--attention", default="sdpa", help="attention implementation of tower and decoder")
    parser.add_argument("--batch", type=int, nargs="+", default=None, help="batch sizes of the prefill (1 4; quick: 1)")
    parser.add_argument("--train_batch", type=int, nargs="*", default=[1], help="batch sizes of the training step")
    parser.add_argument("--budgets", type=int, nargs="+", default=[192, 128, 64], help="rows of the paper's Table 12")
    parser.add_argument(
        "--text",
        type=int,
        default=64,
        help="text tokens: 35 before the image, as in LLaVA-1.5, and a short question after it",
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each configuration")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", default=None, help="write every single measurement here")
    parser.add_argument("--csv", default=None, help="write one line per case and configuration here")
    parser.add_argument("--markdown", default=None, help="write the report here")
    return parser


def pick_device(name: str) -> torch.device:
    """Return the device, or leave with a clear message when this machine does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SystemExit(f"duet.bench: unknown device {name!r}; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("duet.bench: --device cuda, but PyTorch sees no CUDA or ROCm device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SystemExit(f"duet.bench: no device {name}; there are {torch.cuda.device_count()}")
    if device.type not in ("cpu", "cuda"):
        raise SystemExit(f"duet.bench: cannot measure on {device.type!r}; use cpu, cuda or cuda:N")
    return device


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 when it ran, whatever the numbers say."""
    args = make_parser().parse_args(arguments)
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = SHAPES["quick" if args.quick else "mid"]
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    started, load = time.time(), os.getloadavg()[0]
    model = shape.build(device, getattr(torch, args.dtype), args.attention)
    configs: dict[str, DuetConfig | None] = {UNTOUCHED: None, FULL: None}
    configs |= {f"duet-{n}": DuetConfig.preset("llava-1.5-7b", tokens=n) for n in args.budgets}
    cases = [Case("prefill", batch, args.text, 0) for batch in args.batch or ([1] if args.quick else [1, 4])]
    cases += [Case("train", batch, args.text, args.text // 2) for batch in args.train_batch]

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    results = [(case, run_case(model, shape, case, configs, rounds, say)) for case in cases]
    facts = bench_report.environment(device) | {
        "model": f"{shape}",
        "dtype": args.dtype,
        "attention": args.attention,
        "text_tokens": args.text,
        "rounds": rounds,
        "load_before": round(load, 2),
        "seconds_in_all": round(time.time() - started),
        "command": "python -m duet.bench " + " ".join(arguments if arguments is not None else sys.argv[1:]),
    }
    text = bench_report.markdown(results, facts, SECTIONS, LANGUAGE, FULL, judge=not args.quick)
    print(text)
    bench_report.write(args.markdown, lambda: text)
    bench_report.write(args.csv, lambda: bench_report.csv_text(results, SECTIONS, LANGUAGE, FULL))
    bench_report.write(args.json, lambda: bench_report.json_text(results, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
