"""Official files of six benchmarks whose questions and labels are those of lmms-eval-like documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmms_cases import Case

from llava.eval.tasks.mme import CATEGORIES as SUBTASKS
from llava.eval.tasks.pope import CATEGORIES

Docs = list[dict[str, Any]]


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def pope(root: Path, docs: Docs) -> list[str]:
    """Three label files, a third of the documents each; returns the keys of the questions, in the documents' order."""
    share = len(docs) // 3
    keys = []
    for index, (category, first) in enumerate(CATEGORIES.items()):
        own = docs[index * share : (index + 1) * share]
        rows = [
            {"question_id": i, "image": f"{i}.jpg", "text": doc["question"], "label": doc["answer"]}
            for i, doc in enumerate(own)
        ]
        _write(root / f"pope/coco/coco_pope_{category}.json", "\n".join(map(json.dumps, rows)))
        keys += [str(first + number) for number in range(1, share + 1)]
    return keys


def gqa(root: Path, docs: Docs) -> list[str]:
    """The balanced questions."""
    rows = {
        doc["id"]: {
            "question": doc["question"],
            "answer": doc["answer"],
            "imageId": "n1",
            "isBalanced": True,
            "types": {"structural": "query"},
        }
        for doc in docs
    }
    _write(root / "gqa/data/questions/testdev_balanced_questions.json", rows)
    return list(rows)


def textvqa(root: Path, docs: Docs) -> list[str]:
    """The annotations with OCR tokens in them."""
    rows = [doc | {"image_id": f"i{doc['question_id']}"} for doc in docs]
    _write(root / "textvqa/TextVQA_0.5.1_val.json", {"data": rows})
    return [str(doc["question_id"]) for doc in docs]


def mme(root: Path, docs: Docs) -> list[str]:
    """The release: a text file for every two documents."""
    release = root / "MME/MME_Benchmark_release_version"
    keys = []
    for first, second in zip(docs[::2], docs[1::2], strict=True):
        category, name = first["question_id"].split("/")
        stem = name.split(".")[0]
        lines = [f"{doc['question']}\t{doc['answer']}" for doc in (first, second)]
        _write(release / category / f"{stem}.txt", "\n".join(lines))
        keys += [f"{category}/{stem}/0", f"{category}/{stem}/1"]
    assert all((release / category).is_dir() for category in SUBTASKS)
    return keys


def scienceqa(root: Path, docs: Docs) -> list[str]:
    """Problems, all in the test split, every second one with a picture."""
    problems = {
        doc["id"]: {
            "question": doc["question"],
            "choices": doc["choices"],
            "answer": doc["answer"],
            "hint": doc["hint"],
            "image": "image.png" if index % 2 else None,
        }
        for index, doc in enumerate(docs)
    }
    _write(root / "scienceqa/problems.json", problems)
    _write(root / "scienceqa/pid_splits.json", {"test": list(problems)})
    return list(problems)


def seed_image(root: Path, docs: Docs) -> list[str]:
    """Annotations of one type."""
    rows = [doc | {"question_type_id": 1, "data_id": "p"} for doc in docs]
    _write(root / "seed_bench/SEED-Bench.json", {"question_type": {"Scene": 1}, "questions": rows})
    return [str(doc["question_id"]) for doc in docs]


WRITERS: dict[str, Callable[[Path, Docs], list[str]]] = {
    "pope": pope,
    "gqa": gqa,
    "textvqa": textvqa,
    "mme": mme,
    "scienceqa": scienceqa,
    "seed_image": seed_image,
}


def with_questions(name: str, cases: list[Case]) -> Docs:
    """The documents with the fields that a prompt needs; words in several cases, hints that are there or not."""
    found = []
    for number, case in enumerate(cases):
        doc = {"question": f"What is number {number // 2} in the New Picture?"} | case.doc
        if name == "mme":
            doc["question"] = f"Is this No. {number}? Please answer yes or no."
        elif name == "textvqa":
            doc |= {"question": f"what is NUMBER {number}?", "ocr_tokens": ["Acme", f"n{number}"][: number % 3]}
        elif name == "scienceqa":
            doc["hint"] = "" if number % 3 else "Look at the picture."
        elif name == "seed_image":
            doc |= {f"choice_{letter}": f"{letter} {number}" for letter in "abcd"}
        found.append(doc)
    return found
