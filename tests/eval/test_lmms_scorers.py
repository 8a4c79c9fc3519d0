"""Our scorers against lmms-eval's own functions, on thousands of generated answers per benchmark.

Every answer that both score otherwise must belong to a class that lmms_cases.DIFFERENCES names and docs/lmms_eval.md
explains, and the classes' sizes are fixed: a change in either scorer shows.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lmms_cases import DIFFERENCES, GENERATED, PERCEPTION, Case
from lmms_files import WRITERS, with_questions

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; pip install -e '.[lmms]'")

from lmms_eval.api.metrics import exact_match_hf_evaluate
from lmms_eval.api.metrics import mean as lmms_mean
from lmms_eval.tasks.gqa import utils as lmms_gqa
from lmms_eval.tasks.mme import utils as lmms_mme
from lmms_eval.tasks.pope import utils as lmms_pope
from lmms_eval.tasks.scienceqa import utils as lmms_scienceqa
from lmms_eval.tasks.seedbench import utils as lmms_seed
from lmms_eval.tasks.textvqa import utils as lmms_textvqa

from llava.eval.m4c_evaluator import soft_score
from llava.eval.tasks import TASKS, Answer
from llava.eval.tasks.gqa import prediction
from llava.eval.tasks.mme import parse_mme
from llava.eval.tasks.pope import CATEGORIES, parse_pope
from llava.eval.tasks.scienceqa import is_right

DOC = Path(__file__).resolve().parents[2] / "docs" / "lmms_eval.md"
CASES = {name: make() for name, make in GENERATED.items()}


def theirs_gqa(doc: dict[str, Any], text: str) -> float:
    """As ConfigurableTask.process_results calls the metric that gqa.yaml names."""
    found = exact_match_hf_evaluate(
        predictions=[text], references=[doc["answer"]], ignore_case=True, ignore_punctuation=True
    )
    return float(found["exact_match"])


# lmms-eval hands stripped answers to these functions. TextVQA's writes into the document.
THEIRS: dict[str, Callable[[dict[str, Any], str], float]] = {
    "pope": lambda doc, text: lmms_pope.pope_process_results(doc, [text])["pope_accuracy"]["score"],
    "gqa": theirs_gqa,
    "textvqa": lambda doc, text: lmms_textvqa.textvqa_process_results(copy.deepcopy(doc), [text])["exact_match"],
    "mme": lambda doc, text: next(iter(lmms_mme.mme_process_results(doc, [text]).values()))["score"],
    "scienceqa": lambda doc, text: lmms_scienceqa.sqa_process_results(doc, [text])["exact_match"],
    "seed_image": lambda doc, text: lmms_seed.seed_aggregation_result(
        [lmms_seed.seed_process_result(doc, [text])["seed_image"]]
    ),
}
OURS: dict[str, Callable[[dict[str, Any], str], float]] = {
    "pope": lambda doc, text: float(parse_pope(text) == doc["answer"]),
    "gqa": lambda doc, text: float(prediction(text) == doc["answer"]),
    "textvqa": lambda doc, text: soft_score(text, doc["answers"]),
    "mme": lambda doc, text: float(parse_mme(text) == doc["answer"].lower()),
    "scienceqa": lambda doc, text: float(is_right(text, doc)),
    "seed_image": lambda doc, text: float(text == doc["answer"]),
}


def scores(name: str, case: Case) -> tuple[float, float]:
    """What we give for an answer, and what lmms-eval gives; both see it stripped."""
    text = case.text.strip()
    return OURS[name](case.doc, text), THEIRS[name](case.doc, text)


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_difference_is_a_known_one(name):
    assert len(CASES[name]) >= 5000
    counts = Counter()
    for case in CASES[name]:
        ours, theirs = scores(name, case)
        if abs(ours - theirs) < 1e-9:
            continue
        right = "ours" if ours > theirs else "lmms-eval"
        known = [d.name for d in DIFFERENCES[name] if d.right == right and d.when(case.doc, case.text)]
        assert known, f"{name}: {case.text!r} for {case.doc}: ours {ours}, lmms-eval {theirs}"
        counts[known[0]] += 1
    assert counts == {d.name: d.count for d in DIFFERENCES[name]}


@pytest.mark.parametrize("name", sorted(OURS))
def test_the_table_in_the_documentation_is_this_one(name):
    rows = [[cell.strip() for cell in line.split("|")] for line in DOC.read_text(encoding="utf-8").splitlines()]
    table = {tuple(row[2:6]) for row in rows if len(row) > 6 and row[1] == name}
    known = {(d.name, f"`{d.example}`", d.right, f"{d.count:,}") for d in DIFFERENCES[name]}
    assert table == (known or {("none", "", "", "0")})


def score_of(name: str, root: Path, cases: list[Case]) -> tuple[dict[str, float], list[float]]:
    """Our metrics of generated answers through the benchmark's official files, and our score of each answer."""
    keys = WRITERS[name](root, with_questions(name, cases))
    answers = [Answer(key, "", case.text.strip(), key) for key, case in zip(keys, cases, strict=True)]
    score = TASKS.get(name)().score(root, answers)
    assert score.expected == len(cases) and not score.missing
    return score.metrics, [OURS[name](case.doc, case.text.strip()) for case in cases]


@pytest.mark.parametrize(
    ("name", "metric"),
    [("gqa", "accuracy"), ("textvqa", "accuracy"), ("scienceqa", "accuracy"), ("seed_image", "image")],
)
def test_a_benchmark_is_the_mean_over_its_answers_on_both_sides(name, metric, tmp_path):
    metrics, single = score_of(name, tmp_path, CASES[name])
    assert metrics[metric] == pytest.approx(100 * lmms_mean(single), abs=1e-9)


def test_pope_has_the_same_counts_and_another_headline(tmp_path):
    metrics, _ = score_of("pope", tmp_path, CASES["pope"])
    rows = [
        {
            "score": OURS["pope"](c.doc, c.text.strip()),
            "prediction": parse_pope(c.text.strip()),
            "ground_truth": c.doc["answer"],
        }
        for c in CASES["pope"]
    ]
    assert metrics["f1_pooled"] == pytest.approx(100 * lmms_pope.pope_aggregate_f1_score(rows))
    assert metrics["accuracy_pooled"] == pytest.approx(100 * lmms_pope.pope_aggregate_accuracy(rows))
    share = len(rows) // 3
    parts = {category: rows[i * share : (i + 1) * share] for i, category in enumerate(CATEGORIES)}
    for category, part in parts.items():
        assert metrics[f"f1_{category}"] == pytest.approx(100 * lmms_pope.pope_aggregate_f1_score(part))
        assert metrics[f"precision_{category}"] == pytest.approx(100 * lmms_pope.pope_aggregate_precision(part))
        assert metrics[f"recall_{category}"] == pytest.approx(100 * lmms_pope.pope_aggregate_recall(part))
    mean = sum(map(lmms_pope.pope_aggregate_f1_score, parts.values())) / 3
    assert metrics["f1"] == pytest.approx(100 * mean) and metrics["f1"] != pytest.approx(metrics["f1_pooled"], abs=1e-6)
    labels = sum(row["ground_truth"] == "yes" for row in rows) / len(rows)
    assert lmms_pope.pope_aggregate_yes_ratio(rows) == pytest.approx(labels)  # theirs counts labels, ours answers
    assert metrics["yes_ratio"] == pytest.approx(100 * sum(row["prediction"] == "yes" for row in rows) / len(rows))


def test_mme_has_the_same_points(tmp_path):
    cases = CASES["mme"][:1400]
    metrics, single = score_of("mme", tmp_path, cases)
    rows = [{**case.doc, "score": score} for case, score in zip(cases, single, strict=True)]
    perception = lmms_mme.mme_aggregate_results([row for row in rows if row["category"] in PERCEPTION])
    cognition = lmms_mme.mme_aggregate_results([row for row in rows if row["category"] not in PERCEPTION])
    assert metrics["perception"] == pytest.approx(perception)
    assert metrics["cognition"] == pytest.approx(cognition)
    assert metrics["total"] == pytest.approx(perception + cognition)


SUFFIX = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase."}
LETTER = {"pre_prompt": "", "post_prompt": "\nAnswer with the option's letter from the given choices directly."}
PROMPTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "pope": ("pope", lambda doc: lmms_pope.pope_doc_to_text(doc, SUFFIX)),
    "textvqa": ("textvqa", lambda doc: lmms_textvqa.textvqa_doc_to_text(doc, SUFFIX | {"ocr": True})),
    "textvqa_no_ocr": ("textvqa", lambda doc: lmms_textvqa.textvqa_doc_to_text(doc, SUFFIX | {"ocr": False})),
    "mme": ("mme", lambda doc: lmms_mme.mme_doc_to_text(doc, SUFFIX)),
    "scienceqa": ("scienceqa", lambda doc: lmms_scienceqa.sqa_doc_to_text(doc, LETTER | {"format": "default"})),
    "seed_image": ("seed_image", lmms_seed.seed_doc_to_text),
    "gqa": ("gqa", lambda doc: lmms_gqa.gqa_doc_to_text(doc, SUFFIX)),
}


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_both_ask_the_same(name, tmp_path):
    files, theirs = PROMPTS[name]
    docs = with_questions(files, CASES[files][:252])
    keys = WRITERS[files](tmp_path, docs)
    asked = {question.key: question.text for question in TASKS.get(name)().questions(tmp_path)}
    assert [asked[key] for key in keys] == [theirs(doc) for doc in docs]
