"""Annotation files: formats, mixes, and errors that name the place."""

import json

import pytest
from data_helpers import record, write_json

from llava.train.records import (
    BadRecord,
    BadSampleError,
    BadSampleLog,
    Origin,
    check_record,
    images_of,
    load_records,
)


def some(count, start=0):
    return [record("q", "a", id=str(start + index)) for index in range(count)]


def ids(records):
    return [one["id"] for one in records]


def test_json_array(tmp_path):
    path = write_json(tmp_path / "a.json", some(3))
    records, origins = load_records(path)
    assert ids(records) == ["0", "1", "2"]
    assert origins[2] == Origin(path, 2)


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(one) for one in some(3)))
    records, origins = load_records(str(path))
    assert ids(records) == ["0", "1", "2"] and origins[2].index == 2


def test_json_lines_end_at_newlines_only(tmp_path):
    """Text may hold the separators U+2028 and U+0085, which JSON leaves as they are."""
    path = tmp_path / "a.jsonl"
    text = "one\u2028two\u0085three"
    path.write_text(json.dumps(record(text, "a", id="0"), ensure_ascii=False) + "\r\n", encoding="utf-8")
    records, _ = load_records(str(path))
    assert records[0]["conversations"][0]["value"] == text


@pytest.mark.parametrize("join", [list, " ".join, ",".join, ", ".join])
def test_several_files(tmp_path, join):
    paths = [write_json(tmp_path / "a.json", some(2)), write_json(tmp_path / "b.json", some(2, start=10))]
    records, origins = load_records(join(paths))
    assert ids(records) == ["0", "1", "10", "11"]
    assert origins[3] == Origin(paths[1], 1)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", list(range(10))),
        ("first:3", [0, 1, 2]),
        ("end:2", [8, 9]),
        ("first:25%", [0, 1, 2]),
        ("end:0", []),
        ("first:99", list(range(10))),
    ],
)
def test_mix_strategies(tmp_path, strategy, expected):
    write_json(tmp_path / "a.json", some(10))
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"datasets:\n  - json_path: a.json\n    sampling_strategy: '{strategy}'\n")
    records, origins = load_records(str(mix))
    assert ids(records) == [str(index) for index in expected]
    assert [origin.index for origin in origins] == expected


def test_random_mix_is_repeatable(tmp_path):
    write_json(tmp_path / "a.json", some(100))
    mix = tmp_path / "mix.yml"
    mix.write_text("datasets:\n- {json_path: a.json, sampling_strategy: 'random:30%'}\n- {json_path: a.json}\n")
    first, second = load_records(str(mix))[0], load_records(str(mix))[0]
    other = load_records(str(mix), seed=1)[0]
    assert len(first) == 130 and ids(first) == ids(second) != ids(other)
    assert len(set(ids(first[:30]))) == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: 3", "needs 'datasets'"),
        ("- 1", "needs 'datasets'"),
        ("datasets: [{path: a.json}]", "entry 0 .* no json_path"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'last:3'}]", "last:3"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'first:x'}]", "first:x"),
        ("datasets: [", "broken YAML"),
    ],
)
def test_broken_mix(tmp_path, text, message):
    write_json(tmp_path / "a.json", some(2))
    mix = tmp_path / "mix.yaml"
    mix.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_records(str(mix))
    assert str(mix) in str(caught.value)


def test_json_broken_in_the_middle(tmp_path):
    path = tmp_path / "a.json"
    text = json.dumps(some(5), indent=1)
    where = text.index('"id": "3"')
    path.write_text(text[:where] + "oops " + text[where:])
    line = text[:where].count("\n") + 1
    with pytest.raises(ValueError, match=rf"a\.json: broken JSON at line {line}, column \d+, in record 3 "):
        load_records(str(path))


@pytest.mark.parametrize("cut", [30, 150, 1])
def test_json_cut_off(tmp_path, cut):
    path = tmp_path / "a.json"
    text = json.dumps(some(4))
    path.write_text(text[:-cut])
    with pytest.raises(ValueError, match=r"line 1, column \d+, in record \d"):
        load_records(str(path))


def test_jsonl_broken_in_the_middle(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps(one) for one in some(4)]
    rows[2] = rows[2][:-3]
    path.write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"line 3, column \d+, in record 2"):
        load_records(str(path))


def test_not_an_array(tmp_path):
    with pytest.raises(ValueError, match="expected a JSON array of records or one record a line, found one dict"):
        load_records(write_json(tmp_path / "a.json", {"a": 1}))


def test_not_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_records(str(path))


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no_such\.json.*--data_path"):
        load_records("no_such.json")
    with pytest.raises(ValueError, match="--data_path"):
        load_records(None)


GOOD = [
    record("q", "a"),
    record("<image>\nq", "a", image="x.png"),
    record("<image> q <image>", "a", image="x.png"),
    record("<image><image> q", "a", "<image>", "b", image=["x.png", "y.png", "z.png"]),
    record("q <image>", "a", image=["x.png"]),
    record("q", "a", image=[]),
    record("q", "a", "r"),
    {"conversations": [{"from": "system", "value": "s"}, *record("q", "a")["conversations"]]},
    {"conversations": [{"from": "gpt", "value": ""}, *record("q", "a")["conversations"]]},
]


@pytest.mark.parametrize("one", GOOD)
def test_good_records(one):
    check_record(one)


def turns(*roles):
    return {"id": "r", "conversations": [{"from": role, "value": "x"} for role in roles]}


BAD = [
    (7, "wrong type", "JSON object"),
    ({"id": 1}, "wrong type", "'conversations' must be a list"),
    ({"conversations": []}, "wrong type", "'conversations' must be a list"),
    ({"conversations": "q"}, "wrong type", "'conversations' must be a list"),
    ({"conversations": ["q"]}, "wrong type", "turn 0 must be an object"),
    ({"conversations": [{"from": "human", "value": 3}]}, "wrong type", "turn 0 must be an object"),
    ({"conversations": [{"role": "human", "value": "q"}]}, "wrong type", "turn 0 must be an object"),
    (record("<image>", "a", image=3), "wrong type", "'image' must be a path"),
    (record("<image>", "a", image=["a.png", None]), "wrong type", "'image' must be a path"),
    (record("<image>", "a", image=""), "wrong type", "'image' must be a path"),
    (record("q", "a", video="x.mp4"), "video", "videos are not supported"),
    (turns("human", "bot"), "unknown role", "turn 1 has the unknown role 'bot'"),
    (turns("user", "assistant"), "unknown role", "turn 0 has the unknown role 'user'"),
    (turns("human", "human", "gpt"), "roles", "turn 1 is from 'human'"),
    (turns("human", "gpt", "gpt"), "roles", "turn 2 is from 'gpt'"),
    (turns("human"), "no answer", "no question with an answer"),
    (turns("gpt"), "no answer", "no question with an answer"),
    (record("q", ""), "empty answer", "turn 1 is empty"),
    (record("q", "a", "r", "\n "), "empty answer", "turn 3 is empty"),
    (record("<image>", "a"), "more marks than images", "1 for 0"),
    (record("<image>", "a", "<image>", "b", image="x.png"), "more marks than images", "2 for 1"),
    (record("q", "a", image="x.png"), "fewer marks than images", "0 for 1"),
    (record("<image>", "a", image=["x.png", "y.png"]), "fewer marks than images", "1 for 2"),
    (record("<image><image><image>", "a", image=["x.png", "y.png"]), "more marks than images", "3 for 2"),
]


@pytest.mark.parametrize(("one", "kind", "message"), BAD)
def test_bad_records(one, kind, message):
    with pytest.raises(BadSampleError, match=message) as caught:
        check_record(one)
    assert caught.value.kind == kind


def test_marks_are_text_without_a_vision_tower():
    check_record(record("<image>", "a"), multimodal=False)


def test_images_of():
    assert images_of({}) == images_of({"image": None}) == []
    assert images_of({"image": "a"}) == ["a"] and images_of({"image": ["a", "b"]}) == ["a", "b"]


def test_log_keeps_every_record_once(tmp_path):
    log = BadSampleLog(tmp_path / "deep" / "bad.jsonl")
    assert log.read() == []
    first, second = BadRecord("f", 1, "é", "k", "r"), BadRecord("f", 2, "b", "k", "r")
    for bad in (first, second, first):
        log.add(bad)
    assert log.read() == [first, second]
