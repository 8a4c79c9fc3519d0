"""Writes the tiny world's held-out scenes as image benchmarks: `python -m playground.tiny.export_eval --out DIR`.

Folders, file names and fields are those of POPE, GQA, TextVQA, MME, ScienceQA and SEED-Bench as LLaVA's evaluation
expects them below `playground/data/eval`, with LLaVA's question files; `tiny` is the world's own held-out set. Scene
number i is image i of `heldout.json` of the same seed. The same arguments always write the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from duet.errors import main_guard
from playground.tiny.build import IMAGE_MARK, LETTER_ANSWER, QUALITY, SEED, SHORT_ANSWER, STAGE_SEED, build_stage
from playground.tiny.eval_questions import CLAIMS, Quiz, claim_pair, is_there, ocr_line, quiz, text_quiz
from playground.tiny.questions import LETTERS, ask, by_axis
from playground.tiny.scenes import IMAGE_SIZE, PlacedDigit, make_scene

SHORT, LETTER = f"\n{SHORT_ANSWER}", f"\n{LETTER_ANSWER}"
IMAGES = 160
ABOUT = "tiny_world.json"
FOLDERS = ("pope", "gqa", "textvqa", "MME", "scienceqa", "seed_bench", "tiny")
POPE_START = {"adversarial": 1, "random": 10_000_001, "popular": 20_000_001}  # first id in LLaVA's question file
GQA_TYPES = {
    "exists": ("verify", "obj", "existC"),
    "corner": ("query", "cat", "categoryThat"),
    "extreme": ("query", "cat", "categoryThat"),
    "relation": ("query", "rel", "relO"),
}
SEED_TYPES = {  # name in SEED-Bench.json: (id, our kind)
    "Instance Identity": (2, "identity"),
    "Instance Location": (3, "corner"),
    "Instances Counting": (5, "count"),
    "Spatial Relation": (6, "relation"),
    "Text Understanding": (9, "order"),
}
MME_HOME = "MME_Benchmark_release_version"
MME_ASK = " Please answer yes or no."
ANNOTATORS = 10
OTHER_SPLITS = 5  # ScienceQA problems of "train" and of "val"; its files hold those too

Digits = tuple[PlacedDigit, ...]


def pope_image(index: int) -> str:
    """File name of a scene in `pope/val2014`."""
    return f"COCO_val2014_{index + 1:012d}.jpg"


def gqa_image(index: int) -> str:
    """GQA's image id of a scene; the file is this with .jpg."""
    return f"n{index:06d}"


def textvqa_image(index: int) -> str:
    """TextVQA's image id of a scene, 16 hexadecimal digits; the file is this with .jpg."""
    return f"{(index + 1) * 0x9E3779B97F4A7C15 % 2**64:016x}"


def mme_image(index: int) -> str:
    """File name of a scene in every MME category."""
    return f"{index + 1:012d}.jpg"


def scienceqa_id(index: int) -> str:
    """ScienceQA's id of a scene's question; the question without a picture after it has the next number."""
    return str(2 * index + 1)


def seed_image(index: int) -> str:
    """SEED-Bench's data id of a scene, which is also its file name."""
    return f"{1_000_000 + index}_{2_000_000_000 + index}"


def image_files(index: int) -> list[str]:
    """Every file that holds a scene's picture, relative to the root: all JPEG but ScienceQA's."""
    return [
        f"pope/val2014/{pope_image(index)}",
        f"gqa/data/images/{gqa_image(index)}.jpg",
        f"textvqa/train_images/{textvqa_image(index)}.jpg",
        *(f"MME/{MME_HOME}/{category}/{mme_image(index)}" for category in CLAIMS),
        f"scienceqa/images/test/{scienceqa_id(index)}/image.png",
        f"seed_bench/SEED-Bench-image/{seed_image(index)}",
    ]


def draw(root: str, seed: int, index: int) -> Digits:
    """Write one scene's picture everywhere and return its digits."""
    scene = make_scene("heldout", seed * 10 + STAGE_SEED["heldout"], index)
    picture = Image.fromarray(scene.pixels)
    photo, lossless = io.BytesIO(), io.BytesIO()
    picture.save(photo, format="JPEG", quality=QUALITY)
    picture.save(lossless, format="PNG")
    for name in image_files(index):
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((lossless if path.suffix == ".png" else photo).getvalue())
    return scene.digits


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def _json(path: Path, content: object) -> None:
    _write(path, json.dumps(content, indent=1) + "\n")


def _lines(path: Path, rows: Iterable[dict]) -> int:
    lines = [json.dumps(row) for row in rows]
    _write(path, "".join(line + "\n" for line in lines))
    return len(lines)


def absent_digits(present: list[int], scenes: list[list[int]], rng: np.random.Generator) -> dict[str, int]:
    """The absent digit that each POPE category asks about: any; the most frequent over all scenes; the one that is most
    often together with the digits of this scene."""
    absent = [v for v in range(10) if v not in present]
    often = Counter(v for values in scenes for v in values)
    company = {v: sum(p in values for values in scenes if v in values for p in present) for v in absent}
    return {
        "random": int(rng.choice(absent)),
        "popular": max(absent, key=lambda v: (often[v], -v)),
        "adversarial": max(absent, key=lambda v: (company[v], often[v], -v)),
    }


def write_pope(root: Path, scenes: list[Digits], seed: int) -> int:
    """Write `pope`: a present and an absent digit per scene and category."""
    labels: dict[str, list[dict]] = {category: [] for category in POPE_START}
    values = [[d.value for d in digits] for digits in scenes]
    for index, present in enumerate(values):
        rng = np.random.default_rng([seed, 21, index])
        shown = int(rng.choice(present))
        for category, absent in absent_digits(present, values, rng).items():
            for value, label in ((shown, "yes"), (absent, "no")):
                rows = labels[category]
                row = {"question_id": len(rows) + 1, "image": pope_image(index), "text": is_there(value)}
                rows.append(row | {"label": label})
    questions = []
    for category, rows in labels.items():
        _lines(root / "pope" / "coco" / f"coco_pope_{category}.json", rows)
        for number, row in enumerate(rows, POPE_START[category]):
            asked = {"question_id": number, "image": row["image"], "text": row["text"] + SHORT}
            questions.append(asked | {"category": category})
    return _lines(root / "pope" / "llava_pope_test.jsonl", questions)


def _gqa_turns(digits: Digits, index: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(kind, question, answer); as many questions whether a digit is there are answered with yes as with no."""
    turns = [("exists", claim_pair("existence", digits, rng)[index % 2], ("yes", "no")[index % 2])]
    for kind in ("corner", "extreme", "relation"):
        if turn := ask(kind, digits, rng):
            turns.append((kind, *turn))
    return turns


def write_gqa(root: Path, scenes: list[Digits], seed: int) -> int:
    """Write `gqa`: up to four short questions per scene, one of them for yes or no."""
    annotations, questions = {}, []
    for index, digits in enumerate(scenes):
        rng = np.random.default_rng([seed, 22, index])
        for kind, question, answer in _gqa_turns(digits, index, rng):
            structural, semantic, detailed = GQA_TYPES[kind]
            name, image = str(20_000_001 + len(questions)), gqa_image(index)
            annotations[name] = {
                "question": question,
                "answer": answer,
                "fullAnswer": answer,
                "imageId": image,
                "isBalanced": True,
                "types": {"structural": structural, "semantic": semantic, "detailed": detailed},
                "groups": {"global": None, "local": kind},
                "entailed": [],
                "equivalent": [name],
            }
            asked = {"question_id": name, "image": f"{image}.jpg", "text": question + SHORT, "category": "default"}
            questions.append(asked)
    _json(root / "gqa" / "data" / "questions" / "testdev_balanced_questions.json", annotations)
    return _lines(root / "gqa" / "llava_gqa_testdev_balanced.jsonl", questions)


def write_textvqa(root: Path, scenes: list[Digits], seed: int) -> int:
    """Write `textvqa`: two questions per scene. The OCR tokens go from top to bottom, which gives no answer away."""
    data, questions = [], []
    for index, digits in enumerate(scenes):
        side = int(np.random.default_rng([seed, 23, index]).integers(2))
        across = [str(d.value) for d in by_axis(digits, "x")]
        turns = (
            ("Read the digits from left to right.", " ".join(across)),
            (f"Which digit is {('leftmost', 'rightmost')[side]}?", across[-side]),
        )
        image = textvqa_image(index)
        for question, answer in turns:
            data.append(
                {
                    "question": question,
                    "image_id": image,
                    "image_classes": ["Digit"],
                    "image_width": IMAGE_SIZE,
                    "image_height": IMAGE_SIZE,
                    "answers": [answer] * ANNOTATORS,
                    "question_id": 34602 + len(data),
                    "set_name": "val",
                }
            )
            text = question + ocr_line(digits) + SHORT
            questions.append({"question_id": image, "image": f"{image}.jpg", "text": text, "category": "default"})
    about = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    _json(root / "textvqa" / "TextVQA_0.5.1_val.json", about | {"data": data})
    return _lines(root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", questions)


def write_mme(root: Path, scenes: list[Digits], seed: int) -> int:
    """Write `MME`: existence, count and position, one question for yes and one for no per scene."""
    questions = []
    for number, category in enumerate(CLAIMS):
        for index, digits in enumerate(scenes):
            pair = claim_pair(category, digits, np.random.default_rng([seed, 24, number, index]))
            file = Path(mme_image(index))
            rows = "".join(f"{q}{MME_ASK}\t{label}\n" for q, label in zip(pair, ("Yes", "No"), strict=True))
            _write(root / "MME" / MME_HOME / category / file.with_suffix(".txt"), rows)
            name = f"{category}/{file}"
            for question in pair:
                row = {"question_id": name, "image": name, "text": question + SHORT, "category": category}
                questions.append(row)
    return _lines(root / "MME" / "llava_mme.jsonl", questions)


def _problem(asked: Quiz, place: int, image: bool, split: str) -> dict:
    return {
        "question": asked.question,
        "choices": asked.options(place),
        "answer": place,
        "hint": "",
        "image": "image.png" if image else None,
        "task": "closed choice",
        "grade": "grade1",
        "subject": "natural science",
        "topic": "digits",
        "category": "Digits",
        "skill": "Look at digits" if image else "Compare digits",
        "lecture": "",
        "solution": "",
        "split": split,
    }


def write_scienceqa(root: Path, scenes: list[Digits], seed: int) -> int:
    """Write `scienceqa`: per scene a question about the picture and one without a picture."""
    problems, rows, splits = {}, [], {"train": [], "val": [], "test": []}

    def add(asked: Quiz, index: int, image: bool, split: str) -> None:
        name, place = str(len(problems) + 1), index % (len(asked.wrong) + 1)
        problems[name] = _problem(asked, place, image, split)
        splits[split].append(name)
        if split == "test":
            mark = f"{IMAGE_MARK}\n" if image else ""
            said = [{"from": "human", "value": mark + asked.lettered(place)}, {"from": "gpt", "value": LETTERS[place]}]
            picture = {"image": f"{name}/image.png"} if image else {}
            rows.append({"id": name} | picture | {"conversations": said})

    for index, digits in enumerate(scenes):
        rng = np.random.default_rng([seed, 25, index])
        kind = ("identity", "extreme", "relation")[index // len(LETTERS) % 3]
        add(quiz(kind, digits, rng), index, True, "test")
        add(text_quiz(rng), index, False, "test")
    for number, split in enumerate(("train", "val")):
        rng = np.random.default_rng([seed, 26, number])
        for index in range(OTHER_SPLITS):
            add(text_quiz(rng), index, False, split)
    _json(root / "scienceqa" / "problems.json", problems)
    _json(root / "scienceqa" / "pid_splits.json", splits)
    _json(root / "scienceqa" / "llava_test_CQM-A.json", rows)
    return len(rows)


def write_seed_bench(root: Path, scenes: list[Digits], seed: int) -> int:
    """Write `seed_bench`: up to five lettered questions per scene, images only."""
    annotations, questions = [], []
    asked_of: Counter[int] = Counter()
    for index, digits in enumerate(scenes):
        rng = np.random.default_rng([seed, 27, index])
        for type_id, kind in SEED_TYPES.values():
            asked = quiz(kind, digits, rng)
            if asked is None:
                continue
            place = asked_of[type_id] % len(LETTERS)
            asked_of[type_id] += 1
            number, data_id = 101_669 + len(questions), seed_image(index)
            choices = {f"choice_{letter.lower()}": o for letter, o in zip(LETTERS, asked.options(place), strict=True)}
            annotations.append(
                {"answer": LETTERS[place]}
                | choices
                | {
                    "data_id": data_id,
                    "data_type": "image",
                    "question": asked.question,
                    "question_id": str(number),
                    "question_type_id": type_id,
                }
            )
            text = asked.lettered(place) + LETTER
            row = {"question_id": number, "image": f"SEED-Bench-image/{data_id}", "text": text, "category": type_id}
            questions.append(row)
    types = {name: type_id for name, (type_id, _) in SEED_TYPES.items()}
    _json(root / "seed_bench" / "SEED-Bench.json", {"question_type": types, "questions": annotations})
    return _lines(root / "seed_bench" / "llava-seed-bench.jsonl", questions)


def write_tiny(root: Path, images: int, seed: int, workers: int) -> int:
    """Write `tiny`: `heldout.json` and its pictures as `playground.tiny.build` makes them."""
    path = build_stage(str(root / "tiny"), "heldout", images, seed, 1, workers)
    return len(json.loads(Path(path).read_text(encoding="utf-8")))


WRITERS = {
    "pope": write_pope,
    "gqa": write_gqa,
    "textvqa": write_textvqa,
    "MME": write_mme,
    "scienceqa": write_scienceqa,
    "seed_bench": write_seed_bench,
}


def _claim(root: Path, arguments: dict) -> None:
    """Make the folder ours; refuse one that holds a benchmark from elsewhere or another export.

    Raises:
        ValueError: the folder is taken; names what is there.
    """
    about = root / ABOUT
    if about.exists():
        try:
            same = json.loads(about.read_text(encoding="utf-8"))["arguments"] == arguments
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise ValueError(f"{about} is of an export with other arguments; remove {root} or choose another --out")
    else:
        taken = [name for name in FOLDERS if (root / name).exists()]
        if taken:
            raise ValueError(f"{root} already holds {', '.join(taken)}, not from here; choose an empty --out")
    _json(about, {"arguments": arguments})


def export(root: str | Path, images: int = IMAGES, seed: int = SEED, workers: int = 1) -> dict[str, int]:
    """Write all benchmarks below `root`; returns the number of questions of each.

    Raises:
        ValueError: no image is asked for, or the folder holds other benchmarks.
    """
    if images < 1 or seed < 0:
        raise ValueError(f"images must be at least 1 and seed at least 0, got {images} and {seed}")
    root = Path(root)
    _claim(root, {"images": images, "seed": seed})
    work = partial(draw, str(root), seed)
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            scenes = list(pool.map(work, range(images), chunksize=8))
    else:
        scenes = [work(index) for index in range(images)]
    counts = {name: write(root, scenes, seed) for name, write in WRITERS.items()}
    return counts | {"tiny": write_tiny(root, images, seed, workers)}


@main_guard
def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write, in the place of playground/data/eval")
    parser.add_argument("--images", type=int, default=IMAGES, help="held-out scenes, about 24 questions each")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    begin = time.time()
    counts = export(args.out, args.images, args.seed, args.workers)
    for name, count in counts.items():
        print(f"{os.path.join(args.out, name)}: {count} questions on {args.images} images")
    print(f"done in {time.time() - begin:.1f} s")


if __name__ == "__main__":
    raise SystemExit(main())
