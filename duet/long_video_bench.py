"""Memory and time of long videos: ``python -m duet.long_video_bench``.

A Video-LLaVA of random weights reads videos of noise: some frames with all their tokens, then more and more frames that
stage 1 reduces, the longest two merged over time as well. Neither memory nor time depends on what a video shows.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from duet import attach, trace
from duet.bench_report import environment
from duet.config import DuetConfig
from duet.errors import main_guard
from duet.probe import peak_memory, seconds_of

MIB = 2**20
_VIDEO, _WORDS = 999, 20


@dataclass(frozen=True)
class Row:
    """What one video took.

    Attributes:
        name: what was done to it.
        frames: how many it has.
        tokens: visual tokens that entered the decoder.
        encode: seconds of tower, stage 1 and projector, one per round.
        encode_peak: bytes that those needed beyond weights and pixels.
        peak: bytes that the whole prefill needed.
    """

    name: str
    frames: int
    tokens: int
    encode: list[float]
    encode_peak: int
    peak: int


def build(args: argparse.Namespace) -> Any:
    """Return a Video-LLaVA of the wanted size with random weights."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=args.tower_width, intermediate_size=4 * args.tower_width, num_hidden_layers=args.tower_layers,
        num_attention_heads=max(1, args.tower_width // 64), image_size=args.image_size, patch_size=args.patch_size,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        hidden_size=args.width, intermediate_size=3 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64), vocab_size=1000, max_position_embeddings=1_000_000,
    )  # fmt: skip
    config = transformers.VideoLlavaConfig(
        vision_config=vision, text_config=text, image_token_index=_VIDEO - 1, video_token_index=_VIDEO
    )
    model: nn.Module = transformers.VideoLlavaForConditionalGeneration(config)
    return model.to(args.device, getattr(torch, args.dtype)).eval()


@torch.no_grad()
def measure(model: Any, name: str, config: DuetConfig, frames: int, rounds: int) -> Row:
    """Return what a video of so many frames takes."""
    vision = model.config.vision_config
    pixels = torch.randn(1, frames, 3, vision.image_size, vision.image_size, device=model.device, dtype=model.dtype)
    placeholders = frames * ((vision.image_size // vision.patch_size) ** 2 + 1)
    ids = torch.full((1, placeholders + _WORDS), 5, device=model.device)
    ids[:, 1 : placeholders + 1] = _VIDEO
    with attach(model, config) as handle:

        def encode() -> Any:
            family: Any = handle.family
            return family.pictures(model, {"pixel_values_videos": pixels})[0].encode(None).tokens

        def prefill() -> Any:
            return model(input_ids=ids, pixel_values_videos=pixels, logits_to_keep=1, use_cache=True).logits

        with trace(images=False) as record:
            prefill()
        seconds = [seconds_of(encode, model.device) for _ in range(rounds)]
        peaks = [peak_memory(run, model.device).tracked for run in (encode, prefill)]
    return Row(name, frames, record.passes[0][0].visual[0], seconds, *peaks)


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown; the first one is what peaks are compared with."""
    lines = [
        "| video | frames | tokens in | tower and stage 1, s (min to max) | per frame, ms | their peak MiB "
        "| prefill's peak MiB | of the first |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        median = statistics.median(row.encode)
        lines.append(
            f"| {row.name} | {row.frames} | {row.tokens} "
            f"| {median:.2f} ({min(row.encode):.2f} to {max(row.encode):.2f}) "
            f"| {1000 * median / row.frames:.1f} | {row.encode_peak / MIB:.0f} | {row.peak / MIB:.0f} "
            f"| {row.peak / rows[0].peak:.0%} |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="python -m duet.long_video_bench", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--frames_full", type=int, default=16, help="frames of the video that keeps all its tokens")
    made.add_argument("--frames", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="of the reduced ones")
    made.add_argument("--dominant", type=int, default=28, help="of each frame")
    made.add_argument("--contextual", type=int, default=8, help="of each frame")
    made.add_argument("--across_frames", type=float, default=0.25, help="share that stays when merged over time")
    made.add_argument("--image_size", type=int, default=336)
    made.add_argument("--patch_size", type=int, default=14)
    made.add_argument("--tower_width", type=int, default=128)
    made.add_argument("--tower_layers", type=int, default=6)
    made.add_argument("--width", type=int, default=256, help="of the language model")
    made.add_argument("--layers", type=int, default=4, help="of the language model")
    made.add_argument("--rounds", type=int, default=3, help="timed runs of tower and stage 1")
    made.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's choice)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    made.add_argument("--markdown", default=None, help="write the report here")
    return made


@main_guard
def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the report."""
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = build(args)
    budget = {"dominant": args.dominant, "contextual": args.contextual, "schedule": {}}
    rows = [measure(model, "all tokens", DuetConfig.none(), args.frames_full, args.rounds)]
    rows += [measure(model, "reduced", DuetConfig(**budget), frames, args.rounds) for frames in args.frames]
    merged = DuetConfig(**budget, across_frames=args.across_frames)
    rows += [measure(model, "merged, too", merged, frames, args.rounds) for frames in args.frames[-2:]]
    facts = {key: value for key, value in vars(args).items() if value is not None and key != "markdown"}
    facts |= environment(model.device)
    report = "\n".join(["# Long videos", "", *(f"- {key}: {value}" for key, value in facts.items()), "", table(rows)])
    print(report)
    if args.markdown:
        Path(args.markdown).write_text(report + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
