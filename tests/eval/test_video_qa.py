"""MSVD-QA, MSRVTT-QA and TGIF-QA: files as published, scores computed by hand."""

import json

import pytest
from video_helpers import ROWS, number_of, write_benchmark, write_video

from llava.eval.lemmas import lemmas, same_words
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import Answer, BadEvalData
from llava.eval.tasks.video_qa import Judged, Verdict, missing_videos, rule_marks

# name -> (folder of the set, folder of its videos)
LAYOUT = {
    "msvd_qa": ("GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA", "videos"),
    "msrvtt_qa": ("GPT_Zero_Shot_QA/MSRVTT_Zero_Shot_QA", "videos/all"),
    "tgif_qa": ("GPT_Zero_Shot_QA/TGIF_Zero_Shot_QA", "mp4"),
}

# What a model may say to ROWS, and by hand: contains, em, em_lemma.
SAID = [
    ("A cat is looking at the camera.", True, False, False),
    ("1", True, True, True),
    ("A cup of coffee.", False, False, False),
    ("White.", True, True, True),
    ("stand", False, False, True),
    ("a person", False, False, True),
]


@pytest.fixture
def name():
    return "msvd_qa"


every_benchmark = pytest.mark.parametrize("name", sorted(LAYOUT))


@pytest.fixture
def root(tmp_path, name):
    home, videos = LAYOUT[name]
    write_benchmark(tmp_path / home, videos)
    return tmp_path


@pytest.fixture
def task(name):
    return TASKS.get(name)()


def answers(rows=ROWS, said=SAID):
    return [Answer(row[0], row[2], text[0]) for row, text in zip(rows, said, strict=True)]


def rewrite(root, name, file, change):
    path = root / LAYOUT[name][0] / file
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(content)), encoding="utf-8")
    return path


@every_benchmark
def test_questions_are_read_as_published(root, name, task):
    home, videos = LAYOUT[name]
    found = task.questions(root)
    assert [(q.question_id, q.text, q.extra["answer"]) for q in found] == [(row[0], row[2], row[3]) for row in ROWS]
    assert [q.visuals for q in found] == [(root / home / videos / f"{row[1]}.gif",) for row in ROWS]
    assert [q.category for q in found] == [str(row[4]) for row in ROWS]
    assert [q.key for q in found] == ["0", "1", "v_2", "3", "4", "5"]
    assert task.video and task.max_new_tokens == 1024
    assert all(item.path.exists() for item in task.needed(root))


def test_answers_are_joined_by_id_and_not_by_place(root, name, task):
    rewrite(root, name, "test_q.json", lambda rows: rows[3:])
    rewrite(root, name, "test_a.json", lambda rows: [row for row in rows if row["question_id"] in (3, 4, 5)])
    assert [(q.text, q.extra["answer"]) for q in task.questions(root)] == [(row[2], row[3]) for row in ROWS[3:]]


@every_benchmark
def test_a_video_becomes_eight_pictures(root, task):
    frames = task.open_frames(task.questions(root)[0].visuals[0])
    assert [number_of(frame) for frame in frames] == [0, 0, 0, 0, 1, 1, 1, 2]


def test_real_containers_are_found(tmp_path):
    pytest.importorskip("av", reason="PyAV (extra video) is not installed")
    home, videos = LAYOUT["msvd_qa"]
    write_benchmark(tmp_path / home, videos, suffix=".avi", frames=9)
    write_video(tmp_path / home / videos / "coffee.mp4", 2)
    task = TASKS.get("msvd_qa")()
    shown = {
        q.visuals[0].name: [number_of(f) for f in task.open_frames(q.visuals[0])] for q in task.questions(tmp_path)
    }
    nine = [0, 1, 2, 3, 4, 5, 6, 8]
    assert shown == {"cat_1.5.avi": nine, "coffee.mp4": [0, 0, 0, 0, 0, 0, 0, 1], "rocket.avi": nine}


@every_benchmark
def test_score_by_rules(root, name, task):
    score = task.score(root, answers())
    assert score.headline == "contains"
    assert score.metrics == pytest.approx(
        {
            "contains": 50.0,  # rows 0, 1, 3 of 6
            "em": 200 / 6,  # rows 1, 3
            "em_lemma": 400 / 6,  # rows 1, 3, 4, 5
            "contains/0": 50.0,
            "em/0": 0.0,
            "em_lemma/0": 0.0,
            "contains/1": 100.0,
            "em/1": 100.0,
            "em_lemma/1": 100.0,
            "contains/2": 100.0,
            "em/2": 100.0,
            "em_lemma/2": 100.0,
            "contains/4": 0.0,
            "em/4": 0.0,
            "em_lemma/4": 100.0,
        }
    )
    assert (score.expected, score.scored, score.missing, score.unparsed) == (6, 6, [], 0)
    assert "not comparable" in score.notes[0]
    assert any("6 questions; the published set has" in note for note in score.notes)


def test_all_right_all_wrong_and_any_order(root, task):
    right = [Answer(row[0], row[2], row[3]) for row in ROWS]
    assert task.score(root, right[::-1]).metrics == dict.fromkeys(task.score(root, right).metrics, 100.0)
    wrong = [Answer(row[0], row[2], "") for row in ROWS]
    assert set(task.score(root, wrong).metrics.values()) == {0.0}
    assert task.score(root, answers()[::-1]).metrics == task.score(root, answers()).metrics


def test_missing_answers_count_as_wrong_and_are_named(root, task):
    score = task.score(root, answers()[:2])
    assert score.metrics["contains"] == pytest.approx(200 / 6)
    assert (score.scored, score.missing) == (2, ["v_2", "3", "4", "5"])


@pytest.mark.parametrize("extra", [Answer(0, ROWS[0][2], "cat"), Answer(99, "what?", "cat")])
def test_answers_that_do_not_fit_are_refused(root, task, extra):
    with pytest.raises(BadEvalData, match=str(extra.question_id)):
        task.score(root, [*answers(), extra])


@pytest.mark.parametrize(
    ("prediction", "answer", "contains", "em", "em_lemma"),
    [
        ("cat", "cat", 1, 1, 1),
        ("The Cat.", "cat", 1, 1, 1),
        ("two cats", "cat", 0, 0, 0),
        ("cats", "cat", 0, 0, 1),
        ("concatenate", "cat", 0, 0, 0),
        ("It is a black cat.", "black cat", 1, 0, 0),
        ("It is a cat, black.", "black cat", 0, 0, 0),
        ("There are 2 dogs.", "two", 1, 0, 0),
        ("He is dancing", "dance", 0, 0, 0),
        ("dancing", "dance", 0, 0, 1),
        ("playing guitar", "play guitars", 0, 0, 1),
        ("", "cat", 0, 0, 0),
        ("a", "a", 1, 1, 1),
        ("a dog", "a", 0, 0, 0),
        ("the", "a", 0, 0, 0),
        ("café", "Café", 1, 1, 1),
        ("猫", "猫", 1, 1, 1),
        ("猫です", "猫", 0, 0, 0),
    ],
)
def test_rules(prediction, answer, contains, em, em_lemma):
    assert rule_marks(prediction, answer) == {"contains": contains, "em": em, "em_lemma": em_lemma}


@pytest.mark.parametrize(
    "pair",
    [
        "dogs dog", "boxes box", "babies baby", "knives knife", "wolves wolf", "glasses glass", "women woman",
        "children child", "walking walk", "running run", "dancing dance", "riding ride", "stopped stop", "danced dance",
        "tried try", "flies fly", "cooking cooks", "slicing slices", "rode riding", "ate eat", "people person",
    ],
)  # fmt: skip
def test_forms_of_one_word(pair):
    left, right = pair.split()
    assert same_words([left], [right])


@pytest.mark.parametrize(
    "pair",
    ["cap cape", "plan plane", "bus bu", "dress dres", "ring r", "king k", "need ne", "bed b", "dog dogma", "cat car"],
)
def test_words_that_only_look_alike(pair):
    left, right = pair.split()
    assert not same_words([left], [right])


def test_a_word_is_a_form_of_itself():
    assert lemmas("string") == {"string"}
    assert not same_words(["cat"], ["cat", "dog"])


def test_a_judge_makes_its_accuracy_the_headline(root, task):
    verdicts = {"0": Verdict(True, 5), "1": Verdict(True, 4), "v_2": Verdict(False, 2), "3": Verdict(True, 5)}
    score = task.score(root, answers()[:5], Judged("some-model", verdicts))
    assert score.headline == "judge_accuracy"
    assert score.value == pytest.approx(60.0)  # 3 of 4 verdicts, and the question without an answer is wrong
    assert score.metrics["judge_score"] == pytest.approx(16 / 5)
    assert score.metrics["contains"] == 50.0
    assert (score.unparsed, score.missing) == (1, ["5"])
    assert "some-model" in score.notes[0]
    assert not any("not comparable" in note for note in score.notes)
    assert any("1 answers have no verdict" in note for note in score.notes)


def test_a_judge_without_verdicts_changes_nothing(root, task):
    plain, empty = task.score(root, answers()), task.score(root, answers(), Judged("some-model", {}))
    assert (empty.headline, empty.metrics) == ("contains", plain.metrics)
    assert "not comparable" in empty.notes[0]


@every_benchmark
def test_missing_videos_are_named(root, name, task):
    home, videos = LAYOUT[name]
    (root / home / videos / "coffee.gif").unlink()
    questions = task.questions(root)
    expected = root / home / videos / "coffee.mp4"
    assert missing_videos(questions) == [str(expected)]
    with pytest.raises(BadEvalData, match=r"coffee\.mp4 does not exist"):
        task.open_frames(questions[2].visuals[0])


def without(field):
    return lambda rows: [{key: value for key, value in row.items() if key != field} for row in rows]


def with_field(field, value):
    return lambda rows: [rows[0] | {field: value}, *rows[1:]]


@pytest.mark.parametrize(
    ("file", "change", "parts"),
    [
        ("test_q.json", lambda rows: {"rows": rows}, ["expected a JSON list"]),
        ("test_q.json", lambda rows: [], ["no records"]),
        ("test_q.json", lambda rows: [*rows, "text"], ["record 6", "expected a JSON object"]),
        ("test_q.json", lambda rows: [*rows, rows[0]], ["record 6", "question_id '0' occurs twice"]),
        ("test_q.json", without("video_name"), ["record 0", "'video_name'"]),
        ("test_q.json", without("question"), ["record 0", "'question'"]),
        ("test_q.json", with_field("question", " "), ["record 0", "'question' is empty"]),
        ("test_q.json", with_field("question_id", None), ["record 0", "'question_id'"]),
        ("test_q.json", lambda rows: rows[1:], ["1 answers of test_a.json have no question", "0"]),
        ("test_a.json", lambda rows: [*rows, rows[2]], ["record 6", "occurs twice"]),
        ("test_a.json", without("answer"), ["record 5", "'answer'"]),
        ("test_a.json", with_field("answer", ["cat"]), ["record 0", "'answer'"]),
        ("test_a.json", with_field("answer", ""), ["record 0", "'answer' is empty"]),
        ("test_a.json", lambda rows: rows[1:], ["1 questions of test_q.json have no answer", "5"]),
    ],
)
def test_damaged_files_are_named(root, name, task, file, change, parts):
    path = rewrite(root, name, file, change)
    with pytest.raises(BadEvalData) as caught:
        task.questions(root)
    for part in (*parts, path.name):
        assert part in str(caught.value)


def test_broken_json_names_the_line(root, name, task):
    path = root / LAYOUT[name][0] / "test_a.json"
    path.write_text('[{"answer": "cat",\n oops', encoding="utf-8")
    with pytest.raises(BadEvalData, match=r"test_a\.json.*line 2"):
        task.questions(root)


def test_type_may_be_absent_and_answers_may_be_numbers(root, name, task):
    rewrite(root, name, "test_a.json", without("type"))
    rewrite(root, name, "test_a.json", lambda rows: [row | {"answer": 2} for row in rows])
    assert {(q.category, q.extra["answer"]) for q in task.questions(root)} == {("", "2")}
    assert set(task.score(root, answers()).metrics) == {"contains", "em", "em_lemma"}
