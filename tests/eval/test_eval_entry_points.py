"""LLaVA's entry points: flags, files, chunks, interruptions, and what happens when something is missing."""

import functools
import json

import pytest
import runner_world

from llava import sanity
from llava.eval import model_vqa, model_vqa_loader, model_vqa_science, vqa

SUFFIX = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The model, and question files in LLaVA's two forms."""
    world = runner_world.build_world(tmp_path_factory.mktemp("entry"))
    questions = [
        {
            "question_id": f"q{n // 2}",
            "image": f"COCO_val2014_{n % 3:012d}.jpg",
            "text": f"Is it {n}?{SUFFIX}",
            "category": "x",
        }
        for n in range(8)
    ]
    world.questions = world.folder / "questions.jsonl"
    world.questions.write_text("".join(json.dumps(row) + "\n" for row in questions))
    world.images = world.root / "pope" / "val2014"
    problems = [
        {
            "id": str(n),
            **({"image": f"{n}/image.png"} if n % 2 else {}),
            "conversations": [
                {"from": "human", "value": "<image>\n" * (n % 2) + f"Which of {n}?\nA. one\nB. two"},
                {"from": "gpt", "value": "A"},
            ],
        }
        for n in range(5)
    ]
    world.problems = world.folder / "problems.json"
    world.problems.write_text(json.dumps(problems))
    return world


@pytest.fixture(autouse=True)
def load_once(monkeypatch):
    """Loading is the slow part."""
    monkeypatch.setattr(vqa, "load_pretrained_model", _loaded)


_original = vqa.load_pretrained_model


@functools.cache
def _load(path):
    return _original(path, None, "tiny-llava", device="cpu")


def _loaded(path, base, name, device, duet_config):
    loaded = _load(path)
    loaded[1].set_reduction(duet_config.to_config(None))
    return loaded


def run(entry, world, answers, *more, **changes):
    values = {
        "--model-path": world.model,
        "--question-file": world.questions,
        "--image-folder": world.images,
        "--answers-file": answers,
        "--temperature": 0,
        "--conv-mode": "vicuna_v1",
        "--device": "cpu",
        "--workers": 0,
    } | changes
    return entry.main([str(part) for pair in values.items() for part in pair] + [str(part) for part in more])


def loader(world, answers, *more, **changes):
    return run(model_vqa_loader, world, answers, "--max_new_tokens", 6, *more, **changes)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqa, "load_pretrained_model", _loaded)
        assert loader(world, path) == 0
    return path


def test_rows_are_llavas(world, whole):
    answers = rows(whole)
    assert [row["question_id"] for row in answers] == [f"q{n // 2}" for n in range(8)]
    assert answers[0]["prompt"] == f"Is it 0?{SUFFIX}"
    assert all(set(row) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} for row in answers)
    assert {row["model_id"] for row in answers} == {"tiny-llava"}
    assert len({row["text"] for row in answers}) > 3


@pytest.mark.parametrize("chunks", [1, 3, 7, 20])
def test_chunks_merge_to_the_whole(world, whole, tmp_path, chunks):
    files = [tmp_path / f"{chunks}_{index}.jsonl" for index in range(chunks)]
    for index, path in enumerate(files):
        assert loader(world, path, "--num-chunks", chunks, "--chunk-idx", index, "--batch", 2) == 0
    assert "".join(path.read_text() for path in files) == whole.read_text()


def test_every_item_is_in_one_chunk():
    for count in range(12):
        for chunks in range(1, 9):
            parts = vqa.split_list(list(range(count)), chunks)
            assert len(parts) == chunks and [item for part in parts for item in part] == list(range(count))
    assert [len(part) for part in vqa.split_list(range(10), 4)] == [3, 3, 3, 1]
    with pytest.raises(ValueError, match="--chunk-idx 4 must be"):
        vqa.get_chunk([1], 4, 4)


def test_an_interrupted_file_is_continued_and_another_settings_file_is_not(world, whole, tmp_path):
    path = tmp_path / "answers.jsonl"
    assert loader(world, path) == 0
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(["MARK".join(lines[0].split("Is it", 1)), *lines[1:3]]) + lines[3][:10])
    assert loader(world, path) == 0
    assert "MARK" in rows(path)[0]["prompt"] and path.read_text().splitlines()[1:] == whole.read_text().splitlines()[1:]
    assert loader(world, path, *runner_world.REDUCTION) == 0
    assert "MARK" not in path.read_text() and path.read_text() != whole.read_text()
    path.with_name("answers.jsonl.settings.json").unlink()
    assert loader(world, path) == 0
    assert path.read_text() == whole.read_text()


def test_answers_from_nan_logits_are_marked_and_stay_no_result(world, tmp_path, monkeypatch, capsys):
    path = tmp_path / "answers.jsonl"
    monkeypatch.setattr(sanity.Watch, "rows", lambda self, count: [True] + [False] * (count - 1))
    assert loader(world, path, "--batch", 4) == sanity.BROKEN
    monkeypatch.undo()
    monkeypatch.setattr(vqa, "load_pretrained_model", _loaded)
    assert [row["metadata"] for row in rows(path)] == [{"non_finite": True}, {}, {}, {}] * 2
    assert loader(world, path, "--batch", 4) == sanity.BROKEN, "the same command finds the same answers"
    assert "2 of 8 answers come from logits that are NaN" in capsys.readouterr().err


def test_rows_of_other_questions_are_not_continued(world, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    assert loader(world, path) == 0
    path.write_text("".join(path.read_text().splitlines(keepends=True)[4:]))
    assert loader(world, path) == 2
    assert "line 1: expected question q0" in capsys.readouterr().err


def test_model_vqa_has_no_length_flag_and_samples_on_request(world, tmp_path, monkeypatch):
    seen = {}

    def generate(self, ids, pixels, sizes, max_new_tokens, **options):
        seen.update(options, max_new_tokens=max_new_tokens)
        self.non_finite = [False] * len(ids)
        return ["x"] * len(ids)

    monkeypatch.setattr("llava.eval.generate.Answerer.generate", generate)
    assert run(model_vqa, world, tmp_path / "a.jsonl") == 0
    assert (seen["max_new_tokens"], seen["do_sample"], seen["num_beams"]) == (1024, False, 1)
    changes = {"--temperature": 0.5}
    assert run(model_vqa_loader, world, tmp_path / "b.jsonl", "--top_p", 0.9, "--num_beams", 2, **changes) == 0
    assert seen == {
        "max_new_tokens": 128, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "num_beams": 2, "use_cache": True
    }  # fmt: skip


def test_llavas_defaults():
    plain = vqa.make_parser("p", "d", "tables/question.jsonl", "llava_v1").parse_args([])
    assert (plain.temperature, plain.num_beams, plain.top_p, plain.conv_mode) == (0.2, 1, None, "llava_v1")
    assert (plain.answers_file, plain.num_chunks, plain.chunk_idx, plain.image_folder) == ("answer.jsonl", 1, 0, "")


def test_scienceqa_asks_with_and_without_pictures(world, tmp_path, monkeypatch):
    monkeypatch.setattr(model_vqa_science, "MAX_NEW_TOKENS", 5)
    changes = {"--question-file": world.problems, "--image-folder": world.root / "scienceqa" / "images" / "test"}
    path = tmp_path / "answers.jsonl"
    assert run(model_vqa_science, world, path, "--single-pred-prompt", **changes) == 0
    answers = rows(path)
    assert [row["question_id"] for row in answers] == list("01234")
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert answers[0]["prompt"] == "Which of 0?\nA. one\nB. two" + letter
    assert answers[1]["prompt"] == "<image>\nWhich of 1?\nA. one\nB. two" + letter


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1, "image": "a.jpg"}\n', "line 1: field 'text'"),
        ('{"question_id": 1, "image": "a.jpg", "text": "t"}\n', "1 pictures are missing"),
        ('{"question_id": 1, ', "line 1: broken JSON"),
    ],
)
def test_bad_question_files_are_named(world, tmp_path, capsys, content, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    assert loader(world, tmp_path / "a.jsonl", **{"--question-file": path}) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "message"),
    [({"id": "1"}, "record 0: field 'conversations'"), ({"id": "1", "conversations": []}, "must begin with a turn")],
)
def test_bad_scienceqa_records_are_named(world, tmp_path, capsys, record, message):
    path = tmp_path / "problems.json"
    path.write_text(json.dumps([record]))
    assert run(model_vqa_science, world, tmp_path / "a.jsonl", **{"--question-file": path}) == 2
    assert message in capsys.readouterr().err


def test_a_broken_picture_stops_the_run_by_name(world, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for n in range(3):
        (images / f"COCO_val2014_{n:012d}.jpg").write_bytes(b"no picture")
    assert loader(world, tmp_path / "a.jsonl", **{"--image-folder": images}) == 2
    assert "question q0:" in capsys.readouterr().err


def test_a_missing_question_file_and_a_wrong_chunk_are_named(world, tmp_path, capsys):
    assert loader(world, tmp_path / "a.jsonl", **{"--question-file": tmp_path / "none.jsonl"}) == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err
    assert loader(world, tmp_path / "a.jsonl", "--num-chunks", 2, "--chunk-idx", 2) == 1
    assert "--chunk-idx 2 must be" in capsys.readouterr().err
