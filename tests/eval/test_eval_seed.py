"""SEED-Bench, image part: the official score, LLaVA's and built questions, the upload file, and bad files."""

from __future__ import annotations

import json
import random
import runpy
from pathlib import Path

import pytest

from llava.eval.answers import read_answers
from llava.eval.convert_seed_for_submission import main
from llava.eval.tasks import TASKS, Answer, BadEvalData
from llava.eval.tasks.seed import plain_id, seed_scores

LETTER = "\nAnswer with the option's letter from the given choices directly."
TYPES = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
# id as the annotations spell it, image or video, type, right letter
QUESTIONS = [
    ("101669", "image", 1, "A"),
    ("102", "image", 1, "B"),
    ("v_8", "video", 10, "D"),
    ("103", "image", 2, "C"),
    ("104", "video", 10, "A"),
]
IMAGES = {"101669": "A", "102": "B.", "103": "C"}  # the second has more than the letter
VIDEOS = {"v_8": "D", "104": "B"}


def annotations() -> dict:
    questions = [
        {
            "answer": answer,
            "choice_a": f"{name} one",
            "choice_b": "zwei",
            "choice_c": "trois ou trois ½",
            "choice_d": "four",
            "data_id": f"{name}_77" if data_type == "image" else f"{name}.mp4",
            "data_type": data_type,
            "question": f"What is {name}?",
            "question_id": name,
            "question_type_id": kind,
        }
        for name, data_type, kind, answer in QUESTIONS
    ]
    return {"question_type": TYPES, "questions": questions}


def question_rows() -> list[dict]:
    """LLaVA's question file: ids are numbers where they can be, video rows name a frame."""
    rows = []
    for row in annotations()["questions"]:
        options = "".join(f"\n{letter}. {row[f'choice_{letter.lower()}']}" for letter in "ABCD")
        image = "SEED-Bench-image/" + row["data_id"]
        if row["data_type"] == "video":
            image = f"SEED-Bench-video-image/{row['question_id']}.png"
        asked = {
            "question_id": plain_id(row["question_id"]),
            "image": image,
            "text": row["question"] + options + LETTER,
        }
        rows.append(asked | {"category": row["question_type_id"]})
    return rows


def write_rows(path, rows, newline="\n"):
    path.write_bytes("".join(json.dumps(row) + newline for row in rows).encode())


@pytest.fixture
def root(tmp_path):
    home = tmp_path / "seed_bench"
    (home / "SEED-Bench-image").mkdir(parents=True)
    (home / "SEED-Bench.json").write_text(json.dumps(annotations()))
    write_rows(home / "llava-seed-bench.jsonl", question_rows())
    return tmp_path


@pytest.fixture
def seed():
    return TASKS.get("seed_image")()


def llava_rows(texts) -> list[dict]:
    """Rows as LLaVA's scripts write them, for the questions that `texts` answers."""
    asked = {str(row["question_id"]): row for row in question_rows()}
    common = {"answer_id": "k3j", "model_id": "llava-v1.5-7b", "metadata": {}}
    return [
        {"question_id": asked[name]["question_id"], "prompt": asked[name]["text"], "text": text} | common
        for name, text in texts.items()
    ]


def answers(texts) -> list[Answer]:
    return [Answer(row["question_id"], row["prompt"], row["text"]) for row in llava_rows(texts)]


@pytest.mark.parametrize(
    "text", ["A.", "a", " A", "A\n", "A. one", "(A)", "The answer is A", "", "\u0410", "A\r", "AB"]
)
def test_anything_but_the_letter_is_wrong(text):
    assert seed_scores([("Type", "image", "A", text)]) == {"image": 0, "Type": 0}


def test_scores_per_type_and_part():
    rows = [
        ("One", "image", "A", "A"),
        ("One", "image", "B", "C"),
        ("Two", "image", "D", "D"),
        ("Moves", "video", "C", None),
        ("Moves", "video", "C", "A"),
    ]
    expected = {"image": 200 / 3, "video": 0, "total": 40, "One": 50, "Two": 100, "Moves": 0}
    assert seed_scores(rows) == pytest.approx(expected)
    assert seed_scores(rows[:3]) == pytest.approx({"image": 200 / 3, "One": 50, "Two": 100})


@pytest.mark.parametrize(
    ("texts", "score"),
    [
        ({"101669": "A", "102": "B", "103": "C"}, 100),
        ({"101669": "B", "102": "C", "103": "D"}, 0),
        (IMAGES, 200 / 3),
        ({"101669": "A", "102": "", "103": "三"}, 100 / 3),
    ],
    ids=["right", "wrong", "mixed", "unreadable"],
)
def test_the_score_is_the_accuracy_over_images(root, seed, texts, score):
    result = seed.score(root, answers(texts))
    assert result.headline == "image"
    assert result.value == pytest.approx(score)
    assert (result.expected, result.scored, result.missing) == (3, 3, [])


def test_all_metrics_of_a_mixed_file(root, seed):
    score = seed.score(root, answers(IMAGES))
    expected = {"image": 200 / 3, "Scene Understanding": 50, "Instance Identity": 100}
    assert score.metrics == pytest.approx(expected)
    assert score.unparsed == 1
    assert any("1 answers are not one of A to D" in note for note in score.notes)


def test_a_file_that_answers_videos_too_gets_all_parts(root, seed):
    score = seed.score(root, answers(IMAGES | VIDEOS))
    assert score.value == pytest.approx(200 / 3)
    assert score.metrics["video"] == score.metrics["Action Recognition"] == 50
    assert score.metrics["total"] == 60
    lost = seed.score(root, answers(IMAGES | {"v_8": "D"}))
    assert lost.missing == ["104"]
    assert lost.metrics["video"] == 50


def test_a_type_that_is_all_wrong_is_zero_and_no_error(root, seed):
    assert seed.score(root, answers(IMAGES | {"v_8": "A", "104": "B"})).metrics["Action Recognition"] == 0


def test_ids_are_compared_as_numbers_where_they_are_numbers(root, seed):
    given = [Answer(str(a.question_id), a.prompt, a.text) for a in answers(IMAGES | VIDEOS)]
    assert seed.score(root, given).metrics["total"] == 60
    assert (plain_id("0102"), plain_id(102), plain_id("v_8")) == (102, 102, "v_8")


@pytest.mark.parametrize("turn", range(5))
def test_order_of_answers_does_not_matter(root, seed, turn):
    given = answers(IMAGES | VIDEOS)
    random.Random(turn).shuffle(given)
    assert seed.score(root, given).metrics["total"] == 60


def test_only_images_are_asked_in_the_question_files_order(root, seed):
    write_rows(root / "seed_bench" / "llava-seed-bench.jsonl", question_rows()[::-1])
    questions = seed.questions(root)
    assert [q.question_id for q in questions] == [103, 102, 101669]
    assert [q.category for q in questions] == ["Instance Identity", "Scene Understanding", "Scene Understanding"]


def test_questions_without_llavas_file_are_the_same(root, seed):
    published = seed.questions(root)
    (root / "seed_bench" / "llava-seed-bench.jsonl").unlink()
    assert seed.questions(root) == published
    assert published[0].text == "What is 101669?\nA. 101669 one\nB. zwei\nC. trois ou trois ½\nD. four" + LETTER
    assert published[0].visuals == (root / "seed_bench" / "SEED-Bench-image" / "101669_77",)
    assert published[0].key == "101669"


def test_windows_line_ends_change_nothing(root, seed):
    write_rows(root / "seed_bench" / "llava-seed-bench.jsonl", question_rows(), "\r\n")
    write_rows(root / "answers.jsonl", llava_rows(IMAGES), "\r\n")
    assert len(seed.questions(root)) == 3
    assert seed.score(root, read_answers(root / "answers.jsonl")).value == pytest.approx(200 / 3)


def test_our_rows_are_matched_by_their_key(root, seed):
    given = [Answer("?", "", IMAGES[q.key], q.key) for q in seed.questions(root)]
    assert seed.score(root, given).value == pytest.approx(200 / 3)


def test_a_missing_answer_is_named_and_wrong(root, seed):
    score = seed.score(root, answers({"102": "B", "103": "C"}))
    assert score.missing == ["101669"]
    assert score.value == pytest.approx(200 / 3)
    assert (score.expected, score.scored) == (3, 2)


def test_answers_that_repeat_or_belong_elsewhere_are_refused(root, seed):
    given = answers(IMAGES)
    with pytest.raises(BadEvalData, match=r"1 answers repeat a question.*: 102"):
        seed.score(root, [*given, Answer("102", "", "A")])
    with pytest.raises(BadEvalData, match=r"belong to no question.*: 555"):
        seed.score(root, [*given, Answer(555, "", "A")])


def test_needed_files_are_named_with_their_source(tmp_path, seed):
    needed = seed.needed(tmp_path)
    assert [item.path.name for item in needed] == ["SEED-Bench.json", "SEED-Bench-image"]
    assert all(item.path.parent == tmp_path / "seed_bench" and "AILab-CVC" in item.source for item in needed)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("answer", "E", r"question 1 \(question_id '102'\): 'answer' must be one of .*'E'"),
        ("data_type", "audio", r"question_id '102'.*'data_type' must be one of .*'audio'"),
        ("question_type_id", 99, r"question_id '102'.*'question_type_id' must be one of .*99"),
        ("question_id", "101669", r"question 1 .*used before"),
        ("question_id", None, r"SEED-Bench.json, question 1.*question_id"),
        ("answer", None, r"question_id '102'.*answer"),
        ("choice_c", None, r"question_id '102'.*choice_c"),
        ("data_id", None, r"question_id '102'.*data_id"),
    ],
)
def test_a_malformed_annotation_is_named(root, seed, field, value, message):
    data = annotations()
    if value is None:
        del data["questions"][1][field]
    else:
        data["questions"][1][field] = value
    home = root / "seed_bench"
    (home / "SEED-Bench.json").write_text(json.dumps(data))
    (home / "llava-seed-bench.jsonl").unlink()
    with pytest.raises(BadEvalData, match=message):
        seed.questions(root)


def test_a_cut_off_or_absent_annotation_file_is_named(root, seed):
    path = root / "seed_bench" / "SEED-Bench.json"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(BadEvalData, match=r"SEED-Bench.json.*JSON"):
        seed.questions(root)
    path.unlink()
    with pytest.raises(BadEvalData, match=r"SEED-Bench.json cannot be read"):
        seed.score(root, answers(IMAGES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], r"lacks 1 image questions.*: 101669; SEED-Bench.json was revised"),
        (lambda rows: [rows[0] | {"question_id": 9}], r"line 1: SEED-Bench.json has no question_id 9; .* revised"),
        (lambda rows: [*rows, rows[0]], r"line 6: question_id 101669 was used before"),
        (lambda rows: [{"question_id": 102, "image": "x"}], r"line 1.*text.*missing"),
    ],
)
def test_a_question_file_that_does_not_fit_the_annotations_is_refused(root, seed, change, message):
    write_rows(root / "seed_bench" / "llava-seed-bench.jsonl", change(question_rows()))
    with pytest.raises(BadEvalData, match=message):
        seed.questions(root)


def command(root, texts) -> list[str]:
    write_rows(root / "answers.jsonl", llava_rows(texts))
    files = {
        "--annotation-file": root / "seed_bench" / "SEED-Bench.json",
        "--result-file": root / "answers.jsonl",
        "--result-upload-file": root / "upload" / "mine.jsonl",
    }
    return [word for flag, file in files.items() for word in (flag, str(file))]


def test_llavas_command_prints_the_parts_and_writes_the_upload_file(root, capsys):
    assert main(command(root, VIDEOS | IMAGES)) == 0
    assert capsys.readouterr().out == (
        "Scene Understanding: 50.00%\nInstance Identity: 100.00%\nAction Recognition: 50.00%\n"
        "Total accuracy: 60.00%\nimage accuracy: 66.67%\nvideo accuracy: 50.00%\n"
    )
    assert (root / "upload" / "mine.jsonl").read_text() == (
        '{"question_id": "101669", "prediction": "A"}\n'
        '{"question_id": "102", "prediction": "B."}\n'
        '{"question_id": "v_8", "prediction": "D"}\n'
        '{"question_id": "103", "prediction": "C"}\n'
        '{"question_id": "104", "prediction": "B"}\n'
    )


def test_llavas_command_takes_a_file_that_answers_images_only(root, capsys):
    assert main(command(root, IMAGES)) == 0
    assert capsys.readouterr().out.endswith("\nimage accuracy: 66.67%\n")
    assert len((root / "upload" / "mine.jsonl").read_text().splitlines()) == 3


def test_llavas_command_fails_on_missing_answers_and_bad_files(root, capsys):
    words = command(root, {"102": "B"})
    assert main(words) == 2
    printed = capsys.readouterr()
    assert "image accuracy: 33.33%" in printed.out
    assert "2 questions have no answer and count as wrong: 101669, 103" in printed.err
    assert not (root / "upload").exists()
    path = root / "answers.jsonl"
    path.write_text(path.read_text()[:-20])
    assert main(words) == 1
    assert "answers.jsonl, line 1" in capsys.readouterr().err


def test_the_script_in_llavas_place_does_the_same(root, capsys, monkeypatch):
    script = Path(__file__).resolve().parents[2] / "scripts" / "convert_seed_for_submission.py"
    monkeypatch.setattr("sys.argv", [str(script), *command(root, IMAGES)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.endswith("\nimage accuracy: 66.67%\n")
