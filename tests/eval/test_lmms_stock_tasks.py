"""lmms-eval's own tasks of the six benchmarks on local data: the plugin is asked and answers as in ours."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; pip install -e '.[lmms]'")

import lmms_eval
from datasets import Dataset, Image, Sequence
from lmms_cases import GENERATED
from lmms_files import WRITERS, with_questions
from lmms_world import GOLDEN, NEW_TOKENS, Doc, own_answers, run_task

from llava.eval.lmms import DuetLlava
from llava.eval.tasks import TASKS

STOCK = Path(lmms_eval.__file__).parent / "tasks"
SPLITS = {
    "pope": ("pope/pope.yaml", "test"),
    "gqa": ("gqa/gqa.yaml", "testdev"),
    "textvqa": ("textvqa/textvqa_val.yaml", "validation"),
    "mme": ("mme/mme.yaml", "test"),
    "scienceqa": ("scienceqa/scienceqa.yaml", "test"),
    "seed_image": ("seedbench/seedbench.yaml", "test"),
}
# What a local copy of a task has to say besides: where the data are, and where LLaVA's protocol is an option.
LOCAL = """
include: {stock}
task: local_{name}
dataset_path: parquet
dataset_name: null
dataset_kwargs:
  data_files:
    {split}: {file}
process_docs: null
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
"""
OCR = """
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: "\\nAnswer the question using a single word or phrase."
    ocr: true
"""
PICTURES = ("coffee.png", "astronaut.png", "flower_tall.png")


def write_local_task(folder: Path, name: str, docs: list[dict], pictures: list[tuple[str, ...]]) -> None:
    """A task that includes the stock one; SEED-Bench has a list of pictures, the others one or none."""
    opened = [[{"bytes": (GOLDEN / "images" / file).read_bytes(), "path": None} for file in own] for own in pictures]
    several = name == "seed_image"
    rows = [doc | {"image": own if several else next(iter(own), None)} for doc, own in zip(docs, opened, strict=True)]
    data = Dataset.from_list(rows).cast_column("image", Sequence(Image()) if several else Image())
    data.to_parquet(folder / f"{name}.parquet")
    stock, split = SPLITS[name]
    text = LOCAL.format(stock=STOCK / stock, name=name, split=split, file=folder / f"{name}.parquet", tokens=NEW_TOKENS)
    (folder / f"{name}.yaml").write_text(text + (OCR if name == "textvqa" else ""), encoding="utf-8")


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_a_stock_task_asks_and_is_answered_like_ours(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # TextVQA's task writes a submission file where it runs
    docs = with_questions(name, GENERATED[name]()[: 28 if name == "mme" else 6])
    keys = WRITERS[name](tmp_path, docs)[:4]
    questions = {question.key: question for question in TASKS.get(name)().questions(tmp_path)}
    pictures = [(PICTURES[i % 3],) if questions[key].visuals else () for i, key in enumerate(keys)]
    write_local_task(tmp_path, name, docs[:4], pictures)
    lm = DuetLlava(pretrained=str(GOLDEN / "llava_tiny"), device="cpu", batch_size=2)
    answers, _ = run_task(lm, tmp_path, [f"local_{name}"])
    ours = [Doc(questions[key].text, own) for key, own in zip(keys, pictures, strict=True)]
    assert answers[f"local_{name}"] == own_answers(GOLDEN / "llava_tiny", ours)
