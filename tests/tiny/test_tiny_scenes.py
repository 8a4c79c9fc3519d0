"""The tiny world's generator: deterministic, disjoint splits, answers that follow from the scene."""

import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image

from playground.tiny import build, questions, scenes
from playground.tiny.tower import GRID, NONE_CLASS, PATCH, patch_targets


def drawn(split="train", count=40, seed=3):
    return [scenes.make_scene(split, seed, index) for index in range(count)]


def test_a_scene_depends_on_its_arguments_only():
    first, again = scenes.make_scene("train", 3, 7), scenes.make_scene("train", 3, 7)
    assert np.array_equal(first.pixels, again.pixels) and first.digits == again.digits
    for other in (("train", 3, 8), ("train", 4, 7), ("heldout", 3, 7)):
        assert not np.array_equal(first.pixels, scenes.make_scene(*other).pixels)


def test_splits_share_no_source_digit():
    train = {source for pool in scenes.digit_sources("train") for source in pool}
    heldout = {source for pool in scenes.digit_sources("heldout") for source in pool}
    assert not train & heldout
    assert len(train) + len(heldout) == 1797
    for split, allowed in (("train", train), ("heldout", heldout)):
        assert {d.source for scene in drawn(split) for d in scene.digits} <= allowed


def test_splits_share_no_region_of_a_photograph():
    for photo in scenes.load_photos().values():
        assert scenes.photo_region(photo, "train")[2] < scenes.photo_region(photo, "heldout")[0]
    for split in scenes.SPLITS:
        for scene in drawn(split):
            left, top, right, bottom = scenes.photo_region(scenes.load_photos()[scene.photo], split)
            x0, y0, x1, y1 = scene.crop
            assert left <= x0 < x1 <= right and top <= y0 < y1 <= bottom


def test_digits_lie_inside_do_not_overlap_and_have_a_clear_order():
    for scene in drawn("heldout", 60):
        assert scene.pixels.shape == (336, 336, 3) and scene.pixels.dtype == np.uint8
        assert scenes.MIN_DIGITS <= len(scene.digits) <= scenes.MAX_DIGITS
        assert len({d.value for d in scene.digits}) == len(scene.digits)
        for i, a in enumerate(scene.digits):
            assert a.size / 2 <= a.x <= 336 - a.size / 2 and a.size / 2 <= a.y <= 336 - a.size / 2
            for b in scene.digits[:i]:
                apart = (abs(a.x - b.x), abs(a.y - b.y))
                assert max(apart) >= (a.size + b.size) / 2
                assert min(apart) >= scenes.MIN_STEP - scenes.SNAP


def test_a_source_digit_has_the_value_that_the_scene_says():
    from sklearn.datasets import load_digits

    labels = load_digits().target
    assert all(labels[d.source] == d.value for scene in drawn() for d in scene.digits)


def test_patch_targets_mark_the_boxes_of_the_digits():
    for scene in drawn(count=10):
        classes, offsets = patch_targets(scene.digits)
        classes, offsets = classes.reshape(GRID, GRID), offsets.reshape(GRID, GRID, 2)
        for digit in scene.digits:
            assert classes[int(digit.y // PATCH), int(digit.x // PATCH)] == digit.value
        row, column = np.argwhere(classes != NONE_CLASS)[0]
        value = classes[row, column]
        digit = next(d for d in scene.digits if d.value == value)
        assert (column + 0.5) * PATCH + offsets[row, column, 0] * digit.size == pytest.approx(digit.x, abs=0.1)
        assert (row + 0.5) * PATCH + offsets[row, column, 1] * digit.size == pytest.approx(digit.y, abs=0.1)


def solve(question, digits):
    """Answer a question by looking at the digits, written independently of the generator's code."""
    across, down = sorted(digits, key=lambda d: d.x), sorted(digits, key=lambda d: d.y)
    if found := re.fullmatch(r"Is there an? (\d)\?", question):
        return "Yes" if int(found[1]) in {d.value for d in digits} else "No"
    if question == "How many digits are there?":
        return str(len(digits))
    if question == "Read the digits from left to right.":
        return " ".join(str(d.value) for d in across)
    if found := re.fullmatch(r"Which digit is (left|right|top|bottom)most\?", question):
        ends = {"left": across[0], "right": across[-1], "top": down[0], "bottom": down[-1]}
        return str(ends[found[1]].value)
    if found := re.fullmatch(r"Which digit is in the (top|bottom) (left|right)\?", question):
        inside = [d for d in digits if (d.y < 168) == (found[1] == "top") and (d.x < 168) == (found[2] == "left")]
        assert len(inside) == 1
        return str(inside[0].value)
    if found := re.fullmatch(r"Which digit is next (left of|right of|above|below) the (\d)\?", question):
        line = across if found[1].endswith("of") else down
        at = [d.value for d in line].index(int(found[2]))
        return str(line[at + (1 if found[1] in ("right of", "below") else -1)].value)
    options = dict(re.findall(r"\n([ABCD])\. (\d)", question))
    assert question.startswith("Which digit is in the image?\n") and len(options) == 4
    fitting = [letter for letter, value in options.items() if int(value) in {d.value for d in digits}]
    assert len(fitting) == 1
    return fitting[0]


def test_answers_follow_from_the_scene():
    rng = np.random.default_rng(0)
    seen = set()
    for scene in drawn(count=60):
        for kind in questions.KINDS:
            for _ in range(3):
                turn = questions.ask(kind, scene.digits, rng)
                if turn is not None:
                    assert solve(turn[0], scene.digits) == turn[1]
                    seen.add(kind)
    assert seen == set(questions.KINDS) == set(questions.CHANCE)


def test_the_caption_lists_every_digit_with_its_place():
    for scene in drawn(count=10):
        text = questions.caption(scene.digits)
        places = [tuple(map(int, found)) for found in re.findall(r"(\d) at (\d) (\d)", text)]
        expected = [(d.value, int(d.x / 33.6), int(d.y / 33.6)) for d in sorted(scene.digits, key=lambda d: d.x)]
        assert places == expected
        assert text.startswith(f"There are {len(scene.digits)} digits: ")


def test_yes_no_and_letters_are_balanced():
    rng = np.random.default_rng(1)
    digits = [scene.digits for scene in drawn(count=40)]
    answers = [questions.ask("exists", d, rng)[1] for d in digits for _ in range(25)]
    assert 0.45 < answers.count("Yes") / len(answers) < 0.55
    letters = [questions.ask("choice", d, rng)[1] for d in digits for _ in range(25)]
    assert all(0.2 < letters.count(letter) / len(letters) < 0.3 for letter in "ABCD")


def test_text_turns_are_right():
    rng = np.random.default_rng(2)
    for _ in range(100):
        question, answer = questions.text_turn(rng)
        numbers = [int(v) for v in re.findall(r"\d", question)]
        if "larger" in question:
            assert answer == str(max(numbers))
        elif "Sort" in question:
            assert answer == " ".join(map(str, sorted(numbers)))
        else:
            assert answer == str(numbers[0] + 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scenes.make_scene("test", 0, 0), "split is 'test'"),
        (lambda: questions.ask("colour", (), np.random.default_rng(0)), "question kind is 'colour'"),
        (lambda: build.build_stage(".", "stage3", 1, 0, 1, 1), "stage is 'stage3'"),
        (lambda: build.build_stage(".", "pretrain", 0, 0, 1, 1), "must be positive"),
    ],
)
def test_unknown_words_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def folder_digest(folder):
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.*")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def test_build_writes_llava_records_and_the_same_bytes_again(tmp_path):
    digests = []
    for name, workers in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        for stage in build.STAGE_SEED:
            build.build_stage(str(folder), stage, 6, 5, 3, workers)
        digests.append(folder_digest(folder))
    assert digests[0] == digests[1]
    folder = tmp_path / "one"
    for stage in build.STAGE_SEED:
        records = json.loads((folder / f"{stage}.json").read_text())
        assert len({r["id"] for r in records}) == len(records)
        for record in records:
            said = record["conversations"]
            assert [turn["from"] for turn in said] == ["human", "gpt"] * (len(said) // 2)
            assert all(turn["value"].strip() for turn in said)
            marks = sum(turn["value"].count("<image>") for turn in said)
            assert marks == ("image" in record)
            if "image" in record:
                assert said[0]["value"].startswith("<image>\n")
                with Image.open(folder / record["image"]) as image:
                    assert image.size == (336, 336)
    finetune = json.loads((folder / "finetune.json").read_text())
    assert any("image" not in r for r in finetune) and any(len(r["conversations"]) == 6 for r in finetune)
    for record in json.loads((folder / "heldout.json").read_text()):
        assert record["kind"] in questions.KINDS
        assert record["conversations"][1]["value"] == record["answer"]
        assert record["conversations"][0]["value"] == "<image>\n" + record["question"]
