"""No benchmark file makes an evaluation read pictures outside of the benchmark's folder."""

import json
import os
from pathlib import Path

import pytest
import runner_world

from llava.eval.__main__ import main
from llava.eval.files import require_inside
from llava.eval.runner import load_questions
from llava.eval.tasks import TASKS
from llava.eval.tasks.base import BadEvalData, Question
from llava.eval.vqa import FolderPictures, VqaRow
from playground.tiny.evaluate import Pixels

OUTSIDE = ["../secret.jpg", "../../secret.jpg", "sub/../../secret.jpg", "sub/../x.jpg", "/secret.jpg", ".."]


@pytest.mark.parametrize("root", ["data", "../data", "/data/eval", "."])
def test_names_that_climb_out_are_refused_and_others_are_not(root):
    folder = Path(root)
    for name in ("a.jpg", "sub/a.jpg", "./a.jpg", "a..jpg", "..a/b.jpg"):
        assert require_inside(folder / name, folder, "x") == folder / name
    for name in OUTSIDE:
        with pytest.raises(BadEvalData, match=r"a\.json, record 3: .* lies outside of the folder"):
            require_inside(folder / name, folder, "a.json, record 3")


@pytest.mark.parametrize("name", TASKS.names())
@pytest.mark.parametrize("image", OUTSIDE)
def test_every_benchmark_is_held_to_its_folder(name, image, monkeypatch, tmp_path):
    kind = TASKS.get(name)
    questions = [Question("q7", 7, "What?", (kind().home(tmp_path) / image,))]
    monkeypatch.setattr(kind, "questions", lambda self, root: questions)
    with pytest.raises(BadEvalData, match=f"{name}, question q7: .* lies outside of the folder"):
        load_questions(kind(), tmp_path)


@pytest.mark.parametrize("image", ["../../../secret.jpg", "{place}/secret.jpg"])
def test_the_command_refuses_the_file_by_name(tmp_path, capsys, image):
    root = tmp_path / "root"
    runner_world.write_pope(root, 2)
    runner_world.save_picture(tmp_path / "secret.jpg", 1)
    path = root / "pope" / "coco" / "coco_pope_random.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["image"] = image.format(place=tmp_path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model-path", "nowhere/at-all", "--root", root, "--out", tmp_path / "out", "--benchmarks", "pope"]
    assert main([str(part) for part in flags]) == 2
    said = capsys.readouterr().err
    assert "error: pope, question" in said and "secret.jpg lies outside of the folder" in said


def test_a_link_inside_of_the_folder_is_followed(tmp_path):
    runner_world.write_pope(tmp_path / "root", 2)
    pictures = tmp_path / "root" / "pope" / "val2014"
    pictures.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", pictures)
    assert len(load_questions(TASKS.get("pope")(), tmp_path / "root")) == 6


def test_llavas_entry_points_hold_names_to_the_image_folder(tmp_path):
    runner_world.save_picture(tmp_path / "secret.jpg", 1)
    (tmp_path / "images").mkdir()
    with pytest.raises(BadEvalData, match=r"question 5: .*secret\.jpg lies outside"):
        FolderPictures(tmp_path / "images").find([VqaRow(5, "t", "t", "../secret.jpg")])
    own = str(tmp_path / "secret.jpg")
    assert FolderPictures(Path("")).find([VqaRow(5, "t", "t", own)]) == [(Path(own),)], "a path of the user's own"


def test_the_tiny_worlds_evaluation_holds_names_to_its_folder(tmp_path):
    with pytest.raises(BadEvalData, match=r"secret\.jpg lies outside"):
        Pixels(str(tmp_path), None, None).picture("../secret.jpg")
