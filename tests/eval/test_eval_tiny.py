"""The tiny world's held-out questions as a benchmark: the same score as its own evaluator, subsets, bad files."""

import json
from types import SimpleNamespace

import pytest
from runner_world import TOKENIZER
from transformers import CLIPImageProcessorPil

from llava.eval.tasks import TASKS, Answer, BadEvalData
from llava.eval.tasks.base import part_of
from llava.tokenization import load_tokenizer
from playground.tiny import evaluate, export_eval
from playground.tiny.questions import KINDS

IMAGES = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "eval"
    export_eval.write_tiny(folder, IMAGES, 3, 1)
    return folder


def tiny():
    return TASKS.get("tiny")()


def canned(questions):
    """Answers by key, right for two of three; spaces around an answer count for nothing."""
    return {q.key: (f" {q.extra['answer']}\n" if n % 3 else "wrong") for n, q in enumerate(questions)}


def test_both_evaluators_give_the_same_accuracy(root, monkeypatch):
    questions = tiny().questions(root)
    said = canned(questions)
    answers = [Answer(q.question_id, q.text, said[q.key], q.key) for q in questions]
    score = tiny().score(root, answers)

    monkeypatch.setattr(evaluate, "predict", lambda *parts: [said[q.name].strip() for q in parts[3]])
    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=4, image_aspect_ratio="pad"))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    records = evaluate.load_records(str(root / "tiny" / "heldout.json"))
    run = evaluate.evaluate(model, load_tokenizer(str(TOKENIZER)), processor, records, str(root / "tiny"), 8)

    assert {k: v for k, v in score.metrics.items() if k[9:] in KINDS} == pytest.approx(
        {f"accuracy_{kind}": 100 * share for kind, share in run["accuracy"].items()}
    )
    assert score.metrics["kind_mean"] == pytest.approx(100 * run["mean"])
    pooled = sum(run["accuracy"][kind] * count for kind, count in run["questions"].items()) / len(records)
    assert score.value == pytest.approx(100 * pooled) and 50 < score.value < 80
    assert score.value != pytest.approx(score.metrics["kind_mean"])


def test_the_prompt_is_that_of_the_tiny_worlds_evaluator(root):
    tokenizer = load_tokenizer(str(TOKENIZER))
    record = evaluate.load_records(str(root / "tiny" / "heldout.json"))[0]
    question = tiny().questions(root)[0]
    from llava.eval.generate import Answerer

    model = SimpleNamespace(config=SimpleNamespace(mm_use_im_start_end=False))
    answerer = Answerer(model, tokenizer, object(), evaluate.TEMPLATE)
    assert tuple(answerer.prompt_ids(question.text, 1)) == evaluate.make_question(record, tokenizer).ids
    assert tiny().max_new_tokens == evaluate.MAX_NEW_TOKENS


def test_a_question_without_an_answer_is_wrong(root):
    questions = tiny().questions(root)
    answers = [Answer(q.question_id, q.text, q.extra["answer"], q.key) for q in questions[1:]]
    score = tiny().score(root, answers)
    assert score.missing == [questions[0].key] and score.scored == len(questions) - 1
    assert score.value == pytest.approx(100 * (len(questions) - 1) / len(questions))
    assert score.metrics["accuracy_stderr"] > 0


def test_a_part_is_scored_by_itself_and_says_so(root):
    whole, part = tiny(), part_of(TASKS.get("tiny"), 2)
    questions = part.questions(root)
    assert len({q.visuals for q in questions}) == 2
    assert [q for q in whole.questions(root) if q in questions] == questions
    assert (part.name, part.title) == ("tiny_2_pictures", "Tiny, 2 pictures")
    score = part.score(root, [Answer(q.question_id, q.text, q.extra["answer"], q.key) for q in questions])
    assert (score.value, score.expected, score.missing) == (100, len(questions), [])
    assert f"{len(questions)} questions about 2 pictures, not all" in score.notes
    assert part_of(TASKS.get("tiny"), 99).questions(root) == whole.questions(root)
    assert whole.pictures is None


def test_bad_records_are_named(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "heldout.json").write_text(json.dumps([{"id": "a", "image": "b", "kind": "c", "answer": "d"}]))
    with pytest.raises(BadEvalData, match="record 0: field 'question'"):
        tiny().questions(tmp_path)


def test_what_is_missing_says_which_command_makes_it(tmp_path):
    needed = tiny().needed(tmp_path)
    assert [item.path.name for item in needed] == ["heldout.json", "heldout"]
    assert all("playground.tiny.export_eval" in item.source for item in needed)
