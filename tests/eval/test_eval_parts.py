"""Benchmarks on some of their pictures: what is asked is what is scored, by the benchmark's own rule."""

import pytest

from llava.eval.tasks import TASKS, Answer, BadEvalData
from llava.eval.tasks.base import part_of, pick
from playground.tiny.export_eval import export

NAMES = ("pope", "gqa", "textvqa", "textvqa_no_ocr", "mme", "scienceqa", "scienceqa_img", "seed_image", "tiny")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "eval"
    export(folder, 8, 3)
    return folder


def answers(questions, say):
    return [Answer(q.question_id, q.text, say(q), q.key) for q in questions]


@pytest.mark.parametrize("name", NAMES)
def test_a_part_asks_and_scores_its_own_questions(root, name):
    kind = TASKS.get(name)
    whole, part = kind(), part_of(kind, 3)
    assert (part.name, part.title) == (f"{name}_3_pictures", f"{kind.title}, 3 pictures") and kind.pictures is None
    asked, everything = part.questions(root), whole.questions(root)
    assert len({q.visuals for q in asked}) == 3 and 3 <= len(asked) < len(everything)
    assert [q for q in everything if q in asked] == asked
    score = part.score(root, answers(asked, lambda q: "Yes"))
    assert (score.expected, score.scored, score.missing) == (len(asked), len(asked), [])
    assert score.headline == whole.score(root, answers(everything, lambda q: "Yes")).headline
    lacking = part.score(root, answers(asked[1:], lambda q: "Yes"))
    assert lacking.missing == [asked[0].key]
    with pytest.raises(BadEvalData, match=r"belong to no question|no question"):
        part.score(root, answers([q for q in everything if q not in asked][:1], lambda q: "Yes"))


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_all_pictures_scores_like_the_whole(root, name):
    kind = TASKS.get(name)
    whole = [q for q in kind().questions(root) if q.visuals]
    part = part_of(kind, 1000)
    assert part.questions(root) == whole
    if len(whole) == len(kind().questions(root)):
        given = answers(whole, lambda q: "No" if len(q.text) % 2 else "B")
        assert part.score(root, given).metrics == kind().score(root, given).metrics


def test_pictures_are_spread_over_all(root):
    questions = TASKS.get("tiny")().questions(root)
    chosen = {q.visuals[0].stem for q in pick(questions, 4)}
    assert chosen == {"000000", "000002", "000004", "000006"}


def test_what_cannot_be_asked_in_part():
    with pytest.raises(ValueError, match="msvd_qa asks about videos, not pictures; leave --limit-pictures out"):
        part_of(TASKS.get("msvd_qa"), 3)
    with pytest.raises(ValueError, match="at least 1"):
        part_of(TASKS.get("gqa"), 0)
