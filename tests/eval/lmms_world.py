"""A small task in lmms-eval's own format: YAML, a Python file beside it, and a parquet file with real pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as PIL

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.generate import Answerer, pack, preprocess
from llava.model.builder import load_pretrained_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TEMPLATE = "vicuna_v1"
NEW_TOKENS = 5

YAML = """
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function small_task.pictures
doc_to_text: !function small_task.question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
  top_p: 1.0
  num_beams: 1
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
"""
FUNCTIONS = """
def pictures(doc):
    return [picture.convert("RGB") for picture in doc["pictures"]]


def question(doc):
    return doc["question"]
"""


@dataclass(frozen=True)
class Doc:
    """A question, the names of its golden pictures, and what counts as right."""

    question: str
    pictures: tuple[str, ...] = ()
    answer: str = "yes"

    def opened(self) -> list[PIL.Image]:
        """Its pictures."""
        return [PIL.open(GOLDEN / "images" / name).convert("RGB") for name in self.pictures]


def write_task(folder: Path, name: str, docs: list[Doc]) -> None:
    """Write the three files of a task."""
    rows = [
        {
            "question": doc.question,
            "answer": doc.answer,
            "pictures": [{"bytes": (GOLDEN / "images" / name).read_bytes(), "path": name} for name in doc.pictures],
        }
        for doc in docs
    ]
    features = Features({"question": Value("string"), "answer": Value("string"), "pictures": Sequence(Image())})
    file = folder / f"{name}.parquet"
    Dataset.from_list(rows, features=features).to_parquet(file)
    (folder / f"{name}.yaml").write_text(YAML.format(name=name, file=file, tokens=NEW_TOKENS), encoding="utf-8")
    (folder / "small_task.py").write_text(FUNCTIONS, encoding="utf-8")


def run_task(lm: Any, folder: Path, names: list[str]) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Let lmms-eval run tasks of a folder on a model object; returns answers in the docs' order, and scores."""
    from lmms_eval.evaluator import evaluate
    from lmms_eval.tasks import TaskManager, get_task_dict

    tasks = get_task_dict(names, TaskManager("ERROR", include_path=str(folder), include_defaults=False), "simple")
    for name, task in tasks.items():
        lm.task_dict[name] = task.dataset
        task.set_config("num_fewshot", 0)
    found = evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0)
    answers = {
        name: [row["filtered_resps"][0] for row in sorted(found["samples"][name], key=lambda row: row["doc_id"])]
        for name in names
    }
    return answers, {name: found["results"][name].get("exact_match,none") for name in names}


def own_answers(checkpoint: Path, docs: list[Doc], reduction: Any = None, like_lmms: bool = False) -> list[str]:
    """What `Answerer` says to one question after the other.

    Args:
        checkpoint: model folder.
        docs: the questions.
        reduction: as `duet_config` of the loader.
        like_lmms: prepare as lmms-eval's `llava` does: pixels rounded to fp16, a space between image marks.
    """
    tokenizer, model, processor, _ = load_pretrained_model(
        str(checkpoint), None, "tiny", device="cpu", duet_config=reduction
    )
    answerer = Answerer(model, tokenizer, processor, TEMPLATE)
    said = []
    for doc in docs:
        pictures = doc.opened()
        pixels: Any = pack(preprocess(pictures, processor, model.config))
        text = doc.question
        if like_lmms and pictures:
            pixels = pixels.to(torch.float16)
            text = " ".join([DEFAULT_IMAGE_TOKEN] * len(pictures)) + "\n" + text
        ids = [answerer.prompt_ids(text, len(pictures))]
        said += answerer.generate(ids, pixels, [picture.size for picture in pictures], NEW_TOKENS)
    return said
