"""MME: the official parsing and points, both folder layouts, LLaVA's and built questions, and bad files."""

from __future__ import annotations

import json
import random

import pytest

from llava.eval import convert_answer_to_mme, eval_mme
from llava.eval.answers import read_answers
from llava.eval.tasks import TASKS, Answer, BadEvalData
from llava.eval.tasks.mme import CATEGORIES, COGNITION, PERCEPTION, bare_question, mme_scores, parse_mme, score_folder

SHORT = "\nAnswer the question using a single word or phrase."
ASK = " Please answer yes or no."

# (text file below the release, picture, the two questions as the release words them, yes first).
RELEASE = [
    ("color/01.txt", "color/01.jpg", ("Is the cup red?" + ASK, "Is the cup blue? " + ASK)),
    ("color/02.txt", "color/02.jpg", ("Is the car black?" + ASK, "Is the car white" + ASK)),
    (
        "artwork/questions_answers_YN/9405.txt",
        "artwork/images/9405.jpg",
        ("Is this artwork displayed in musée d'orsay\uff1f" + ASK, "Is this artwork titled sorrow?" + ASK),
    ),
    (
        "code_reasoning/0001.txt",
        "code_reasoning/0001.png",
        ("Is a python code shown in the picture?" + ASK, "Is a c++ code shown in the picture?" + ASK),
    ),
]

RIGHT = ["Yes", "No"] * 4
WRONG = ["No", "Yes"] * 4
# color: 3 of 4 questions, 1 of 2 pictures; artwork: 1 of 2, none; code reasoning: all
MIXED = ["yes", "No.", "Yes, it is", "yeah: yes", "Yes", "maybe not", "YES", "no"]
MIXED_POINTS = {
    "total": 375.0,
    "perception": 175.0,
    "cognition": 200.0,
    "color": 125.0,
    "artwork": 50.0,
    "code_reasoning": 200.0,
}


def question_rows() -> list[dict]:
    """LLaVA's question file; its ids are the pictures' paths."""
    return [
        {"question_id": image, "image": image, "text": bare + SHORT, "category": image.split("/")[0]}
        for _, image, asked in RELEASE
        for bare in (question.replace(ASK, "").strip() for question in asked)
    ]


def write_rows(path, rows, newline="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps(row) + newline for row in rows).encode())


def write_release(home, newline="\n"):
    for text_file, image, asked in RELEASE:
        for path in (home / text_file, home / image):
            path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(f"{question}\t{label}{newline}" for question, label in zip(asked, ("Yes", "No"), strict=True))
        (home / text_file).write_bytes(content.encode())
        (home / image).write_bytes(b"a picture")


@pytest.fixture
def root(tmp_path):
    write_release(tmp_path / "MME" / "MME_Benchmark_release_version")
    write_rows(tmp_path / "MME" / "llava_mme.jsonl", question_rows())
    return tmp_path


@pytest.fixture
def mme():
    return TASKS.get("mme")()


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
        ("No.", "no"),
        ("a", "other"),
        ("Not", "no"),
        ("Nope", "no"),
        ("The yes", "other"),
        ("yeah", "other"),
        ("I'm not", "other"),
        ("It is", "other"),
        ("", "other"),
        ("The answer is yes", "other"),
        ("none", "no"),
        ("know", "no"),
        ("nor", "no"),
        # Where the official rule is not lmms-eval's: no single letters, and a full stop counts as a character.
        ("y", "other"),
        ("N", "other"),
        ("...no", "other"),
        ("YES!", "yes"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("no, yes", "no"),
        ("Да", "other"),
    ],
)
def test_answers_are_read_by_the_official_rule(text, label):
    assert parse_mme(text) == label


def test_points_are_those_that_the_official_script_printed():
    # Answers of a published run to the yes and the no question of the 20 pictures of OCR, which scored 140.0.
    published = ("YN", "YY", "YN", "YN", "YY", "YN", "YN", "YN", "YN", "YY")
    published += ("YY", "YN", "YY", "NN", "YN", "YN", "YN", "YY", "YY", "YN")
    words = {"Y": "yes", "N": "no"}
    rows = [
        ("OCR", str(picture), label, words[said])
        for picture, pair in enumerate(published)
        for label, said in zip(("yes", "no"), pair, strict=True)
    ]
    assert mme_scores(rows) == {"total": 140.0, "perception": 140.0, "cognition": 0, "OCR": 140.0}


def test_a_perfect_run_has_2800_points():
    rows = [(category, str(n), label, label) for category in CATEGORIES for n in range(3) for label in ("yes", "no")]
    random.Random(0).shuffle(rows)
    points = mme_scores(rows)
    assert (points["total"], points["perception"], points["cognition"]) == (2800, 2000, 800)
    assert (len(PERCEPTION), len(COGNITION)) == (10, 4)


def test_scores_refuse_an_odd_picture_and_an_unknown_category():
    with pytest.raises(BadEvalData, match="color/01 has 3 questions instead of two"):
        mme_scores([("color", "01", "yes", "yes")] * 3)
    with pytest.raises(BadEvalData, match="unknown category 'colour'"):
        mme_scores([("colour", "01", "yes", "yes")] * 2)


@pytest.mark.parametrize("request_text", [ASK, " " + ASK, SHORT, "", " \nPlease answer yes or no."])
def test_the_bare_question_has_no_request(request_text):
    assert bare_question("Is the cup red?" + request_text) == "Is the cup red?"


@pytest.mark.parametrize(
    ("texts", "total"), [(RIGHT, 600), (WRONG, 0), (MIXED, 375), (["Yes"] * 8, 150), (["не знаю"] * 8, 0)]
)
def test_total_points(root, mme, texts, total):
    score = mme.score(root, answers(texts))
    assert score.headline == "total"
    assert score.value == total
    assert (score.expected, score.scored, score.missing) == (8, 8, [])


def test_all_metrics_of_a_mixed_file(root, mme):
    score = mme.score(root, answers(MIXED))
    assert score.metrics == pytest.approx(MIXED_POINTS)
    assert score.unparsed == 2  # "yeah: yes" and "maybe not"
    assert any("the sums lack existence, count, position" in note for note in score.notes)


@pytest.mark.parametrize("seed", range(5))
def test_order_does_not_matter(root, mme, seed):
    dice = random.Random(seed)
    given, rows = answers(MIXED), question_rows()
    dice.shuffle(given)
    dice.shuffle(rows)
    write_rows(root / "MME" / "llava_mme.jsonl", rows)
    assert [q.question_id for q in mme.questions(root)] == [row["question_id"] for row in rows]
    assert mme.score(root, given).metrics == pytest.approx(MIXED_POINTS)


def test_questions_without_llavas_file_are_the_same_in_the_official_order_of_categories(root, mme):
    published = mme.questions(root)
    (root / "MME" / "llava_mme.jsonl").unlink()
    built = mme.questions(root)
    assert built == published
    assert [q.category for q in built] == ["color"] * 4 + ["artwork"] * 2 + ["code_reasoning"] * 2
    assert built[1].text == "Is the cup blue?" + SHORT  # two spaces before "Please" in the release
    assert built[4].question_id == "artwork/images/9405.jpg"
    assert built[6].visuals == (root / "MME/MME_Benchmark_release_version/code_reasoning/0001.png",)
    assert len({q.key for q in built}) == 8
    assert mme.score(root, answers(MIXED)).metrics == pytest.approx(MIXED_POINTS)


def test_ids_without_the_image_folder_and_the_benchmarks_own_prompts_are_understood(root, mme):
    given = [
        Answer(row["question_id"].replace("images/", ""), row["prompt"].replace(SHORT, ASK), row["text"])
        for row in llava_rows(MIXED)
    ]
    assert mme.score(root, given).metrics == pytest.approx(MIXED_POINTS)


def test_the_same_question_twice_about_a_picture_takes_answers_in_order(root, mme):
    release = root / "MME" / "MME_Benchmark_release_version"
    (release / "color" / "01.txt").write_text(f"Is it red?{ASK}\tYes\nIs it red? {ASK}\tNo\n")
    rows = question_rows()
    rows[0]["text"] = rows[1]["text"] = "Is it red?" + SHORT
    write_rows(root / "MME" / "llava_mme.jsonl", rows)
    assert [q.extra["label"] for q in mme.questions(root)][:2] == ["Yes", "No"]
    given = [Answer(row["question_id"], row["text"], text) for row, text in zip(rows, RIGHT, strict=True)]
    assert mme.score(root, given).value == 600


def test_windows_line_ends_change_nothing(root, mme):
    write_release(root / "MME" / "MME_Benchmark_release_version", "\r\n")
    write_rows(root / "MME" / "llava_mme.jsonl", question_rows(), "\r\n")
    write_rows(root / "answers.jsonl", llava_rows(MIXED), "\r\n")
    assert mme.score(root, read_answers(root / "answers.jsonl")).metrics == pytest.approx(MIXED_POINTS)


def test_our_rows_are_matched_by_their_key(root, mme):
    given = [Answer("?", "", text, q.key) for q, text in zip(mme.questions(root), MIXED, strict=True)]
    assert mme.score(root, given).metrics == pytest.approx(MIXED_POINTS)


def test_a_missing_answer_is_named_and_wrong(root, mme):
    score = mme.score(root, answers(RIGHT)[:-1])
    assert score.missing == ["code_reasoning/0001/1"]
    assert score.metrics["code_reasoning"] == 50
    assert (score.expected, score.scored, score.unparsed) == (8, 7, 0)


def test_answers_that_repeat_or_belong_elsewhere_are_refused(root, mme):
    given = answers(RIGHT)
    with pytest.raises(BadEvalData, match=r"1 answers repeat a question.*color/01/0"):
        mme.score(root, [*given, given[0]])
    with pytest.raises(BadEvalData, match=r"belong to no question.*color/01.jpg"):
        mme.score(root, [*given, Answer("color/01.jpg", "Is the cup green?" + SHORT, "No")])


def test_needed_files_are_named_with_their_source(tmp_path, mme):
    (needed,) = mme.needed(tmp_path)
    assert needed.path == tmp_path / "MME" / "MME_Benchmark_release_version"
    assert "BradyFU" in needed.source


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"Is it red?{ASK}\tYes\n", r"01.txt has 1 questions; every picture of MME has exactly two"),
        (f"Is it red?{ASK}\tYes\n" * 3, r"01.txt has 3 questions"),
        ("Is it red? Yes\nIs it blue?\tNo\n", r"01.txt, line 1: expected a question, a tab"),
        ("Is it red?\tYes\nIs it blue?\tMaybe\n", r"01.txt, line 2: expected .* found .*Maybe"),
        (b"\xff\xfe", r"01.txt cannot be read as UTF-8"),
    ],
)
def test_a_malformed_release_is_named(root, mme, content, message):
    path = root / "MME" / "MME_Benchmark_release_version" / "color" / "01.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadEvalData, match=message):
        mme.questions(root)


def test_an_empty_release_or_category_is_named(root, mme):
    release = root / "MME" / "MME_Benchmark_release_version"
    (release / "count").mkdir()
    with pytest.raises(BadEvalData, match=r"count has no text files with questions.*BradyFU"):
        mme.questions(root)
    release.rename(release.with_name("elsewhere"))
    with pytest.raises(BadEvalData, match=r"MME_Benchmark_release_version has none of MME's categories"):
        mme.questions(root)


def test_hidden_files_of_an_unpacker_are_no_questions(root, mme):
    (root / "MME" / "MME_Benchmark_release_version" / "color" / "._01.txt").write_bytes(b"\x00\x05")
    assert len(mme.questions(root)) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"lacks 1 questions .*code_reasoning/0001/1; every picture has two"),
        (lambda rows: [*rows, rows[0]], r"line 9: asks 'Is the cup red\?' .*once more than the release"),
        (
            lambda rows: [rows[0] | {"question_id": "count/7.jpg"}],
            r"line 1: .*about 'count/7.jpg'.*BradyFU",
        ),
        (lambda rows: [rows[0] | {"text": "Is it new?" + SHORT}], r"line 1: the release does not ask 'Is it new\?'"),
        (lambda rows: [{"question_id": "color/01.jpg"}], r"line 1.*text.*missing"),
    ],
)
def test_a_question_file_that_does_not_fit_the_release_is_refused(root, mme, change, message):
    write_rows(root / "MME" / "llava_mme.jsonl", change(question_rows()))
    with pytest.raises(BadEvalData, match=message):
        mme.questions(root)


def test_a_cut_off_question_file_is_named(root, mme):
    path = root / "MME" / "llava_mme.jsonl"
    path.write_text(path.read_text()[:-5])
    with pytest.raises(BadEvalData, match=r"llava_mme.jsonl, line 8.*JSON"):
        mme.questions(root)


def convert(root, rows) -> int:
    write_rows(root / "MME" / "answers" / "mine.jsonl", rows)
    return convert_answer_to_mme.main(["--experiment", "mine", "--data-dir", str(root / "MME")])


def test_converted_files_have_the_official_layout_and_score_the_same(root, capsys):
    rows = llava_rows(MIXED)
    rows[0]["text"] = "Yes,\tit\nis"
    random.Random(1).shuffle(rows)
    assert convert(root, rows) == 0
    folder = root / "MME" / "eval_tool" / "answers" / "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["artwork.txt", "code_reasoning.txt", "color.txt"]
    assert (folder / "color.txt").read_bytes().decode() == (
        "01.txt\tIs the cup red? Please answer yes or no.\tYes\tYes, it is\n"
        "01.txt\tIs the cup blue?  Please answer yes or no.\tNo\tNo.\n"
        "02.txt\tIs the car black? Please answer yes or no.\tYes\tYes, it is\n"
        "02.txt\tIs the car white Please answer yes or no.\tNo\tyeah: yes\n"
    )
    assert (
        (folder / "artwork.txt").read_text(encoding="utf-8").startswith("9405.txt\tIs this artwork displayed in musée")
    )
    assert score_folder(folder) == pytest.approx(MIXED_POINTS)


def test_conversion_works_in_the_current_folder_as_llavas_does(root, monkeypatch):
    write_rows(root / "MME" / "answers" / "mine.jsonl", llava_rows(RIGHT))
    monkeypatch.chdir(root / "MME")
    assert convert_answer_to_mme.main(["--experiment", "mine"]) == 0
    assert score_folder(root / "MME" / "eval_tool" / "answers" / "mine")["total"] == 600


def test_conversion_refuses_missing_answers(root, capsys):
    assert convert(root, llava_rows(RIGHT)[2:]) == 1
    assert "2 questions have no answer, first: color/01/0, color/01/1" in capsys.readouterr().err
    assert not (root / "MME" / "eval_tool").exists()


def write_results(folder, change=lambda lines: lines):
    folder.mkdir(exist_ok=True)
    for category in CATEGORIES:
        lines = ["1.jpg\tIs it?\tYes\tYes", "1.jpg\tIs it not?\tNo\tYes"]
        (folder / f"{category}.txt").write_text("\n".join(change(lines)) + "\n")


def test_the_calculation_prints_what_the_official_script_prints(tmp_path, capsys):
    write_results(tmp_path / "results")
    assert eval_mme.main(["--results_dir", str(tmp_path / "results")]) == 0
    out = capsys.readouterr().out
    assert "=========== Perception ===========\ntotal score: 500.0 \n\n\t existence  score: 50.0\n" in out
    assert "=========== Cognition ===========\ntotal score: 200.0 \n" in out
    assert out.endswith("Perception + Cognition: 700.00\n")


def test_the_calculation_names_what_is_missing_or_malformed(tmp_path, capsys):
    folder = tmp_path / "results"
    command = ["--results-dir", str(folder)]
    assert eval_mme.main(command) == 1
    assert "has no <category>.txt" in capsys.readouterr().err
    write_results(folder)
    (folder / "OCR.txt").unlink()
    assert eval_mme.main(command) == 2
    printed = capsys.readouterr()
    assert "no file for OCR" in printed.err
    assert "Perception + Cognition: 650.00" in printed.out
    for change, message in (
        (lambda lines: lines[:1], "existence.txt has 1 lines; expected two for every picture"),
        (lambda lines: [lines[0], lines[1][2:]], "existence.txt, line 2: jpg follows 1.jpg"),
        (lambda lines: [lines[0], lines[1] + "\tmore"], "existence.txt, line 2: expected picture, question"),
        (lambda lines: [lines[0].replace("\tYes\t", "\tSure\t"), lines[1]], "existence.txt, line 1: expected picture"),
    ):
        write_results(folder, change)
        assert eval_mme.main(command) == 1
        assert message in capsys.readouterr().err
