"""Writes the tiny world's data in LLaVA's format: `python -m playground.tiny.build --out playground/tiny/data`.

Files: `pretrain.json` (captions), `finetune.json` (questions), `heldout.json` (one question a record, with `kind` and
`answer`), and the images under `images/`. The same arguments always write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from PIL import Image

from duet.errors import main_guard
from playground.tiny.eval_questions import exam_turns, lettered_turn, text_quiz
from playground.tiny.questions import CHANCE, CHANCE_NOTE, KINDS, ask, caption, text_turn
from playground.tiny.scenes import SPLITS, make_scene

SEED = 11
STAGE_SEED = {"pretrain": 0, "finetune": 1, "heldout": 2}
PROMPT = "Describe the image."
IMAGE_MARK = "<image>"
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
QUALITY = 92
EXAM_SHARE = 0.4  # of the records: asked in the benchmarks' forms, with their instructions


def _image(folder: str, stage: str, index: int, pixels: np.ndarray) -> str:
    name = f"images/{stage}/{index:06d}.jpg"
    Image.fromarray(pixels).save(os.path.join(folder, name), quality=QUALITY)
    return name


def _conversation(turns: list[tuple[str, str]], with_image: bool) -> list[dict[str, str]]:
    said = []
    for number, (question, answer) in enumerate(turns):
        mark = f"{IMAGE_MARK}\n" if with_image and number == 0 else ""
        said += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return said


def training_kinds(rng: np.random.Generator) -> list[str]:
    """Kinds to ask about one training image, in order.

    A later turn can copy from earlier answers instead of looking. "order" gives all digits away, so it comes first or
    last, and "relation", which is learned slowest, is asked three times.
    """
    others = [str(kind) for kind in rng.permutation([k for k in KINDS if k not in ("order", "relation")])]
    relations = ["relation"] * 3
    return ["order", *others, *relations[:1]] if rng.random() < 0.35 else [*relations, *others, "order"]


def with_instructions(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Add the answer format's instruction to every question; a benchmark asks each alone."""
    options = "\nA. "
    return [(f"{q}\n{LETTER_ANSWER if options in q else SHORT_ANSWER}", a) for q, a in turns]


def records_of_scene(folder: str, stage: str, seed: int, turns: int, index: int) -> list[dict]:
    """Write one scene's image and return its records (several for held-out scenes, else one)."""
    split = "heldout" if stage == "heldout" else "train"
    scene = make_scene(split, seed * 10 + STAGE_SEED[stage], index)
    rng = np.random.default_rng([seed, STAGE_SEED[stage], index, 77])
    image = _image(folder, stage, index, scene.pixels)
    name = f"{stage}-{index:06d}"
    if stage == "pretrain":
        said = _conversation([(PROMPT, caption(scene.digits))], True)
        return [{"id": name, "image": image, "conversations": said}]
    if stage == "finetune":
        asked = [turn for kind in training_kinds(rng) if (turn := ask(kind, scene.digits, rng))]
        asked = list(dict.fromkeys(asked))[:turns]
        if rng.random() < EXAM_SHARE:
            asked = with_instructions(exam_turns(scene.digits, rng, turns))
        return [{"id": name, "image": image, "conversations": _conversation(asked, True)}]
    records = []
    for kind in KINDS:
        turn = ask(kind, scene.digits, rng)
        if turn is not None:
            extra = {"kind": kind, "question": turn[0], "answer": turn[1]}
            said = _conversation([turn], True)
            records.append({"id": f"{name}-{kind}", "image": image, "conversations": said} | extra)
    return records


def text_record(seed: int, index: int, turns: int) -> dict:
    """A record without an image."""
    rng = np.random.default_rng([seed, 5, index])
    asked = [text_turn(rng) for _ in range(turns)]
    if rng.random() < 0.5:
        asked = with_instructions([lettered_turn(text_quiz(rng), rng) for _ in range(turns)])
    said = _conversation(asked, False)
    return {"id": f"text-{index:06d}", "conversations": said}


def build_stage(folder: str, stage: str, scenes: int, seed: int, turns: int, workers: int) -> str:
    """Write one stage's images and JSON; returns the JSON's path.

    Raises:
        ValueError: unknown stage or a negative count.
    """
    if stage not in STAGE_SEED:
        raise ValueError(f"stage is {stage!r}, expected one of {', '.join(STAGE_SEED)}")
    if scenes < 1 or turns < 1:
        raise ValueError(f"scenes and turns must be positive, got {scenes} and {turns}")
    os.makedirs(os.path.join(folder, "images", stage), exist_ok=True)
    work = partial(records_of_scene, folder, stage, seed, turns)
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            grouped = list(pool.map(work, range(scenes), chunksize=64))
    else:
        grouped = [work(i) for i in range(scenes)]
    records = [record for group in grouped for record in group]
    if stage == "finetune":
        texts = [text_record(seed, i, turns) for i in range(max(1, scenes // 20))]
        order = np.random.default_rng([seed, 6]).permutation(len(records) + len(texts))
        both = records + texts
        records = [both[i] for i in order]
    path = os.path.join(folder, f"{stage}.json")
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(records, file, indent=1)
    os.replace(path + ".part", path)
    return path


@main_guard
def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="playground/tiny/data")
    parser.add_argument("--split", choices=(*SPLITS, "all"), default="all")
    parser.add_argument("--pretrain", type=int, default=2400, help="images with a caption (stage 1)")
    parser.add_argument("--finetune", type=int, default=3400, help="images with questions (stage 2)")
    parser.add_argument("--heldout", type=int, default=160, help="held-out images, about 6.5 questions each")
    parser.add_argument("--turns", type=int, default=9, help="questions on one training image")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    begin = time.time()
    stages = {"train": ("pretrain", "finetune"), "heldout": ("heldout",)}
    for stage in stages.get(args.split, tuple(STAGE_SEED)):
        path = build_stage(args.out, stage, getattr(args, stage), args.seed, args.turns, args.workers)
        print(f"{path}: {getattr(args, stage)} images")
    note = {"chance": CHANCE, "why": CHANCE_NOTE, "arguments": {k: v for k, v in vars(args).items() if k != "out"}}
    with open(os.path.join(args.out, "about.json"), "w", encoding="utf-8") as file:
        json.dump(note, file, indent=1)
    print(f"done in {time.time() - begin:.1f} s")


if __name__ == "__main__":
    raise SystemExit(main())
