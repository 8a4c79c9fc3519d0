"""MMBench, Q-Bench, text-only questions, and the functions of the question-file modules that clients call."""

import base64
import functools
import io
import json
import shutil
from types import SimpleNamespace

import pytest
import runner_world
import torch

from llava.eval import (
    model_qa,
    model_vqa,
    model_vqa_loader,
    model_vqa_mmbench,
    model_vqa_qbench,
    model_vqa_science,
    vqa,
)
from llava.model.builder import load_pretrained_model

LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return runner_world.build_world(tmp_path_factory.mktemp("questions"))


@functools.cache
def _load(path):
    return load_pretrained_model(path, None, "tiny-llava", device="cpu")


@pytest.fixture(autouse=True)
def short_and_loaded_once(monkeypatch):
    """Loading is the slow part, and six tokens are an answer."""
    monkeypatch.setattr(vqa, "load_pretrained_model", lambda path, *_, **__: _load(path))
    for module in (model_vqa, model_vqa_mmbench, model_vqa_qbench, model_vqa_science, model_qa):
        monkeypatch.setattr(module, "MAX_NEW_TOKENS", 6)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def encoded(seed):
    buffer = io.BytesIO()
    runner_world.noise(seed).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Three questions: four options and a hint, two options, and a picture that is another row's."""
    lines = [
        ["index", "question", "hint", "A", "B", "C", "D", "category", "image"],
        ["241", "What is it?", "A hint.", "one", "two", "three", "4", "x", encoded(1)],
        ["252", "Which?", "", "1", "2", "", "nan", "x", encoded(2)],
        ["1000252", "Which?", "", "2", "1", "", "", "x", "252"],
    ]
    path = tmp_path_factory.mktemp("mmbench") / "mmbench.tsv"
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return path


def mmbench(world, table, answers, *more):
    flags = ["--model-path", world.model, "--question-file", table, "--answers-file", answers, "--temperature", 0]
    return model_vqa_mmbench.main([str(flag) for flag in (*flags, "--conv-mode", "vicuna_v1", "--workers", 0, *more)])


def test_mmbench_asks_llavas_questions(world, table, tmp_path):
    path = tmp_path / "answers.jsonl"
    assert mmbench(world, table, path, "--single-pred-prompt") == 0
    found = rows(path)
    assert [row["question_id"] for row in found] == [241, 252, 1000252]
    assert found[0]["prompt"] == "A hint.\nWhat is it?\nA. one\nB. two\nC. three\nD. 4"
    assert (found[0]["options"], found[0]["option_char"]) == (["one", "two", "three", "4"], list("ABCD"))
    assert found[1]["prompt"] == "Which?\nA. 1\nB. 2" and found[1]["options"] == ["1", "2"]
    assert all(row["round_id"] == 0 and row["text"] for row in found)


def test_mmbench_in_all_rounds_rotates_options_and_letters(world, table, tmp_path):
    assert mmbench(world, table, tmp_path / "all.jsonl", "--all-rounds") == 0
    found = rows(tmp_path / "all.jsonl")
    assert [row["round_id"] for row in found] == [0, 1, 2, 3, 0, 1, 0, 1]
    assert (found[1]["options"], found[1]["option_char"]) == (["two", "three", "4", "one"], list("BCDA"))
    assert found[1]["prompt"].endswith("\nA. two\nB. three\nC. 4\nD. one")
    for index in range(2):
        chunk = tmp_path / f"{index}.jsonl"
        assert mmbench(world, table, chunk, "--all-rounds", "--num-chunks", 2, "--chunk-idx", index) == 0
    assert rows(tmp_path / "0.jsonl") + rows(tmp_path / "1.jsonl") == found


def test_mmbench_asks_in_chinese_too(table):
    row = model_vqa_mmbench.read_table(table)[0]
    (question,) = model_vqa_mmbench.ask_rounds(row, False, model_vqa_mmbench.ASK_FOR_LETTER["cn"])
    assert question.text == question.prompt + "\n请直接回答选项字母。"
    assert model_vqa_mmbench.ASK_FOR_LETTER["en"] == LETTER
    assert [model_vqa_mmbench.is_none(value) for value in (None, float("nan"), "NaN", "none", "", 0)] == [
        True, True, True, True, False, False,
    ]  # fmt: skip


def test_a_table_with_a_damaged_picture_or_without_columns_is_named(world, table, tmp_path, capsys):
    broken = tmp_path / "broken.tsv"
    broken.write_text(table.read_text().replace("\t252\n", "\t999\n"))
    assert mmbench(world, broken, tmp_path / "a.jsonl") == 2
    assert "index 1000252 has no picture" in capsys.readouterr().err
    broken.write_text("index\tquestion\n1\twhat\n")
    assert mmbench(world, broken, tmp_path / "a.jsonl") == 2
    assert "lacks the columns hint, image, A, B" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lang", "line"), [("en", "Choose between one of the options as follows:"), ("zh", "在下列选项中选择一个:")]
)
def test_qbench_completes_its_records(world, tmp_path, lang, line):
    runner_world.save_picture(tmp_path / "images" / "1.png", 1)
    record = {"img_path": "1.png", "question": "How sharp?", "candidates": ["Very", "Not"], "type": 2}
    (tmp_path / "q.json").write_text(json.dumps([record, record]))
    flags = [
        "--model-path",
        world.model,
        "--questions-file",
        tmp_path / "q.json",
        "--image-folder",
        tmp_path / "images",
    ]
    flags += ["--answers-file", tmp_path / "a.jsonl", "--lang", lang, "--workers", 0]
    assert model_vqa_qbench.main([str(flag) for flag in flags]) == 0
    found = rows(tmp_path / "a.jsonl")
    assert len(found) == 2 and all(record.items() <= row.items() and row["response"] for row in found)
    assert found[0]["prompt"] == f"How sharp?\n{line}\nA. Very\nB. Not\n"


def test_eval_model_takes_what_llavas_takes(world, tmp_path):
    """Attributes of the flags that LLaVA's modules have; ours get their defaults."""
    questions = tmp_path / "q.jsonl"
    images = world.root / "pope" / "val2014"
    name = sorted(images.iterdir())[0].name
    questions.write_text(json.dumps({"question_id": 1, "image": name, "text": "What?"}) + "\n")
    args = SimpleNamespace(
        model_path=str(world.model), model_base=None, image_folder=str(images), question_file=str(questions),
        answers_file=str(tmp_path / "a.jsonl"), conv_mode="vicuna_v1", num_chunks=1, chunk_idx=0, temperature=0,
        top_p=None, num_beams=1,
    )  # fmt: skip
    model_vqa.eval_model(args)
    expected = rows(tmp_path / "a.jsonl")
    args.answers_file, args.max_new_tokens = str(tmp_path / "b.jsonl"), 6
    model_vqa_loader.eval_model(args)
    assert rows(tmp_path / "b.jsonl") == expected and expected[0]["text"]
    with pytest.raises(ValueError, match="--chunk-idx 3"):
        args.chunk_idx = 3
        model_vqa_loader.eval_model(args)


def test_a_loop_of_the_clients_own_gives_the_runners_answers(world, tmp_path):
    """`create_data_loader` and `generate`, as in LLaVA's own loop."""
    images = world.root / "pope" / "val2014"
    questions = [
        {"question_id": n, "image": path.name, "text": f"Is it {n}?"} for n, path in enumerate(sorted(images.iterdir()))
    ]
    tokenizer, model, image_processor, _ = _load(world.model)
    loader = model_vqa_loader.create_data_loader(
        questions, str(images), tokenizer, image_processor, model.config, num_workers=0, conv_mode="vicuna_v1"
    )
    texts = []
    for ids, pixels, sizes in loader:
        assert ids.dim() == 2 and pixels.dim() == 4 and len(sizes[0]) == 2
        output = model.generate(ids, images=pixels, image_sizes=sizes, do_sample=False, max_new_tokens=6)
        texts.append(tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip())
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    model_vqa.eval_model(
        SimpleNamespace(
            model_path=str(world.model), image_folder=str(images), question_file=str(tmp_path / "q.jsonl"),
            answers_file=str(tmp_path / "a.jsonl"), conv_mode="vicuna_v1", temperature=0, workers=0,
        )
    )  # fmt: skip
    assert [row["text"] for row in rows(tmp_path / "a.jsonl")] == texts
    with pytest.raises(ValueError, match="batch_size must be 1"):
        model_vqa_loader.create_data_loader(questions, "", tokenizer, image_processor, model.config, batch_size=2)


def test_lists_are_cut_as_in_llava():
    for module in (model_vqa, model_vqa_loader, model_vqa_science, model_vqa_mmbench):
        assert module.split_list(list(range(10)), 4) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
        assert module.get_chunk(list(range(10)), 4, 3) == [9]


def test_a_plain_language_model_answers_text(world, tmp_path, monkeypatch):
    """The prompt, which such a model repeats, is not part of the answer."""
    llm = tmp_path / "llm"
    shutil.copytree(world.folder / "llm", llm)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(runner_world.TOKENIZER / name, llm / name)
    lines = [{"question_id": n, "text": "What is two plus two?", "category": "x"} for n in range(2)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    torch.manual_seed(0)
    flags = ["--model-name", llm, "--question-file", tmp_path / "q.jsonl", "--answers-file", tmp_path / "a.jsonl"]
    assert model_qa.main([str(flag) for flag in flags]) == 0
    found = rows(tmp_path / "a.jsonl")
    assert [row["question_id"] for row in found] == [0, 1] and found[0]["text"] != found[1]["text"]
    assert not any("two plus two" in row["text"] for row in found)
    assert model_qa.main(["--model-name", str(llm), "--question-file", str(tmp_path / "none.jsonl")]) == 2
