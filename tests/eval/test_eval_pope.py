"""POPE: the official parsing and scores, LLaVA's and built questions, and everything that can be wrong with files."""

from __future__ import annotations

import json
import random

import pytest

from llava.eval.answers import read_answers
from llava.eval.eval_pope import main
from llava.eval.tasks import TASKS, Answer, BadEvalData
from llava.eval.tasks.pope import PopeCounts, parse_pope, pope_metrics

SHORT = "\nAnswer the question using a single word or phrase."

# The pinned label files misspell questions with "an", and so does LLaVA's question file.
LABELS = {
    "adversarial": [
        ("a.jpg", "Is there a cat in the image?", "yes"),
        ("a.jpg", "Is there a dog in the image?", "no"),
        ("b.jpg", "Is there an orange in the imange?", "yes"),
        ("b.jpg", "Is there a cup in the image?", "no"),
    ],
    "random": [("a.jpg", "Is there a cat in the image?", "yes"), ("b.jpg", "Is there a boat in the image?", "no")],
    "popular": [
        ("a.jpg", "Is there a cat in the image?", "yes"),
        ("a.jpg", "Is there a person in the image?", "yes"),
        ("b.jpg", "Is there an orange in the imange?", "yes"),
        ("b.jpg", "Is there a person in the image?", "no"),
    ],
}
FIRST_ID = {"adversarial": 1, "random": 10_000_001, "popular": 20_000_001}

# In the order of the files: adversarial, random, popular.
RIGHT = ["Yes", "No", "Yes", "No", "Yes", "No", "Yes", "Yes", "Yes", "No"]
WRONG = ["No", "Yes", "No", "Yes", "No", "Yes", "No", "No", "No", "Yes"]
# adversarial: one of each outcome; random: all right; popular: 2 TP, 1 FN, 1 FP
MIXED = ["Yes", "Yes, it is.", "No.", "There is no cup.", "yes", "no", "Yes", "YES", "not", "Yes. No"]
MIXED_F1 = {"adversarial": 50.0, "random": 100.0, "popular": 200 / 3}


def question_rows() -> list[dict]:
    rows = []
    for category, labels in LABELS.items():
        for number, (image, text, _) in enumerate(labels, FIRST_ID[category]):
            rows.append({"question_id": number, "image": image, "text": text + SHORT, "category": category})
    return rows


def write_rows(path, rows, newline="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps(row) + newline for row in rows).encode())


def write_labels(home, newline="\n"):
    for category, labels in LABELS.items():
        rows = [
            {"question_id": n, "image": image, "text": text, "label": label}
            for n, (image, text, label) in enumerate(labels, 1)
        ]
        write_rows(home / "coco" / f"coco_pope_{category}.json", rows, newline)


@pytest.fixture
def root(tmp_path):
    home = tmp_path / "pope"
    write_labels(home)
    write_rows(home / "llava_pope_test.jsonl", question_rows())
    (home / "val2014").mkdir()
    return tmp_path


@pytest.fixture
def pope():
    return TASKS.get("pope")()


def llava_rows(texts) -> list[dict]:
    """Rows as LLaVA's scripts write them."""
    common = {"answer_id": "k3j", "model_id": "llava-v1.5-7b", "metadata": {}}
    asked = zip(question_rows(), texts, strict=True)
    return [{"question_id": row["question_id"], "prompt": row["text"], "text": text} | common for row, text in asked]


def answers(texts) -> list[Answer]:
    return [Answer(row["question_id"], row["prompt"], row["text"]) for row in llava_rows(texts)]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("No.", "no"),
        ("NO", "yes"),
        ("Nope", "yes"),
        ("There is no dog.", "no"),
        ("There isn't one", "yes"),
        ("I don't think so", "yes"),
        ("nothing", "yes"),
        ("", "yes"),
        ("Yes. No", "yes"),
        ("yes, not", "no"),
        ("Not sure", "yes"),
        ("no\n", "yes"),
        ("No,", "no"),
        ("нет", "yes"),
        ("no\u00a0dog", "yes"),
        ("no, there is a dog. Yes", "no"),
        ("Yes\r", "yes"),
    ],
)
def test_answers_are_read_by_the_official_rule(text, label):
    assert parse_pope(text) == label


def test_counts_and_ratios_are_those_that_the_official_script_printed():
    # Outcomes and printed values of a published run of LLaVA's script.
    first = PopeCounts(tp=1187, fp=133, tn=1367, fn=313)
    assert first.accuracy == 0.8513333333333334
    assert first.precision == 0.8992424242424243
    assert first.recall == 0.7913333333333333
    assert first.f1 == pytest.approx(0.8418439716312057, abs=1e-15)
    assert first.yes_ratio == 0.44
    second = PopeCounts(tp=1104, fp=29, tn=1285, fn=294)
    assert second.f1 == pytest.approx(0.8723824575266693, abs=1e-15)
    assert second.yes_ratio == 0.41777286135693215


def test_metrics_count_pairs_of_label_and_answer():
    pairs = [("yes", "yes")] * 3 + [("no", "yes")] * 2 + [("no", "no")] * 5 + [("yes", "no")]
    assert pope_metrics(pairs) == PopeCounts(tp=3, fp=2, tn=5, fn=1)
    with pytest.raises(ValueError, match="'maybe'"):
        pope_metrics([("yes", "maybe")])


def test_no_positive_answer_scores_zero_instead_of_dividing_by_zero():
    counts = pope_metrics([("yes", "no"), ("no", "no")])
    assert (counts.precision, counts.recall, counts.f1, counts.accuracy) == (0, 0, 0, 0.5)


@pytest.mark.parametrize(
    ("texts", "f1", "accuracy"),
    [
        (RIGHT, 100.0, 100.0),
        (WRONG, 0.0, 0.0),
        (MIXED, 100 * 13 / 18, 100 * 2 / 3),
        (["Yes"] * 10, 100 * 46 / 63, 100 * (0.5 + 0.5 + 0.75) / 3),
        ([""] * 10, 100 * 46 / 63, 100 * (0.5 + 0.5 + 0.75) / 3),
        (["No"] * 10, 0.0, 100 * (0.5 + 0.5 + 0.25) / 3),
    ],
    ids=["right", "wrong", "mixed", "always yes", "always empty", "always no"],
)
def test_the_score_is_the_mean_of_three_f1(root, pope, texts, f1, accuracy):
    score = pope.score(root, answers(texts))
    assert score.value == score.metrics["f1"] == pytest.approx(f1)
    assert score.metrics["accuracy"] == pytest.approx(accuracy)
    assert (score.expected, score.scored, score.missing) == (10, 10, [])


def test_all_metrics_of_a_mixed_file(root, pope):
    metrics = pope.score(root, answers(MIXED)).metrics
    assert {c: metrics[f"f1_{c}"] for c in LABELS} == pytest.approx(MIXED_F1)
    assert metrics["precision_popular"] == metrics["recall_popular"] == pytest.approx(200 / 3)
    assert metrics["yes_ratio_popular"] == pytest.approx(75)
    assert metrics["yes_ratio"] == pytest.approx((50 + 50 + 75) / 3)
    assert metrics["f1_pooled"] == pytest.approx(200 / 3)  # 4 TP, 2 FP, 2 FN, 2 TN
    assert metrics["accuracy_pooled"] == pytest.approx(60)


def test_unreadable_answers_are_counted_and_still_mean_yes(root, pope):
    score = pope.score(root, answers(["", "NO", "Вот", *RIGHT[3:]]))
    assert score.unparsed == 3
    assert any("3 answers say neither" in note for note in score.notes)
    assert score.metrics["recall_adversarial"] == 100
    assert score.metrics["precision_adversarial"] == pytest.approx(200 / 3)


def test_the_join_agrees_with_the_official_one_by_position(root, pope):
    labels = {category: iter([row[2] for row in rows]) for category, rows in LABELS.items()}
    questions = pope.questions(root)
    assert [q.extra["label"] for q in questions] == [next(labels[q.category]) for q in questions]


@pytest.mark.parametrize("seed", range(5))
def test_order_of_answers_and_of_question_rows_does_not_matter(root, pope, seed):
    dice = random.Random(seed)
    given = answers(MIXED)
    dice.shuffle(given)
    rows = question_rows()
    dice.shuffle(rows)
    write_rows(root / "pope" / "llava_pope_test.jsonl", rows)
    assert [q.question_id for q in pope.questions(root)] == [row["question_id"] for row in rows]
    assert pope.score(root, given).value == pytest.approx(100 * 13 / 18)


def test_a_question_asked_twice_gets_its_labels_in_the_files_order(root, pope):
    twice = {"question_id": 3, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "no"}
    path = root / "pope" / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text() + json.dumps(twice) + "\n")
    again = question_rows()[4] | {"question_id": 10_000_003}
    write_rows(root / "pope" / "llava_pope_test.jsonl", [*question_rows(), again])
    labels = {q.question_id: q.extra["label"] for q in pope.questions(root)}
    assert (labels[10_000_001], labels[10_000_003]) == ("yes", "no")


def test_questions_without_llavas_file_are_the_same(root, pope):
    published = pope.questions(root)
    (root / "pope" / "llava_pope_test.jsonl").unlink()
    assert pope.questions(root) == published
    assert published[0].text == "Is there a cat in the image?" + SHORT
    assert published[0].visuals == (root / "pope" / "val2014" / "a.jpg",)
    assert pope.score(root, answers(MIXED)).value == pytest.approx(100 * 13 / 18)


def test_labels_with_the_spelling_mended_still_match(root, pope):
    path = root / "pope" / "coco" / "coco_pope_popular.json"
    path.write_text(path.read_text().replace("imange", "image"))
    assert pope.score(root, answers(RIGHT)).value == 100


def test_windows_line_ends_change_nothing(root, pope):
    write_labels(root / "pope", "\r\n")
    write_rows(root / "pope" / "llava_pope_test.jsonl", question_rows(), "\r\n")
    write_rows(root / "answers.jsonl", llava_rows(MIXED), "\r\n")
    assert pope.score(root, read_answers(root / "answers.jsonl")).value == pytest.approx(100 * 13 / 18)


def test_our_rows_are_matched_by_their_key(root, pope):
    given = [
        Answer("another spelling", q.text, text, q.key) for q, text in zip(pope.questions(root), MIXED, strict=True)
    ]
    assert pope.score(root, given).value == pytest.approx(100 * 13 / 18)


def test_a_missing_answer_is_named_and_wrong(root, pope):
    score = pope.score(root, answers(RIGHT)[:-1])
    assert score.missing == ["20000004"]
    assert (score.expected, score.scored) == (10, 9)
    assert score.metrics["f1_popular"] == pytest.approx(100 * 6 / 7)  # 3 TP and the lost row as 1 FP


def test_answers_that_repeat_or_belong_elsewhere_are_refused(root, pope):
    given = answers(RIGHT)
    with pytest.raises(BadEvalData, match=r"1 answers repeat a question.*20000004"):
        pope.score(root, [*given, given[-1]])
    with pytest.raises(BadEvalData, match=r"belong to no question.*777"):
        pope.score(root, [*given, Answer(777, "Is there a cat in the image?", "Yes")])
    other = Answer(1, "Is there a zebra in the image?" + SHORT, "Yes")
    with pytest.raises(BadEvalData, match=r"question_id 1 was asked 'Is there a zebra.*another version of POPE"):
        pope.score(root, [other, *given[1:]])


def test_needed_files_are_named_with_their_source(tmp_path, pope):
    needed = pope.needed(tmp_path)
    assert [item.path.relative_to(tmp_path).as_posix() for item in needed] == [
        "pope/coco/coco_pope_adversarial.json",
        "pope/coco/coco_pope_random.json",
        "pope/coco/coco_pope_popular.json",
        "pope/val2014",
    ]
    assert all("e3e39262" in item.source for item in needed[:3])
    assert "val2014.zip" in needed[3].source


def replace_line(path, number, change):
    lines = path.read_text().splitlines()
    lines[number] = change(lines[number])
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("coco/coco_pope_random.json", lambda s: s[:20], r"coco_pope_random.json, line 2.*JSON"),
        ("coco/coco_pope_random.json", lambda s: s.replace('"no"', '"No"'), r"random.json, line 2.*'label'.*'No'"),
        ("coco/coco_pope_random.json", lambda s: s.replace("label", "state"), r"random.json, line 2.*label"),
        ("coco/coco_pope_random.json", lambda s: s + "\n" + s, r"random.json has 3 rows.*asks 2.*commit e3e39262"),
        ("coco/coco_pope_random.json", lambda s: s.replace("boat", "kite"), r"no row for b.jpg with.*boat.*e3e39262"),
        ("llava_pope_test.jsonl", lambda s: s[:-9], r"llava_pope_test.jsonl, line 2.*JSON"),
        ("llava_pope_test.jsonl", lambda s: s.replace(": 2,", ": 1,"), r"line 2.*question_id 1 was used before"),
        ("llava_pope_test.jsonl", lambda s: s.replace("adversarial", "rare"), r"line 2.*'category'.*'rare'"),
        ("llava_pope_test.jsonl", lambda s: s.replace("image", "picture"), r"line 2.*image.*missing"),
        ("llava_pope_test.jsonl", lambda s: "[1]", r"line 2: expected a JSON object"),
    ],
)
def test_a_malformed_row_is_named(root, pope, file, change, message):
    replace_line(root / "pope" / file, 1, change)
    with pytest.raises(BadEvalData, match=message):
        pope.questions(root)


def test_missing_and_empty_label_files_are_named(root, pope):
    path = root / "pope" / "coco" / "coco_pope_popular.json"
    path.write_text("")
    with pytest.raises(BadEvalData, match=r"coco_pope_popular.json has no rows.*e3e39262"):
        pope.questions(root)
    path.unlink()
    with pytest.raises(BadEvalData, match=r"coco_pope_popular.json cannot be read"):
        pope.questions(root)


def command(root, rows) -> list[str]:
    home = root / "pope"
    write_rows(root / "answers.jsonl", rows)
    files = (home / "coco", home / "llava_pope_test.jsonl", root / "answers.jsonl")
    flags = ("--annotation-dir", "--question-file", "--result-file")
    return [word for flag, file in zip(flags, files, strict=True) for word in (flag, str(file))]


def test_llavas_command_prints_what_llavas_script_prints(root, capsys):
    assert main(command(root, llava_rows(MIXED))) == 0
    out = capsys.readouterr().out
    assert "Category: adversarial, # samples: 4\nTP\tFP\tTN\tFN\t\n1\t1\t1\t1\nAccuracy: 0.5\nPrecision: 0.5\n" in out
    assert "0.667, 0.500, 0.667, 0.667, 0.750\n" in out
    assert out.endswith("Average F1: 72.22\n")


def test_llavas_command_fails_on_missing_answers_and_bad_files(root, capsys):
    assert main(command(root, llava_rows(RIGHT)[1:])) == 2
    assert "1 questions have no answer and count as wrong: 1" in capsys.readouterr().err
    words = command(root, llava_rows(RIGHT))
    path = root / "answers.jsonl"
    path.write_text(path.read_text()[:-30])
    assert main(words) == 1
    assert "answers.jsonl, line 10" in capsys.readouterr().err
    path.unlink()
    assert main(words) == 1
    assert "answers.jsonl cannot be read" in capsys.readouterr().err
