"""Writes the tiny video world in LLaVA's format: `python -m playground.tiny.build_video --out FOLDER`.

Files: `pretrain.json` (still frames with a caption, for the projector), `train.json` (clips with questions),
`heldout.json` (one question a record, with `kind` and `answer`), the pictures and the clips (GIF, 12 frames of 112 px).
The same arguments always write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from duet.errors import main_guard
from playground.tiny.build import PROMPT, QUALITY
from playground.tiny.questions import caption
from playground.tiny.scenes import IMAGE_SIZE, make_window
from playground.tiny.video_questions import CHANCE, KINDS, UNORDERED, ask
from playground.tiny.video_scenes import SIDE, make_clip, save_clip

SEED = 23
_STREAM = {"pretrain": 0, "train": 1, "heldout": 2}
OFFSET = (IMAGE_SIZE - SIDE) // 2
"""Where a frame's corner lies in the large images that the tower was trained on: in their middle."""


def conversation(turns: list[tuple[str, str]], mark: str) -> list[dict[str, str]]:
    """Turns in LLaVA's format, with the mark before the first question."""
    said = []
    for number, (question, answer) in enumerate(turns):
        said.append({"from": "human", "value": f"{mark}\n{question}" if number == 0 else question})
        said.append({"from": "gpt", "value": answer})
    return said


def still_record(folder: str, seed: int, index: int) -> list[dict[str, Any]]:
    """Write one still frame with some digits; returns its record, with a caption."""
    pixels, digits = make_window("train", seed * 10 + _STREAM["pretrain"], index, SIDE)
    name = f"pretrain/{index:06d}.jpg"
    Image.fromarray(pixels).save(os.path.join(folder, name), quality=QUALITY)
    placed = tuple(replace(digit, x=digit.x + OFFSET, y=digit.y + OFFSET) for digit in digits)
    said = conversation([(PROMPT, caption(placed))], "<image>")
    return [{"id": f"still-{index:06d}", "image": name, "conversations": said}]


def clip_records(folder: str, split: str, seed: int, turns: int, index: int) -> list[dict[str, Any]]:
    """Write one clip; returns its records: one conversation for training, one question each for the held-out split."""
    clip = make_clip(split, seed * 10 + _STREAM[split], index)
    rng = np.random.default_rng([seed, _STREAM[split], index, 78])
    name = f"{split}/{index:06d}.gif"
    save_clip(clip, os.path.join(folder, name))
    base = f"{split}-{index:06d}"
    if split == "heldout":
        asked = [(kind, *ask(kind, clip.tracks, rng)) for kind in KINDS]
        return [
            {"id": f"{base}-{kind}", "video": name, "conversations": conversation([(question, answer)], "<video>")}
            | {"kind": kind, "question": question, "answer": answer}
            for kind, question, answer in asked
        ]
    # "order" gives the others away, so it comes first or last; "move" is learned slowest, so it is asked often.
    kinds = [str(kind) for kind in rng.permutation([kind for kind in KINDS if kind != "order"] + ["move"] * 3)]
    kinds = ["order", *kinds] if rng.random() < 0.35 else [*kinds, "order"]
    asked = list(dict.fromkeys(ask(kind, clip.tracks, rng) for kind in kinds))[-turns:]
    return [{"id": base, "video": name, "conversations": conversation(asked, "<video>")}]


def build(folder: str, name: str, count: int, work: Callable[[int], list[dict[str, Any]]], workers: int) -> str:
    """Write one file and what it names; returns its path.

    Raises:
        ValueError: a count that is not positive.
    """
    if count < 1:
        raise ValueError(f"{name}: the count must be positive, got {count}")
    os.makedirs(os.path.join(folder, name), exist_ok=True)
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            grouped = list(pool.map(work, range(count), chunksize=32))
    else:
        grouped = [work(index) for index in range(count)]
    path = os.path.join(folder, f"{name}.json")
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump([record for group in grouped for record in group], file, indent=1)
    os.replace(path + ".part", path)
    return path


@main_guard
def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="playground/tiny/data/video")
    parser.add_argument("--pretrain", type=int, default=2400, help="still frames with a caption")
    parser.add_argument("--train", type=int, default=2400, help="clips with questions")
    parser.add_argument("--heldout", type=int, default=100, help="held-out clips, seven questions each")
    parser.add_argument("--turns", type=int, default=10, help="questions about a training clip")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    begin = time.time()
    jobs = {
        "pretrain": (args.pretrain, partial(still_record, args.out, args.seed)),
        "heldout": (args.heldout, partial(clip_records, args.out, "heldout", args.seed, args.turns)),
        "train": (args.train, partial(clip_records, args.out, "train", args.seed, args.turns)),
    }
    for name, (count, work) in jobs.items():  # the last file says that all are there
        print(f"{build(args.out, name, count, work, args.workers)}: {count}")
    note = {"chance": CHANCE, "unordered": UNORDERED, "arguments": {k: v for k, v in vars(args).items() if k != "out"}}
    with open(os.path.join(args.out, "about.json"), "w", encoding="utf-8") as file:
        json.dump(note, file, indent=1)
    print(f"done in {time.time() - begin:.1f} s")


if __name__ == "__main__":
    raise SystemExit(main())
