"""GQA: official files are read as they are, and hand-made answers score as the official evaluator says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from llava.eval.answers import read_answers
from llava.eval.tasks import TASKS, Answer, BadEvalData
from llava.eval.tasks.gqa import gqa_scores, prediction, predictions_file

SUFFIX = "\nAnswer the question using a single word or phrase."
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_gqa_for_eval.py"

# id: (question, structural type, answer). Two are open (query), four binary.
WORLD = {
    "1001": ("What color is the cup?", "query", "red"),
    "1002": ("Is the cup red?", "verify", "yes"),
    "1003": ("Is the cup to the left or to the right of the plate?", "choose", "left"),
    "1004": ("What is behind the table?", "query", "café"),
    "1005": ("Is there a dog or a cat?", "logical", "no"),
    "1006": ("Do the cup and the plate have the same color?", "compare", "yes"),
}
RIGHT = {key: answer for key, (_, _, answer) in WORLD.items()}


def annotation(question: str, structural: str, answer: str, balanced: bool = True) -> dict:
    return {
        "question": question,
        "answer": answer,
        "imageId": "n100",
        "isBalanced": balanced,
        "types": {"structural": structural, "semantic": "attr", "detailed": "x"},
        "groups": {"global": None, "local": "y"},
    }


def official() -> dict:
    return {key: annotation(*row) for key, row in WORLD.items()}


@pytest.fixture
def task():
    return TASKS.get("gqa")()


@pytest.fixture
def root(tmp_path):
    write(tmp_path, official())
    return tmp_path


def write(root, annotations) -> Path:
    path = root / "gqa" / "data" / "questions" / "testdev_balanced_questions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(annotations), encoding="utf-8")
    return path


def llava_row(key: str, **changes) -> dict:
    row = {"question_id": key, "image": "n100.jpg", "text": WORLD[key][0] + SUFFIX, "category": "default"}
    return {**row, **changes}


def write_llava(root, rows) -> Path:
    path = root / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(texts: dict[str, str]) -> list[Answer]:
    """As LLaVA's scripts write them: no key."""
    return [Answer(key, WORLD[key][0] + SUFFIX, text) for key, text in texts.items()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red", "red"),
        ("Red.", "red"),
        ("red...", "red"),
        ("YES", "yes"),
        ("u.s.", "u.s"),
        (".5", ".5"),
        ("red. ", "red. "),
        ("It is red", "it is red"),
        ("Café.", "café"),
        ("", ""),
    ],
)
def test_conversion_of_an_answer(text, expected):
    assert prediction(text) == expected


@pytest.mark.parametrize(
    ("texts", "accuracy", "binary", "open_"),
    [
        (RIGHT, 100, 100, 100),
        (dict.fromkeys(WORLD, "blue"), 0, 0, 0),
        (dict.fromkeys(WORLD, ""), 0, 0, 0),
        # 1001, 1002 and 1004 of six; 1002 of the four binary ones; both open ones
        ({**dict.fromkeys(WORLD, "?"), "1001": "Red.", "1002": "YES", "1004": "CAFÉ"}, 50, 25, 100),
        # a sentence, a space after the period, an article and another word form are all wrong
        ({**RIGHT, "1001": "It is red.", "1003": "left. ", "1004": "a café", "1005": "No, no"}, 100 * 2 / 6, 50, 0),
        ({**RIGHT, "1006": "yes\u2028"}, 100 * 5 / 6, 75, 100),
    ],
    ids=["all right", "all wrong", "empty", "mixed", "malformed", "unicode"],
)
def test_known_scores(task, root, texts, accuracy, binary, open_):
    score = task.score(root, answers(texts))
    assert score.metrics == pytest.approx({"accuracy": accuracy, "binary": binary, "open": open_})
    assert (score.headline, score.value) == ("accuracy", score.metrics["accuracy"])
    assert (score.expected, score.scored, score.missing) == (6, 6, [])


def test_order_does_not_matter(task, root):
    mixed = {"1006": "yes", "1001": "red", "1003": "right", "1002": "no", "1005": "no", "1004": "bar"}
    assert task.score(root, answers(mixed)).metrics == pytest.approx({"accuracy": 50, "binary": 50, "open": 50})


def test_a_question_without_an_answer_is_wrong_and_named(task, root):
    score = task.score(root, answers({key: RIGHT[key] for key in ("1001", "1002", "1003")}))
    assert score.metrics == pytest.approx({"accuracy": 50, "binary": 50, "open": 50})
    assert (score.expected, score.scored, score.missing) == (6, 3, ["1004", "1005", "1006"])


def test_only_balanced_questions_count(task, tmp_path):
    write(tmp_path, official() | {"1007": annotation("Is it day?", "verify", "yes", balanced=False)})
    assert "1007" not in [question.key for question in task.questions(tmp_path)]
    assert task.score(tmp_path, answers(RIGHT)).expected == 6


def test_the_pure_function_leaves_out_a_part_without_questions():
    one = {"1": annotation("Is it red?", "verify", "yes")}
    assert gqa_scores({"1": "yes"}, one) == {"accuracy": 100.0, "binary": 100.0}


def test_questions_from_the_official_file(task, root):
    questions = task.questions(root)
    assert [question.key for question in questions] == list(WORLD)
    assert questions[0].text == "What color is the cup?\nAnswer the question using a single word or phrase."
    assert questions[0].visuals == (root / "gqa" / "data" / "images" / "n100.jpg",)
    assert questions[0].question_id == "1001"
    assert task.max_new_tokens == 128


def test_questions_of_llava_decide_order_and_prompt(task, root):
    rows = [llava_row(key) for key in reversed(WORLD)]
    rows[0] = llava_row("1006", text="Same color?" + SUFFIX, image="n7.jpg")
    write_llava(root, rows)
    questions = task.questions(root)
    assert [question.key for question in questions] == list(reversed(WORLD))
    assert questions[0].text == "Same color?" + SUFFIX
    assert questions[0].visuals[0].name == "n7.jpg"
    assert task.score(root, answers(RIGHT)).value == 100


def test_annotations_may_lie_where_the_official_evaluator_runs(task, root):
    path = task.annotation_file(root)
    path.rename(root / "gqa" / "data" / path.name)
    assert len(task.questions(root)) == 6


def test_answers_file_of_llava_with_windows_line_ends(task, root, tmp_path):
    rest = {"answer_id": "x", "model_id": "m", "metadata": {}}
    texts = {**RIGHT, "1001": "blue"}
    rows = [{"question_id": key, "prompt": WORLD[key][0] + SUFFIX, "text": text} | rest for key, text in texts.items()]
    path = tmp_path / "answers.jsonl"
    path.write_bytes("\r\n".join(json.dumps(row) for row in rows).encode() + b"\r\n\r\n")
    score = task.score(root, read_answers(path))
    assert score.metrics == pytest.approx({"accuracy": 100 * 5 / 6, "binary": 100, "open": 50})


def test_a_cut_off_answers_file_is_an_error(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": "1001", "prompt": "q", "text": "red"}\n{"question_id": "1002", "pro')
    with pytest.raises(BadEvalData, match=r"answers\.jsonl, line 2: broken JSON"):
        read_answers(path)


def test_wrong_answers_are_refused(task, root):
    with pytest.raises(BadEvalData, match=r"1 answers repeat a question.*1001"):
        task.score(root, [*answers(RIGHT), *answers({"1001": "blue"})])
    with pytest.raises(BadEvalData, match=r"1 answers belong to no question.*9999"):
        task.score(root, [Answer("9999", "Is it?", "yes")])


def test_everything_that_is_needed_is_named_with_its_source(task, tmp_path):
    needed = {item.path.relative_to(tmp_path).as_posix(): item.source for item in task.needed(tmp_path)}
    assert list(needed) == ["gqa/data/questions/testdev_balanced_questions.json", "gqa/data/images"]
    assert all("gqadataset" in source or "stanford.edu" in source for source in needed.values())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("answer", None, r"question 1001: field 'answer' must be str, got None"),
        ("question", 3, r"question 1001: field 'question' must be str, got 3"),
        ("imageId", 3, r"question 1001: field 'imageId' must be str, got 3"),
        ("isBalanced", "true", r"question 1001: field 'isBalanced' must be bool, got 'true'"),
        ("types", {}, r"question 1001, types: field 'structural' \(str\) is missing"),
    ],
)
def test_malformed_annotations(task, tmp_path, field, value, message):
    annotations = official()
    annotations["1001"][field] = value
    write(tmp_path, annotations)
    with pytest.raises(BadEvalData, match=r"testdev_balanced_questions\.json, " + message):
        task.questions(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"1001": {', "broken JSON at line 1"),
        ("[]", "expected a JSON dict at the top, found list"),
        ("{}", "no question with isBalanced true"),
        ('{"1001": 5}', "question 1001: expected a JSON object, got 5"),
    ],
)
def test_a_damaged_annotation_file(task, root, content, message):
    task.annotation_file(root).write_text(content)
    with pytest.raises(BadEvalData, match=message):
        task.questions(root)


def test_an_absent_annotation_file_is_named(task, tmp_path):
    with pytest.raises(BadEvalData, match=r"testdev_balanced_questions\.json cannot be read: No such file"):
        task.questions(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([llava_row("1001")], r"5 questions of .* are not in it, first: 1002, 1003"),
        ([llava_row("1001"), llava_row("1001")], r"line 2: question_id 1001 is there twice"),
        ([llava_row("1001", question_id="9")], r"line 1: question_id 9 is no balanced question"),
        ([{"question_id": "1001", "image": "n100.jpg"}], r"line 1: field 'text' \(str\) is missing"),
        ([llava_row("1001", image=5)], r"line 1: field 'image' must be str, got 5"),
        ([[1]], r"line 1: expected a JSON object, got \[1\]"),
    ],
)
def test_malformed_question_file(task, root, rows, message):
    write_llava(root, rows)
    with pytest.raises(BadEvalData, match=message):
        task.questions(root)


@pytest.fixture(scope="module")
def convert():
    spec = importlib.util.spec_from_file_location("convert_gqa_for_eval", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_conversion_for_the_official_evaluator(convert, tmp_path):
    source, target = tmp_path / "merge.jsonl", tmp_path / "predictions.json"
    rows = [("1001", "Red."), ("1004", "CAFÉ")]
    lines = [json.dumps({"question_id": key, "prompt": "q", "text": text}) + "\n" for key, text in rows]
    source.write_text("".join(lines), encoding="utf-8")
    assert convert(["--src", str(source), "--dst", str(target)]) == 0
    assert json.loads(target.read_text()) == [
        {"questionId": "1001", "prediction": "red"},
        {"questionId": "1004", "prediction": "café"},
    ]


def test_conversion_refuses_bad_input(convert, tmp_path, capsys):
    target = tmp_path / "predictions.json"
    assert convert(["--src", str(tmp_path / "none.jsonl"), "--dst", str(target)]) == 1
    assert "none.jsonl cannot be read" in capsys.readouterr().err
    assert not target.exists()
    with pytest.raises(BadEvalData, match="1 questions have two answers, first: 1001"):
        predictions_file(answers({"1001": "a"}) + answers({"1001": "b"}))
