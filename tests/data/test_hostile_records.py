"""Whatever an annotation file holds is read rightly, or its record is refused by name; nothing else ends a run."""

import json
import os
from types import SimpleNamespace

import pytest
from data_helpers import data_args, record, short_tokenizer, tokenizer, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.train import train as training
from llava.train.dataset import LazySupervisedDataset
from llava.train.images import find_image
from llava.train.preflight import Report, scan
from llava.train.records import (
    BadRecord,
    BadSampleError,
    BadSampleLog,
    check_record,
    control_tokens,
    images_of,
    load_records,
    record_id,
    videos_of,
)

GOOD = record("<image>\nwhat?", "a cup", id="good", image="coffee.png")
TEXT = record("why?", "because", id="text")
SYSTEM = {"from": "system", "value": "<image>"}
HALF = "\ud83d"


@pytest.fixture
def dataset(tmp_path):
    def make(records, **changes):
        changes.setdefault("bad_sample_file", str(tmp_path / "bad.jsonl"))
        return LazySupervisedDataset(write_json(tmp_path / "data.json", records), tokenizer(), data_args(**changes))

    return make


def kinds(made):
    return [bad.kind for bad in made.preflight().bad]


# --- files


LINES = "\n".join(json.dumps(one) for one in (GOOD, TEXT))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.JSONL", "data.txt", "data"])
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        json.dumps([GOOD, TEXT]),
        json.dumps([GOOD, TEXT], indent=1),
        "\ufeff" + LINES,
        "\ufeff" + json.dumps([GOOD, TEXT]),
        "\n\n " + LINES.replace("\n", "\r\n\r\n") + "\r\n",
        LINES.replace("\n", "\n\ufeff"),
    ],
)
def test_arrays_and_lines_under_any_name(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8"))
    records, origins = load_records([str(path)])
    assert records == [GOOD, TEXT] and [origin.index for origin in origins] == [0, 1]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_record_is_a_file_of_one(tmp_path, indent):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(GOOD, indent=indent))
    assert load_records(str(path))[0] == [GOOD]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 200_000, "cannot be read in record 0"),
        (b'{"id": ' + b"9" * 6000 + b', "conversations": []}\n' + LINES.encode(), "cannot be read in record 0"),
        (LINES.encode() + b"\n{", "line 3, column 2, in record 2"),
        ("[]".encode("utf-16"), "not UTF-8"),
        (b"\x1f\x8b\x08\x00", "not UTF-8"),
        (b'"text"', "found one str"),
        (b"3", "found one int"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, reason):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        load_records(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n", "[]", "\ufeff"])
def test_an_empty_file_has_no_records(tmp_path, content):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="no records"):
        LazySupervisedDataset(str(path), tokenizer(), data_args())


# --- fields


def test_empty_columns_count_as_absent():
    table = {**TEXT, "image": None, "images": None, "video": None, "videos": None, "score": None, "id": None}
    check_record(table)
    check_record(table, videos=True)
    assert images_of(table) == videos_of(table) == [] and record_id(table) == "missing"
    check_record({**GOOD, "images": None, "videos": []})


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["a.png"], "a.png"])
def test_the_plural_is_read_like_the_singular(names):
    marks = "<image>" * (len(names) if isinstance(names, list) else 1)
    plural = record(marks, "a", images=names)
    check_record(plural)
    assert images_of(plural) == images_of(record(marks, "a", image=names))
    assert videos_of({"videos": names}) == videos_of({"video": names})
    check_record({**plural, "image": names})
    check_record(record(marks.replace("image", "video"), "a", videos=names), videos=True)


def test_pictures_under_the_plural_are_trained_on(dataset):
    plural = {key: value for key, value in GOOD.items() if key != "image"} | {"images": ["coffee.png"]}
    one, other = dataset([GOOD])[0], dataset([plural])[0]
    assert (one["image"] == other["image"]).all() and (one["input_ids"] == other["input_ids"]).all()


@pytest.mark.parametrize(
    ("one", "kind"),
    [
        ({**GOOD, "images": ["other.png"]}, "wrong type"),
        ({**GOOD, "images": 3}, "wrong type"),
        ({**TEXT, "images": [{"bytes": None}]}, "wrong type"),
        ({**TEXT, "videos": ["v.mp4"]}, "video"),
        (record("q", HALF, id="x"), "broken text"),
        (record(f"q {HALF}", "a", id="x"), "broken text"),
        (record("<image>", "see <image>", id="x", image="coffee.png"), "mark in an answer"),
        (record("q", "<image> is a mark", id="x", image="coffee.png"), "mark in an answer"),
        (record("q", "write <img>", "q", "or <image>", id="x"), "mark in an answer"),
        ({**GOOD, "conversations": [SYSTEM, *GOOD["conversations"]]}, "mark in an answer"),
        (record("q", "it ends </s> here", id="x"), "control token"),
        (record("what is <unk>?", "a", id="x"), "control token"),
        (record("q", "<s>a</s>", id="x"), "control token"),
        (record("q", "a", id="x", image="coffee\0.png"), "fewer marks than images"),
        (record("<image>", "a", id="x", image="coffee\0.png"), "missing image"),
        (record("<image>", "a", id="x", image=f"{HALF}.png"), "missing image"),
        (record("<image>", "a", id="x", image="a" * 5000), "missing image"),
        (record("<image>", "a", id="x", image="http://127.0.0.1/x.png"), "missing image"),
        ({**TEXT, "conversations": None}, "wrong type"),
        ({**TEXT, "conversations": [{"from": "human", "value": None}]}, "wrong type"),
        (None, "wrong type"),
        ([], "wrong type"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_the_scan_and_in_the_loader(dataset, one, kind):
    made = dataset([GOOD, one, GOOD])
    report = made.preflight()
    assert [(bad.index, bad.kind) for bad in report.bad] == [(1, kind)]
    with pytest.raises(BadSampleError, match=r"data\.json, record 1 "):
        made[1]
    skipping = dataset([GOOD, one, TEXT, GOOD], on_bad_sample="skip")
    assert "image" in skipping[1]
    skipping.drop(skipping.preflight())
    assert len(skipping) == 3
    report.write(skipping.bad_samples.path + ".report")


def test_texts_that_only_look_like_control_tokens_stay_as_they_are(dataset):
    tags = record("compare < s > and <s/> with </ s>, <strike>", "<b>bold</b> [INST] USER: ### <<SYS>>", id="html")
    assert kinds(dataset([tags])) == [] and dataset([tags])[0]["labels"].max() > 0


def test_control_tokens_are_those_of_conversations():
    def token(content, special=True):
        return SimpleNamespace(content=content, special=special)

    made = SimpleNamespace(
        eos_token="<|im_end|>", pad_token="<|pad|>", bos_token=None,
        added_tokens_decoder=dict(enumerate(
            [token("<|im_start|>"), token("<|box|>"), token("<think>", False), token("<image>")]
        )),
    )  # fmt: skip
    pattern = control_tokens(made, ["<|im_start|>user\n<think><image>"], ["<|image_pad|>"])
    for text in ("<|im_end|>", "<|pad|>", "<|im_start|>", "<|image_pad|>"):
        assert pattern.search(f"a{text}b")[0] == text
    for text in ("<|box|>", "<think>", "<image>", "im_end"):
        assert pattern.search(text) is None
    assert control_tokens(SimpleNamespace()) is None


def test_names_are_found_in_any_case(tmp_path):
    for stored in ("a.JPG", "b.Jpeg", "c.png", "clip.MP4"):
        Image.new("RGB", (2, 2)).save(tmp_path / stored, "PNG")
    for asked, stored in (("a.jpg", "a.JPG"), ("b.png", "b.Jpeg"), ("c.PNG", "c.png"), ("a.JPEG", "a.JPG")):
        assert os.path.samefile(find_image(tmp_path, asked), tmp_path / stored)
    assert find_image(tmp_path, "clip.mp4", (".mp4",)) == str(tmp_path / "clip.MP4")
    with pytest.raises(BadSampleError):
        find_image(tmp_path, "clip.mp4")


# --- names that cannot be written


def test_any_id_can_be_written(tmp_path):
    assert record_id({"id": f"a{HALF}\nb"}) == "a\\ud83d b" and len(record_id({"id": "x" * 9999})) == 200
    log = BadSampleLog(tmp_path / "bad.jsonl")
    bad = BadRecord(f"f{HALF}", 1, "x", "kind", f"reason {HALF} é")
    log.add(bad)
    assert log.read() == [bad]
    Report(1, 0, [bad], [0]).write(tmp_path / "report.jsonl")
    assert json.loads((tmp_path / "report.jsonl").read_text(encoding="utf-8"))["reason"] == bad.reason


# --- whatever the exception


@pytest.mark.parametrize(
    "error", [KeyError("k"), RuntimeError("r"), MemoryError(), RecursionError("deep"), OSError(5, "io")]
)
def test_any_exception_makes_a_bad_record(dataset, monkeypatch, error):
    def encode(self, one):
        if one["id"] == "text":
            raise error
        return original(self, one)

    original = LazySupervisedDataset.encode
    monkeypatch.setattr(LazySupervisedDataset, "encode", encode)
    with pytest.raises(BadSampleError, match=rf"id text\).*{type(error).__name__}"):
        dataset([GOOD, TEXT])[1]
    made = dataset([TEXT, {**TEXT, "id": "other"}, TEXT], on_bad_sample="skip")
    assert made[0]["input_ids"].shape == made[2]["input_ids"].shape
    assert {bad.kind for bad in made.bad_sample_report()} == {"unexpected error"}


def test_any_exception_of_the_scan_makes_a_bad_record(tmp_path, monkeypatch):
    def broken(one):
        raise LookupError("no such thing")

    report = scan([TEXT], extra_check=broken)
    assert report.counts == {"unexpected error": 1} and "LookupError: no such thing" in report.bad[0].reason
    monkeypatch.setattr("llava.train.preflight.probe_image", lambda *_: 1 / 0)
    Image.new("RGB", (2, 2)).save(tmp_path / "coffee.png")
    assert scan([GOOD], tmp_path).counts == {"unexpected error": 1}


def test_a_missing_package_is_no_records_fault():
    def broken(one):
        raise ImportError("no module named av")

    with pytest.raises(ImportError):
        scan([TEXT], extra_check=broken)


KINDS = ["too long", "no label", "no supervised token", "chat template", "empty answer", "another"]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_leaves_nothing_to_learn_counts(dataset, monkeypatch, kind):
    """Also where only some of the records are tokenised, each for several others."""
    monkeypatch.setattr(training, "LABEL_CHECKS", 25)

    def encode(self, one):
        if int(one["id"]) % 10 < 2:
            raise BadSampleError("nothing to learn", kind)

    monkeypatch.setattr(LazySupervisedDataset, "encode", encode)
    made = dataset([{**TEXT, "id": str(number)} for number in range(100)], on_bad_sample="skip")
    data = SimpleNamespace(image_folder=None, scan_images="none", on_bad_sample="skip", max_zero_label_share=0.15)
    with pytest.raises(BadSampleError, match="records have nothing to learn from, more than --max_zero_label_share"):
        training.check_data(SimpleNamespace(data=data), made)
    data.max_zero_label_share = 0.5
    training.check_data(SimpleNamespace(data=data), made)
    assert len(made) < 100


# --- anything at all


LEAVES = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=4)
JSON = st.recursive(
    LEAVES | st.sampled_from([HALF, "<image>", "</s>"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "image", "id"]), inner, max_size=3)
    ),
    max_leaves=6,
)
PIECES = ["<image>", "</s>", HALF, "\0", "a cup", " ", "\n", "<unk>", "USER:", "é", "\u2028"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
ROLES = st.sampled_from(["human", "gpt", "system", "bot"])
TURNS = st.lists(st.fixed_dictionaries({"from": ROLES, "value": TEXTS | JSON}), max_size=5)
RECORDS = JSON | st.fixed_dictionaries(
    {"conversations": TURNS | JSON},
    optional={
        "id": JSON,
        "image": st.sampled_from(["coffee.png", "none.png", "../x", "", None]) | JSON,
        "images": st.lists(st.sampled_from(["coffee.png", "astronaut.png"]), max_size=2) | JSON,
        "video": JSON,
    },
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(records=st.lists(RECORDS, max_size=4), limit=st.sampled_from([90, 2048]))
def test_any_records_train_or_are_refused_by_name(tmp_path_factory, records, limit):
    """The scan finds all that the loader cannot use, and the loader replaces it."""
    folder = tmp_path_factory.mktemp("any")
    path = folder / "data.json"
    path.write_text(json.dumps([*records, GOOD, TEXT]), encoding="utf-8")
    loaded = tokenizer() if limit > 100 else short_tokenizer(limit)
    arguments = data_args(on_bad_sample="skip", bad_sample_file=str(folder / "bad.jsonl"))
    made = LazySupervisedDataset(str(path), loaded, arguments)
    assert len(made.lengths) == len(made.modality_lengths) == len(records) + 2
    report = made.preflight()
    training.check_labels(made, report)
    report.write(folder / "report.jsonl")
    made.drop(report)
    for index in range(len(made)):
        assert made.build(made.list_data_dict[index])["labels"].max() > 0
    assert len(made) + len(set(report.positions)) == len(records) + 2
