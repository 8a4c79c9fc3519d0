"""The scan finds every bad record before the first step."""

import json
import os
import time

import numpy as np
import pytest
from data_helpers import record
from PIL import Image

from llava.train.images import find_image, read_image
from llava.train.preflight import scan
from llava.train.records import BadSampleError, Origin


@pytest.fixture
def folder(tmp_path):
    """A picture folder with every kind of picture file, good and bad."""
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(root / "good.jpg")
    noise.save(root / "deep" / "good.png")
    noise.save(tmp_path / "outside.png")
    whole = (root / "good.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    png = (root / "deep" / "good.png").read_bytes()
    (root / "cut.png").write_bytes(png[: len(png) // 2])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("this is not a picture")
    (root / "folder.jpg").mkdir()
    return root


def pictured(name):
    return record("<image>\nq", "a", id=name, image=name)


GOOD = ["good.jpg", "deep/good.png", "deep/../good.jpg", "./good.jpg", "good.gif", "deep/good.jpg"]


@pytest.mark.parametrize("name", GOOD)
def test_good_pictures(folder, name):
    assert scan([pictured(name)], folder).ok


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("no_such.jpg", "missing image"),
        ("folder.jpg", "missing image"),
        ("empty.jpg", "corrupt image"),
        ("text.jpg", "corrupt image"),
        ("../outside.png", "image outside the folder"),
        ("deep/../../outside.png", "image outside the folder"),
        ("/etc/hostname", "image outside the folder"),
        ("../images_of_others/x.png", "image outside the folder"),
        (".", "image outside the folder"),
    ],
)
def test_bad_pictures(folder, name, kind):
    report = scan([pictured("good.jpg"), pictured(name)], folder)
    assert [(bad.index, bad.id, bad.kind) for bad in report.bad] == [(1, name, kind)]
    assert repr(name)[1:-1].split("/")[-1] in report.bad[0].reason


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
def test_truncated_pictures_are_found_by_decoding(folder, name):
    assert scan([pictured(name)], folder).ok
    report = scan([pictured(name)], folder, decode=True)
    assert report.counts == {"corrupt image": 1} and "cannot be read" in report.bad[0].reason
    with pytest.raises(BadSampleError, match=name):
        read_image(str(folder / name))


def test_every_kind_of_bad_record_in_one_scan(folder):
    records = [
        pictured("good.jpg"),
        record("q", "", id="empty"),
        record("<image>", "a", id="more"),
        record("q", "a", id="fewer", image="good.jpg"),
        pictured("no_such.jpg"),
        {"id": "role", "conversations": [{"from": "bot", "value": "q"}]},
        {"id": "order", "conversations": [{"from": "human", "value": "q"}] * 2},
        "not an object",
        record("<image><image>", "a", id="second", image=["good.jpg", "text.jpg"]),
        record("q", "a", id="fine"),
    ]
    origins = [Origin("a.json", 100 + index) for index in range(len(records))]
    report = scan(records, folder, origins=origins, workers=3)
    assert report.positions == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [bad.index for bad in report.bad] == [101, 102, 103, 104, 105, 106, 107, 108]
    assert [bad.id for bad in report.bad] == [
        "empty",
        "more",
        "fewer",
        "no_such.jpg",
        "role",
        "order",
        "missing",
        "second",
    ]
    assert report.records == 10 and report.images == 3 and not report.ok
    assert report.counts == {
        "empty answer": 1,
        "more marks than images": 1,
        "fewer marks than images": 1,
        "missing image": 1,
        "unknown role": 1,
        "roles": 1,
        "wrong type": 1,
        "corrupt image": 1,
    }
    text = report.summary(limit=2)
    assert "10 records and 3 images checked, 8 bad" in text and "... and 6 more" in text
    assert "a.json, record 101 (id empty): the answer in turn 1 is empty" in text
    with pytest.raises(BadSampleError, match="--on_bad_sample skip"):
        report.raise_if_bad()


def test_report_file(folder, tmp_path):
    report = scan([record("q", "", id="é")], folder)
    report.write(tmp_path / "new" / "bad.jsonl")
    line = json.loads((tmp_path / "new" / "bad.jsonl").read_text(encoding="utf-8"))
    assert (line["file"], line["index"], line["id"], line["kind"]) == ("records", 0, "é", "empty answer")


def test_a_bad_picture_is_reported_for_all_its_users(folder):
    report = scan([pictured("text.jpg"), pictured("good.jpg"), {**pictured("text.jpg"), "id": "again"}], folder)
    assert [bad.id for bad in report.bad] == ["text.jpg", "again"] and report.images == 2


def test_what_is_not_looked_at(folder):
    bad = pictured("no_such.jpg")
    assert scan([bad], folder, images=False).ok
    assert scan([bad], folder, multimodal=False).ok
    good = scan([pictured("good.jpg")], folder)
    assert good.ok and good.counts == {}
    good.raise_if_bad()


def test_without_a_folder_names_are_paths(folder):
    assert scan([pictured(str(folder / "good.jpg"))]).ok
    assert not scan([pictured("good.jpg")]).ok


def test_links_inside_the_folder_are_followed(folder, tmp_path):
    os.symlink(tmp_path / "outside.png", folder / "linked.png")
    assert scan([pictured("linked.png")], folder).ok


def test_extension_of_the_file_wins(folder):
    assert find_image(folder, "deep/good.jpg") == str(folder / "deep" / "good.png")


def test_pictures_of_odd_modes(folder):
    grey16 = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey16).save(folder / "grey16.png")
    Image.new("CMYK", (5, 5)).save(folder / "cmyk.jpg")
    Image.new("RGBA", (5, 5), (1, 2, 3, 0)).save(folder / "rgba.png")
    Image.new("P", (5, 5)).save(folder / "palette.png")
    Image.new("1", (1, 1)).save(folder / "dot.png")
    for name in ("grey16.png", "cmyk.jpg", "rgba.png", "palette.png", "dot.png"):
        assert read_image(str(folder / name)).mode == "RGB"
    grey = np.asarray(read_image(str(folder / "grey16.png")))[..., 0]
    assert grey.min() == 0 and grey.max() == 255 and 120 < grey.mean() < 135


def test_a_huge_picture_is_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    report = scan([pictured("good.jpg")], folder)
    assert report.counts == {"corrupt image": 1}


def test_scan_is_fast(folder):
    """A hundred thousand records with a few pictures take seconds: headers only, each picture once."""
    records = [pictured("good.jpg") for _ in range(20_000)]
    start = time.perf_counter()
    assert scan(records, folder).images == 1
    assert time.perf_counter() - start < 5
