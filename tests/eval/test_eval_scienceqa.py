"""ScienceQA: the parser, the published question layout, scores of all and of pictured questions, LLaVA's command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from llava.eval import eval_science_qa
from llava.eval.tasks import TASKS, Answer, BadEvalData
from llava.eval.tasks.scienceqa import choice_index, cqm_a_record, parse_choice

LETTER = "\nAnswer with the option's letter from the given choices directly."


# EVAL_PROTOCOLS 9.5, with four choices: what the reference parser gives.
@pytest.mark.parametrize(
    ("text", "letter", "index"),
    [
        ("A", "A", 0),
        ("A.", "FAILED", -1),
        ("A. dog", "A", 0),
        ("B. ", "B", 1),
        ("B.", "FAILED", -1),
        ("(A)", "FAILED", -1),
        ("a", "FAILED", -1),
        ("B.dog", "FAILED", -1),
        ("Answer: A", "FAILED", -1),
        ("E", "E", -1),
        ("The answer is B.", "B", 1),
        ("The answer is B", "FAILED", -1),
        ("The answer is B!", "B", 1),
        ("The answer is A. The answer is A.", "FAILED", -1),
        # the sentence may stand anywhere; the character after the letter must be on the same line
        ("Look. The answer is D, surely", "D", 3),
        ("The answer is B\n", "FAILED", -1),
        ("the answer is B.", "FAILED", -1),
        ("The answer is Z.", "Z", -1),
        ("AB", "FAILED", -1),
        ("F. dog", "FAILED", -1),
        ("A .", "FAILED", -1),
        ("Ａ", "FAILED", -1),  # noqa: RUF001
        ("", "FAILED", -1),
    ],
)
def test_the_reference_parser(text, letter, index):
    assert parse_choice(text) == letter
    assert choice_index(letter, 4) == index


def problem(question: str, choices: list[str], answer: int, hint: str = "", image: str | None = None) -> dict:
    return {
        "question": question,
        "choices": choices,
        "answer": answer,
        "hint": hint,
        "image": image,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "lecture": "",
        "solution": "",
        "split": "test",
    }


# Four problems of the test split: 4 and 21 without a picture, 5 and 11 with one; 7 belongs to another split.
PROBLEMS = {
    "4": problem("Which word is a verb?\nrun, cat", ["run", "cat"], 0),
    "5": problem("Which is hot?", ["ice", "fire", "snow"], 1, "Figure: a stove.\nIt is on.", "image.png"),
    "7": problem("Which is red?", ["a", "b"], 0),
    "11": problem("Which state is it?", ["Ohio", "Iowa", "Utah", "Maine"], 3, "", "image.png"),
    "21": problem("How warm is it?", ["45°C", "45°F"], 1, "Select the better estimate."),
}
SPLITS = {"train": ["7"], "test": ["4", "5", "11", "21"], "minitest": ["5"]}
RIGHT = {"4": "A", "5": "B", "11": "D", "21": "B"}

PUBLISHED = [
    {
        "id": "4",
        "conversations": [
            {"from": "human", "value": "Which word is a verb?\nrun, cat\nA. run\nB. cat"},
            {"from": "gpt", "value": "A"},
        ],
    },
    {
        "id": "5",
        "image": "5/image.png",
        "conversations": [
            {
                "from": "human",
                "value": "<image>\nContext: Figure: a stove.\nIt is on.\nWhich is hot?\nA. ice\nB. fire\nC. snow",
            },
            {"from": "gpt", "value": "B"},
        ],
    },
    {
        "id": "11",
        "image": "11/image.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhich state is it?\nA. Ohio\nB. Iowa\nC. Utah\nD. Maine"},
            {"from": "gpt", "value": "D"},
        ],
    },
    {
        "id": "21",
        "conversations": [
            {"from": "human", "value": "Context: Select the better estimate.\nHow warm is it?\nA. 45°C\nB. 45°F"},
            {"from": "gpt", "value": "B"},
        ],
    },
]


@pytest.fixture
def task():
    return TASKS.get("scienceqa")()


@pytest.fixture
def pictured():
    return TASKS.get("scienceqa_img")()


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "problems.json", PROBLEMS)
    write(tmp_path, "pid_splits.json", SPLITS)
    return tmp_path


def write(root, name: str, content) -> Path:
    path = root / "scienceqa" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def prompt_of(key: str) -> str:
    return next(row for row in PUBLISHED if row["id"] == key)["conversations"][0]["value"] + LETTER


def answers(texts: dict[str, str]) -> list[Answer]:
    """As LLaVA's script writes them: no key, the image mark in the prompt."""
    return [Answer(key, prompt_of(key), text) for key, text in texts.items()]


@pytest.mark.parametrize(
    ("texts", "accuracy", "img_accuracy", "unparsed"),
    [
        (RIGHT, 100, 100, 0),
        ({"4": "B", "5": "A", "11": "A", "21": "A"}, 0, 0, 0),
        (dict.fromkeys(RIGHT, ""), 0, 0, 4),
        ({"4": "A", "5": "A. ice", "11": "D. Maine", "21": "The answer is B."}, 75, 50, 0),
        # all name the right option in a form that the rule does not read
        ({"4": "A.", "5": "(B)", "11": "d", "21": "B: 45°F"}, 0, 0, 4),
        # a letter beyond the choices is read, and wrong; two sentences are not read
        ({"4": "E", "5": "E", "11": "The answer is D. The answer is D.", "21": "B"}, 25, 0, 1),
        ({"4": "Α", "5": "B\u2028", "11": "Д", "21": "B. 45°F ☀"}, 25, 0, 3),  # noqa: RUF001
    ],
    ids=["all right", "all wrong", "empty", "mixed", "malformed", "several answers", "unicode"],
)
def test_known_scores(task, pictured, root, texts, accuracy, img_accuracy, unparsed):
    score = task.score(root, answers(texts))
    assert score.metrics == pytest.approx({"accuracy": accuracy, "img_accuracy": img_accuracy})
    assert (score.headline, score.expected, score.scored) == ("accuracy", 4, 4)
    assert (score.missing, score.unparsed) == ([], unparsed)
    part = pictured.score(root, answers(texts))
    assert part.metrics == pytest.approx({"img_accuracy": img_accuracy})
    assert (part.headline, part.expected, part.scored, part.missing) == ("img_accuracy", 2, 2, [])


def test_order_does_not_matter(task, root):
    score = task.score(root, answers({"21": "A", "11": "D", "4": "A", "5": "C"}))
    assert score.metrics == pytest.approx({"accuracy": 50, "img_accuracy": 50})


def test_a_question_without_an_answer_is_wrong_and_named(task, pictured, root):
    score = task.score(root, answers({"4": "A", "11": "D"}))
    assert score.metrics == pytest.approx({"accuracy": 50, "img_accuracy": 50})
    assert (score.expected, score.scored, score.missing) == (4, 2, ["5", "21"])
    part = pictured.score(root, answers({"4": "A", "11": "D"}))
    assert (part.expected, part.scored, part.missing) == (2, 1, ["5"])


def test_our_answers_are_matched_by_key(task, root):
    score = task.score(root, [Answer("5", "", "B", "5"), Answer("4", "", "A", "4")])
    assert (score.metrics["accuracy"], score.missing) == (50.0, ["11", "21"])


def test_wrong_answers_are_refused(task, pictured, root):
    for which in (task, pictured):
        with pytest.raises(BadEvalData, match=r"1 answers repeat a question.*: 4"):
            which.score(root, [*answers(RIGHT), *answers({"4": "A"})])
        with pytest.raises(BadEvalData, match=r"1 answers belong to no question.*: 7"):
            which.score(root, [Answer("7", "", "A")])


def test_problems_become_the_published_layout():
    records = [cqm_a_record(key, PROBLEMS[key]) for key in SPLITS["test"]]
    assert records == PUBLISHED


@pytest.mark.parametrize("with_llava", [False, True])
def test_questions(task, pictured, root, with_llava):
    if with_llava:
        write(root, "llava_test_CQM-A.json", PUBLISHED)
    questions = task.questions(root)
    assert [question.key for question in questions] == ["4", "5", "11", "21"]
    assert questions[0].text == (
        "Which word is a verb?\nrun, cat\nA. run\nB. cat\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert questions[1].text == (
        "Context: Figure: a stove.\nIt is on.\nWhich is hot?\nA. ice\nB. fire\nC. snow\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert [len(question.visuals) for question in questions] == [0, 1, 1, 0]
    assert questions[1].visuals[0] == root / "scienceqa" / "images" / "test" / "5" / "image.png"
    assert [task.stored_prompt(question) for question in questions] == [prompt_of(key) for key in SPLITS["test"]]
    assert [question.key for question in pictured.questions(root)] == ["5", "11"]
    assert task.max_new_tokens == 1024


def test_questions_of_llava_decide_order(task, root):
    write(root, "llava_test_CQM-A.json", list(reversed(PUBLISHED)))
    assert [question.key for question in task.questions(root)] == ["21", "11", "5", "4"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1"])
def test_pictures_come_out_as_rgb(task, tmp_path, mode):
    path = tmp_path / "image.png"
    Image.new(mode, (3, 2)).save(path)
    picture = task.open_visual(path)
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (3, 2), (0, 0, 0))


def test_transparency_is_dropped_not_blended(task, tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGBA", (3, 2), (10, 20, 30, 0)).save(path)
    assert task.open_visual(path).getpixel((0, 0)) == (10, 20, 30)


def test_palette_pictures_stay_palette_pictures(task, tmp_path):
    path = tmp_path / "image.png"
    source = Image.new("RGB", (3, 2), (10, 20, 30)).quantize(2)
    source.save(path, transparency=0)
    picture = task.open_visual(path)
    assert (picture.mode, picture.size, picture.info.get("transparency")) == ("P", (3, 2), None)
    assert picture.convert("RGB").getpixel((0, 0)) == (10, 20, 30)


def test_a_picture_that_cannot_be_opened_is_named(task, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"no picture")
    for file in (path, tmp_path / "none.png"):
        with pytest.raises(BadEvalData, match=f"scienceqa: image .*{file.name}. cannot be read"):
            task.open_visual(file)


def test_everything_that_is_needed_is_named_with_its_source(task, tmp_path):
    needed = {item.path.relative_to(tmp_path).as_posix(): item.source for item in task.needed(tmp_path)}
    assert list(needed) == ["scienceqa/problems.json", "scienceqa/pid_splits.json", "scienceqa/images/test"]
    assert "lupantech/ScienceQA" in needed["scienceqa/problems.json"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("question", None, r"field 'question' must be str, got None"),
        ("hint", None, r"field 'hint' must be str, got None"),
        ("image", 5, r"field 'image' must be str or NoneType, got 5"),
        ("answer", True, r"field 'answer' must be int, got True"),
        ("answer", 3, r"field 'answer' is 3, but there are 3 choices"),
        ("choices", [], r"field 'choices' must hold 1 to 5 texts, got 0"),
        ("choices", ["a"] * 6, r"field 'choices' must hold 1 to 5 texts, got 6"),
        ("choices", "ab", r"field 'choices' must be list, got 'ab'"),
    ],
)
def test_malformed_problems(task, root, field, value, message):
    write(root, "problems.json", {**PROBLEMS, "5": {**PROBLEMS["5"], field: value}})
    with pytest.raises(BadEvalData, match=r"problems\.json, problem 5: " + message):
        task.questions(root)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ["4"]}, r"field 'test' \(list\) is missing"),
        ({"test": []}, r"split 'test' is empty"),
        ({"test": ["4", "4"]}, r"test: id 4 is there twice"),
        ({"test": ["4", "99"]}, r"test: id '99' is not in .*problems\.json"),
        ({"test": [4]}, r"test: id 4 is not in .*problems\.json"),
    ],
)
def test_malformed_splits(task, root, splits, message):
    write(root, "pid_splits.json", splits)
    with pytest.raises(BadEvalData, match=r"pid_splits\.json.*" + message):
        task.questions(root)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (PUBLISHED[:2], r"2 ids of the test split are not in it, first: 11, 21"),
        ([*PUBLISHED, PUBLISHED[1]], r"record 4: id 5 is there twice"),
        ([{**PUBLISHED[0], "id": "7"}], r"record 0: id 7 is not in the test split"),
        ([{**PUBLISHED[0], "image": "4/image.png"}], r"record 0: id 4 has a picture, unlike problems\.json"),
        ([{k: v for k, v in PUBLISHED[1].items() if k != "image"}], r"record 0: id 5 has no picture, unlike"),
        ([{**PUBLISHED[0], "conversations": []}], r"record 0, conversations\[0\]: expected a JSON object, got None"),
        ([{"conversations": []}], r"record 0: field 'id' \(str\) is missing"),
        (["x"], r"record 0: expected a JSON object, got 'x'"),
        ({}, r"expected a JSON list at the top, found dict"),
    ],
)
def test_malformed_question_file(task, root, records, message):
    write(root, "llava_test_CQM-A.json", records)
    with pytest.raises(BadEvalData, match=r"llava_test_CQM-A\.json.*" + message):
        task.questions(root)


def test_a_split_without_pictures(task, pictured, root):
    write(root, "pid_splits.json", {"test": ["4", "21"]})
    assert task.score(root, answers({"4": "A", "21": "A"})).metrics == {"accuracy": 50.0}
    with pytest.raises(BadEvalData, match="no problem of the test split has a picture"):
        pictured.questions(root)


def write_answers(path: Path, texts: dict[str, str], end: bytes = b"\n") -> Path:
    rest = {"answer_id": "x", "model_id": "m", "metadata": {}}
    rows = [{"question_id": a.question_id, "prompt": a.prompt, "text": a.text} | rest for a in answers(texts)]
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + end for row in rows))
    return path


def run(root, path, *arguments) -> int:
    return eval_science_qa.main(
        ["--base-dir", str(root / "scienceqa"), "--result-file", str(path), *map(str, arguments)]
    )


def test_the_command_scores_a_file_of_llava(root, capsys):
    path = write_answers(root / "a.jsonl", {**RIGHT, "5": "C. snow", "21": "45°F"}, b"\r\n")
    output, result = root / "output.jsonl", root / "result.json"
    assert run(root, path, "--output-file", output, "--output-result", result) == 0
    assert capsys.readouterr().out == "Total: 4, Correct: 2, Accuracy: 50.00%, IMG-Accuracy: 50.00%\n"
    assert json.loads(result.read_text()) == {
        "acc": 50.0,
        "correct": 2,
        "count": 4,
        "results": {"4": 0, "5": 2, "11": 3, "21": -1},
        "outputs": {"4": "A", "5": "C. snow", "11": "D", "21": "45°F"},
    }
    written = json.loads(output.read_text())
    assert [row["question_id"] for row in written["correct"]] == ["4", "11"]
    assert written["incorrect"][0] == {
        "question_id": "5",
        "parsed_ans": "C",
        "ground_truth": "B",
        "question": prompt_of("5"),
        "pred": "C. snow",
        "is_multimodal": True,
    }
    assert (written["incorrect"][1]["parsed_ans"], written["incorrect"][1]["is_multimodal"]) == ("FAILED", False)


def test_the_command_counts_missing_answers_as_wrong(root, capsys):
    path = write_answers(root / "a.jsonl", {"4": "A", "11": "D"})
    result = root / "result.json"
    assert run(root, path, "--output-result", result) == 2
    printed = capsys.readouterr()
    assert printed.out == "Total: 4, Correct: 2, Accuracy: 50.00%, IMG-Accuracy: 50.00%\n"
    assert "2 questions have no answer and count as wrong: 5, 21" in printed.err
    assert json.loads(result.read_text())["outputs"]["5"] == "FAILED"


def test_the_command_takes_a_split_and_letters(root, capsys):
    path = write_answers(root / "a.jsonl", {"5": "B"})
    assert run(root, path, "--split", "minitest", "--options", "ABC") == 0
    assert capsys.readouterr().out == "Total: 1, Correct: 1, Accuracy: 100.00%, IMG-Accuracy: 100.00%\n"
    assert run(root, path, "--split", "minitest", "--options", "AB") == 1
    assert "--options AB has fewer letters than a problem has choices" in capsys.readouterr().err


def test_the_command_refuses_bad_input(root, capsys):
    whole = write_answers(root / "whole.jsonl", RIGHT)
    cut, twice = root / "cut.jsonl", root / "twice.jsonl"
    cut.write_bytes(whole.read_bytes()[:-30])
    twice.write_bytes(whole.read_bytes() * 2)
    for path, message in (
        (cut, "cut.jsonl, line 4: broken JSON"),
        (twice, "4 answers repeat a question"),
        (root / "none.jsonl", "none.jsonl cannot be read"),
    ):
        assert run(root, path) == 1
        assert message in capsys.readouterr().err
    assert run(root, whole, "--split", "val") == 1
    assert "field 'val' (list) is missing" in capsys.readouterr().err
