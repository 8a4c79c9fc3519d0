"""TextVQA: M4C's normaliser and soft score, the join of LLaVA's answers, and the official files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.eval import eval_textvqa
from llava.eval.answers import read_answers
from llava.eval.m4c_evaluator import (
    CONTRACTIONS,
    PUNCTUATION,
    EvalAIAnswerProcessor,
    TextVQAAccuracyEvaluator,
    answer_scores,
    normalise,
    soft_score,
)
from llava.eval.tasks import TASKS, Answer, BadEvalData
from llava.eval.tasks.textvqa import question_of_prompt

SUFFIX = "\nAnswer the question using a single word or phrase."

# Outputs of the reference normaliser (EVAL_PROTOCOLS 9.1).
NORMALISED = [
    ("Coca-Cola", "coca cola"),
    ("coca-cola.", "coca cola"),
    ("The U.S.A.", "usa"),
    ("St. Louis", "st louis"),
    ("12,000", "12000"),
    ("1,000 dollars", "1000 dollars"),
    ("12:30", "12:30"),
    ("$5.99", "$5.99"),
    ("3.5.", "3.5"),
    ("1.", "1"),
    ("dont", "don't"),
    ("youve", "you've"),
    ("it's", "it 's"),
    ("Bob's", "bob 's"),
    ("Two", "2"),
    ("ten", "10"),
    ("twenty", "twenty"),
    ("none", "0"),
    ("a  dog", "dog"),
    ("A", ""),
    ("the", ""),
    ("", ""),
    ("10%", "10%"),
    ("r&b", "r&b"),
    ("x - y", "x y"),
    ("7-eleven", "7 eleven"),
    ("hello/world", "hello world"),
    ("and/or", "and or"),
    ("a_b", "b"),
    ("n/a", "n"),
    ("C++", "c"),
    ("#1", "#1"),
    ('"abc"', "abc"),
    ("(abc)", "abc"),
    ("o'clock", "o'clock"),
    ("e-mail", "e mail"),
    ("\n line\tbreak ", "line break"),
    ("what?", "what"),
]


@pytest.mark.parametrize(("text", "expected"), NORMALISED)
def test_the_reference_normaliser(text, expected):
    assert normalise(text) == expected
    assert EvalAIAnswerProcessor()(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # one hyphen beside a space removes every hyphen, so that no space is left in "e-mail"
        ("e-mail -", "email"),
        ("Zero one TWO three four five six seven eight nine Ten", "0 1 2 3 4 5 6 7 8 9 10"),
        ("ONE, two", "1 2"),
        ("an apple a day", "apple day"),
        ("CAFÉ №5", "café №5"),
        ("ŽLUŤOUČKÝ KŮŇ", "žluťoučký kůň"),
        ("北京?", "北京"),
        ("i'dve", "i'dve"),
        ("hed've", "he'd've"),
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("y'alld've", "y'all'd've"),
        ("well hell id were", "well hell id were"),
    ],
)
def test_more_of_the_normaliser(text, expected):
    assert normalise(text) == expected


def test_only_32_periods_are_dropped():
    assert normalise("x" + ". " * 40) == "x" + " ." * 8


def test_the_contraction_table():
    assert len(CONTRACTIONS) == 120
    assert len(set(PUNCTUATION)) == len(PUNCTUATION) == 21
    assert all(wrong.replace("'", "") == right.replace("'", "") for wrong, right in CONTRACTIONS.items())
    for wrong, right in (
        ("wont", "won't"),
        ("shouldnt've", "shouldn't've"),
        ("shouldn'tve", "shouldn't've"),
        ("theyre", "they're"),
        ("maam", "ma'am"),
        ("twas", "'twas"),
        ("notve", "not've"),
        ("thats", "that's"),
        ("whyll", "why'll"),
        ("therere", "there're"),
        ("yall", "y'all"),
        ("Im", "I'm"),
    ):
        assert CONTRACTIONS[wrong] == right
    assert not {"its", "lets", "ill", "shed", "wed", "were", "shes", "cannot"} & set(CONTRACTIONS)


@pytest.mark.parametrize(
    ("answers", "text", "expected"),
    [
        (["nokia"] * 9 + ["nokia phone"], "Nokia", 1.0),
        (["nokia"] * 3 + ["x"] * 7, "nokia", 0.9),
        (["nokia"] * 2 + ["x"] * 8, "nokia.", 0.6),
        (["nokia"] + ["x"] * 9, "nokia", 0.3),
        (["a", "the"] + ["x"] * 8, "an", 0.6),
        (["nokia"] * 9 + ["nokia phone"], "samsung", 0.0),
        (["nokia"] * 10, "", 0.0),
        (["12,000"] * 4 + ["12000"] * 6, "12000.", 1.0),
    ],
)
def test_soft_score(answers, text, expected):
    assert soft_score(text, answers) == pytest.approx(expected, abs=1e-12)
    assert soft_score(text, list(reversed(answers))) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("agreeing", "expected"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)])
def test_score_by_number_of_agreeing_annotators(agreeing, expected):
    scores = answer_scores(["yes"] * agreeing + [f"other {i}" for i in range(10 - agreeing)])
    assert scores["yes"] == pytest.approx(expected, abs=1e-12)


def test_ten_annotators_are_required():
    with pytest.raises(ValueError, match="needs 10 annotators' answers, got 9"):
        soft_score("x", ["x"] * 9)


def test_the_evaluator_that_other_scripts_import():
    evaluator = TextVQAAccuracyEvaluator()
    nokia = ["nokia"] * 2 + ["x"] * 8
    rows = [{"pred_answer": "nokia", "gt_answers": nokia}, {"pred_answer": "X.", "gt_answers": nokia}]
    assert evaluator.eval_pred_list(rows) == pytest.approx((0.6 + 1.0) / 2)
    with pytest.raises(ValueError, match="no predictions"):
        evaluator.eval_pred_list([])


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("What brand is this?\nReference OCR token: ACME, 12" + SUFFIX, "what brand is this?"),
        ("What brand is this?\nReference OCR token: " + SUFFIX, "what brand is this?"),
        ("Reference OCR token: ACME\nWhat Brand?" + SUFFIX, "what brand?"),
        ("What brand is this?" + SUFFIX, "what brand is this?"),
        ("OCR tokens: A, B. Question: What\nbrand? Short answer:", "what\nbrand?"),
        ("Wie heißt DAS Café?" + SUFFIX, "wie heißt das café?"),
    ],
)
def test_the_question_is_recovered_from_the_prompt(prompt, question):
    assert question_of_prompt(prompt) == question


@pytest.mark.parametrize("prompt", ["", "What?", "a\nb\nc", "OCR tokens: A. What?", "a\nReference OCR token: x\nb\nc"])
def test_prompts_without_a_question(prompt):
    with pytest.raises(BadEvalData, match="no question can be recovered from the prompt"):
        question_of_prompt(prompt)


# question_id, image_id, question, answers. Two questions share a picture, one question is asked about two pictures.
WORLD = [
    (34602, "00aa", "what brand is this?", ["acme"] * 9 + ["acme inc"]),
    (34603, "00aa", "what year is on it?", ["1999"] * 2 + ["1998"] * 8),
    (34604, "00bb", "what brand is this?", ["nokia"] * 3 + ["sony"] * 7),
    (34605, "00cc", "is it on or off?", ["on"] + ["off"] * 4 + ["no"] * 5),
]
TOKENS = {"00aa": ["ACME", "1999"], "00bb": ["NO", "KIA,"], "00cc": []}
ALL_RIGHT = {34602: "Acme", 34603: "1998.", 34604: "SONY", 34605: "Off"}


def official(rows=WORLD) -> dict:
    names = ("question_id", "image_id", "question", "answers")
    return {"data": [dict(zip(names, row, strict=True)) | {"image_width": 4} for row in rows]}


def prompt_of(question: str, image_id: str) -> str:
    return f"{question.capitalize()}\nReference OCR token: {', '.join(TOKENS[image_id])}{SUFFIX}"


def llava_row(image_id: str, question: str, **changes) -> dict:
    row = {"question_id": image_id, "image": f"{image_id}.jpg", "text": prompt_of(question, image_id)}
    return {**row, "category": "default", **changes}


def published() -> list[dict]:
    return [llava_row(image_id, question) for _, image_id, question, _ in WORLD]


def answers(texts: dict[int, str]) -> list[Answer]:
    """As LLaVA's script writes them: the picture's id, no key."""
    known = {key: (image_id, question) for key, image_id, question, _ in WORLD}
    return [Answer(known[key][0], prompt_of(known[key][1], known[key][0]), text) for key, text in texts.items()]


@pytest.fixture
def task():
    return TASKS.get("textvqa")()


@pytest.fixture
def plain():
    return TASKS.get("textvqa_no_ocr")()


@pytest.fixture
def root(tmp_path):
    write(tmp_path, official())
    return tmp_path


def write(root, content) -> Path:
    path = root / "textvqa" / "TextVQA_0.5.1_val.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_llava(root, rows) -> Path:
    path = root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tokens(root, tokens=None) -> Path:
    path = root / "textvqa" / "TextVQA_Rosetta_OCR_v0.2_val.json"
    rows = [{"image_id": image_id, "ocr_tokens": found} for image_id, found in (tokens or TOKENS).items()]
    path.write_text(json.dumps({"data": rows}))
    return path


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (ALL_RIGHT, 100.0),
        (dict.fromkeys(ALL_RIGHT, "blue"), 0.0),
        (dict.fromkeys(ALL_RIGHT, ""), 0.0),
        # 1.0 (9 of 10), 0.6 (2 of 10), 0.9 (3 of 10), 0.3 (1 of 10)
        ({34602: "acme", 34603: "1999", 34604: "Nokia!", 34605: "on"}, 100 * 2.8 / 4),
        # a lone article and a sentence are wrong, "The off." is right
        ({34602: "the", 34603: "the year is 1998", 34604: "sony\n", 34605: "The off."}, 50.0),
        ({34602: "acme\u2028", 34603: "\uff11\uff19\uff19\uff18", 34604: "sóny", 34605: "off"}, 50.0),
    ],
    ids=["all right", "all wrong", "empty", "partly", "malformed", "unicode"],
)
def test_known_scores(task, root, texts, expected):
    score = task.score(root, answers(texts))
    assert score.metrics == pytest.approx({"accuracy": expected})
    assert (score.headline, score.expected, score.scored, score.missing) == ("accuracy", 4, 4, [])


def test_order_does_not_matter(task, root):
    shuffled = {34605: "on", 34603: "1999", 34602: "acme", 34604: "nokia"}
    assert task.score(root, answers(shuffled)).value == pytest.approx(70.0)


def test_a_question_without_an_answer_is_wrong_and_named(task, root):
    score = task.score(root, answers({34602: "acme", 34604: "sony"}))
    assert score.value == pytest.approx(50.0)
    assert (score.expected, score.scored, score.missing) == (4, 2, ["34603", "34605"])


def test_our_answers_are_matched_by_key(task, root):
    rows = [Answer("00aa", "whatever was asked", "1998", "34603"), Answer("00bb", "", "sony", "34604")]
    score = task.score(root, rows)
    assert (score.value, score.missing) == (pytest.approx(50.0), ["34602", "34605"])


def test_a_question_asked_twice_about_a_picture(task, tmp_path):
    """Upstream looks both up in a table in which the last row stays, so both are scored against it."""
    twice = [*WORLD, (34606, "00aa", "What brand IS this?", ["globex"] * 10)]
    write(tmp_path, official(twice))
    rows = [*answers(ALL_RIGHT), *answers({34602: "globex"})]
    score = task.score(tmp_path, rows)
    assert (score.expected, score.scored, score.missing) == (5, 5, [])
    assert score.value == pytest.approx(100 * 4 / 5)
    write_llava(tmp_path, [*published(), llava_row("00aa", "what brand is this?")])
    assert [q.key for q in task.questions(tmp_path)] == ["34602", "34603", "34604", "34605", "34606"]
    with pytest.raises(BadEvalData, match=r"repeat a question.*34606"):
        task.score(tmp_path, [*rows, *answers({34602: "acme"})])


def test_wrong_answers_are_refused(task, root):
    with pytest.raises(BadEvalData, match=r"1 answers repeat a question.*34602"):
        task.score(root, [*answers(ALL_RIGHT), *answers({34602: "acme"})])
    with pytest.raises(BadEvalData, match=r"1 answers belong to no question.*00aa 'who\?'"):
        task.score(root, [Answer("00aa", "Who?" + SUFFIX, "acme")])
    with pytest.raises(BadEvalData, match=r"answer with question_id 00aa: no question can be recovered"):
        task.score(root, [Answer("00aa", "Who?", "acme")])
    with pytest.raises(BadEvalData, match=r"belong to no question.*999"):
        task.score(root, [Answer("00aa", "Who?", "acme", "999")])


def test_questions_of_llava_decide_order_and_prompt(task, root):
    write_llava(root, [published()[2], published()[0], published()[3], published()[1]])
    questions = task.questions(root)
    assert [question.key for question in questions] == ["34604", "34602", "34605", "34603"]
    assert [question.question_id for question in questions] == ["00bb", "00aa", "00cc", "00aa"]
    assert questions[1].text == (
        "What brand is this?\nReference OCR token: ACME, 1999\nAnswer the question using a single word or phrase."
    )
    assert questions[1].visuals == (root / "textvqa" / "train_images" / "00aa.jpg",)


def test_questions_from_the_official_files(task, root):
    write_tokens(root)
    questions = task.questions(root)
    assert [question.text for question in questions] == [row["text"] for row in published()]
    assert questions[3].text == "Is it on or off?\nReference OCR token: \n" + SUFFIX.strip()
    assert questions[2].visuals[0].name == "00bb.jpg"


def test_tokens_in_the_annotations_are_used(task, tmp_path):
    content = official()
    for row in content["data"]:
        row["ocr_tokens"] = TOKENS[row["image_id"]]
    write(tmp_path, content)
    assert [question.text for question in task.questions(tmp_path)] == [row["text"] for row in published()]
    assert len(task.needed(tmp_path)) == 2


@pytest.mark.parametrize("with_llava", [False, True])
def test_questions_without_ocr(plain, root, with_llava):
    if with_llava:
        write_llava(root, reversed(published()))
    questions = plain.questions(root)
    assert {question.key for question in questions} == {"34602", "34603", "34604", "34605"}
    asked = {question.key: question.text for question in questions}
    assert asked["34602"] == "What brand is this?\nAnswer the question using a single word or phrase."
    assert questions[0].key == ("34605" if with_llava else "34602")
    rows = [Answer(q.question_id, q.text, ALL_RIGHT[int(q.key)]) for q in questions]
    assert plain.score(root, rows).value == pytest.approx(100.0)
    assert "not comparable" in plain.score(root, rows).notes[0]


def test_everything_that_is_needed_is_named_with_its_source(task, plain, root):
    def needed(which):
        return [item.path.relative_to(root / "textvqa").as_posix() for item in which.needed(root)]

    assert needed(plain) == ["TextVQA_0.5.1_val.json", "train_images"]
    assert needed(task) == ["TextVQA_0.5.1_val.json", "train_images", "llava_textvqa_val_v051_ocr.jsonl"]
    source = task.needed(root)[2].source
    assert "eval.zip" in source
    assert "TextVQA_Rosetta_OCR_v0.2_val.json" in source
    assert "textvqa_no_ocr" in source
    write_tokens(root)
    assert needed(task) == ["TextVQA_0.5.1_val.json", "train_images"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("answers", ["a"] * 9, r"field 'answers' must be a list of 10 texts, got \['a'"),
        ("answers", [1] * 10, r"field 'answers' must be a list of 10 texts"),
        ("image_id", 5, r"field 'image_id' must be str, got 5"),
        ("question", None, r"field 'question' must be str, got None"),
    ],
)
def test_malformed_annotations(task, tmp_path, field, value, message):
    content = official()
    content["data"][1][field] = value
    write(tmp_path, content)
    with pytest.raises(BadEvalData, match=r"TextVQA_0\.5\.1_val\.json, data\[1\] \(question_id 34603\): " + message):
        task.questions(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": []}, "holds no questions"),
        ({"rows": []}, r"field 'data' \(list\) is missing"),
        ({"data": [{}]}, r"data\[0\]: field 'question_id' \(int or str\) is missing"),
        ({"data": [7]}, r"data\[0\]: expected a JSON object, got 7"),
        (official([WORLD[0], WORLD[0]]), r"data\[1\] .*question_id 34602 is there twice"),
    ],
)
def test_a_damaged_annotation_file(task, tmp_path, content, message):
    write(tmp_path, content)
    with pytest.raises(BadEvalData, match=message):
        task.questions(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (published()[:1], r"3 questions of .* are not in it, first: question_id 34603, 34604"),
        ([published()[0]] * 2, r"line 2: \('00aa', 'what brand is this\?'\) is there twice"),
        ([llava_row("00aa", "who is it?")], r"line 1: 00aa 'who is it\?' is no question of"),
        ([llava_row("00aa", "x", text="What?")], r"line 1: no question can be recovered"),
        ([llava_row("00aa", "what brand is this?", image=None)], r"line 1: field 'image' must be str, got None"),
        ([{"question_id": "00aa"}], r"line 1: field 'text' \(str\) is missing"),
    ],
)
def test_malformed_question_file(task, root, rows, message):
    write_llava(root, rows)
    with pytest.raises(BadEvalData, match=message):
        task.questions(root)


def test_malformed_tokens(task, root):
    write_tokens(root, {"00aa": ["x"]})
    with pytest.raises(BadEvalData, match=r"no row for image_id 00bb, which .*data\[2\] \(question_id 34604\) asks"):
        task.questions(root)
    write_tokens(root, {**TOKENS, "00aa": [3]})
    with pytest.raises(BadEvalData, match=r"data\[0\]: field 'ocr_tokens' must be a list of texts, got \[3\]"):
        task.questions(root)


def write_answers(path: Path, texts: dict[int, str], end: bytes = b"\n") -> Path:
    rest = {"answer_id": "x", "model_id": "m", "metadata": {}}
    rows = [{"question_id": a.question_id, "prompt": a.prompt, "text": a.text} | rest for a in answers(texts)]
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + end for row in rows))
    return path


def run(root, *arguments) -> int:
    annotations = root / "textvqa" / "TextVQA_0.5.1_val.json"
    return eval_textvqa.main(["--annotation-file", str(annotations), *map(str, arguments)])


def test_the_command_scores_a_file_of_llava(root, capsys):
    path = write_answers(root / "llava-7b.jsonl", {**ALL_RIGHT, 34602: "ac\u2028me", 34603: "1999"}, b"\r\n")
    assert run(root, "--result-file", path) == 0
    # 0 + 0.6 + 1 + 1 of 4
    assert capsys.readouterr().out == "llava-7b\nSamples: 4\nAccuracy: 65.00%\n\n"


def test_one_file_is_scored_by_llavas_signature(root, capsys):
    path = write_answers(root / "llava-7b.jsonl", ALL_RIGHT)
    assert eval_textvqa.eval_single(str(root / "textvqa" / "TextVQA_0.5.1_val.json"), str(path)) == []
    assert capsys.readouterr().out == "llava-7b\nSamples: 4\nAccuracy: 100.00%\n\n"


def test_the_command_names_missing_questions_and_scores_what_is_there(root, capsys):
    path = write_answers(root / "part.jsonl", {34602: "acme", 34603: "1999"})
    assert run(root, "--result-file", path) == 2
    printed = capsys.readouterr()
    assert printed.out == "part\nSamples: 2\nAccuracy: 80.00%\n\n"
    assert "2 questions have no answer and are not in the mean, first question_id: 34604, 34605" in printed.err


def test_the_command_scores_a_folder(root, capsys):
    folder = root / "answers"
    folder.mkdir()
    (folder / "notes.txt").write_text("")
    write_answers(folder / "b.jsonl", ALL_RIGHT)
    write_answers(folder / "a.jsonl", dict.fromkeys(ALL_RIGHT, "x"))
    assert run(root, "--result-dir", folder) == 0
    out = capsys.readouterr().out
    assert out == "a\nSamples: 4\nAccuracy: 0.00%\n\nb\nSamples: 4\nAccuracy: 100.00%\n\n"


def test_the_command_refuses_bad_input(root, capsys):
    cut = root / "cut.jsonl"
    cut.write_bytes(write_answers(root / "whole.jsonl", ALL_RIGHT).read_bytes()[:-30])
    empty = root / "empty.jsonl"
    empty.write_text("\n")
    for arguments, message in (
        (["--result-file", cut], "cut.jsonl, line 4: broken JSON"),
        (["--result-file", empty], "empty.jsonl has no answers"),
        (["--result-file", root / "none.jsonl"], "none.jsonl cannot be read"),
        (["--result-dir", root / "textvqa"], "textvqa has no .jsonl files"),
        ([], "pass --result-file or --result-dir"),
    ):
        assert run(root, *arguments) == 1
        assert message in capsys.readouterr().err


def test_reading_keeps_line_separators_inside_a_text(root):
    path = write_answers(root / "a.jsonl", {34602: "ac\u2028me", 34603: "19\x8599"})
    assert [answer.text for answer in read_answers(path)] == ["ac\u2028me", "19\x8599"]
