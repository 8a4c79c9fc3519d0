"""LLaVA's scripts that convert answers, records and checkpoints: their files are LLaVA's."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.model import apply_delta, consolidate, make_delta
from llava.model import utils as model_utils
from llava.model.checkpoints import read_projector_file

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "golden" / "llava_tiny"


@pytest.fixture
def script(monkeypatch):
    """Load a script below scripts/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(texts):
    return [{"question_id": key, "prompt": "p", "text": text} for key, text in texts.items()]


def test_vqav2_submits_the_whole_test_split(script, tmp_path, capsys):
    vqav2 = script("convert_vqav2_for_submission")
    write_lines(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", [{"question_id": n} for n in (1, 2, 3)])
    write_lines(tmp_path / "dev.jsonl", [{"question_id": n} for n in (1, 3)])
    merged = tmp_path / "answers" / "dev" / "mine" / "merge.jsonl"
    write_lines(merged, answers({1: "Two cats.", 3: "The dog"}))
    flags = ["--dir", str(tmp_path), "--split", "dev", "--ckpt", "mine"]
    assert vqav2.main(flags) == 0
    assert json.loads((tmp_path / "answers_upload" / "dev" / "mine.json").read_text()) == [
        {"question_id": 1, "answer": "2 cats"},
        {"question_id": 2, "answer": ""},
        {"question_id": 3, "answer": "dog"},
    ]
    assert "total results: 2, total split: 3, without an answer: 1" in capsys.readouterr().out
    write_lines(merged, answers({1: "Two cats."}))
    assert vqav2.main(flags) == 1
    assert "1 questions have no answer, first: 3" in capsys.readouterr().err


def test_vizwiz_submits_pictures_with_answers(script, tmp_path, capsys):
    vizwiz = script("convert_vizwiz_for_submission")
    split = write_lines(tmp_path / "t.jsonl", [{"question_id": f"q{n}", "image": f"{n}.jpg"} for n in range(2)])
    flags = ["--annotation-file", split, "--result-upload-file", str(tmp_path / "up" / "mine.json"), "--result-file"]
    assert (
        vizwiz.main([*flags, write_lines(tmp_path / "a.jsonl", answers({"q1": "Unanswerable.", "q0": "A cup"}))]) == 0
    )
    assert json.loads((tmp_path / "up" / "mine.json").read_text()) == [
        {"image": "0.jpg", "answer": "cup"},
        {"image": "1.jpg", "answer": "unanswerable"},
    ]
    assert vizwiz.main([*flags, write_lines(tmp_path / "a.jsonl", answers({"q1": "x"}))]) == 1
    assert "first: q0" in capsys.readouterr().err


def test_mmvet_names_its_answers(script, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", answers({0: "x", 7: "y"}))
    assert script("convert_mmvet_for_eval").main(["--src", source, "--dst", str(tmp_path / "r" / "m.json")]) == 0
    assert json.loads((tmp_path / "r" / "m.json").read_text()) == {"v1_0": "x", "v1_7": "y"}


@pytest.fixture
def mmbench_files(tmp_path):
    columns = ["index", "question", "hint", "A", "B", "category", "image", "source", "l2-category", "comment", "split"]
    table = tmp_path / "t.tsv"
    table.write_text(
        "".join("\t".join([key if c == "index" else c for c in columns]) + "\n" for key in ("index", "5", "9"))
    )
    write_lines(tmp_path / "mine.jsonl", answers({9: "B", 5: "A"}))
    return tmp_path


def test_mmbench_adds_a_column_and_hides_the_pictures(mmbench_files):
    from llava.eval.submissions import mmbench_table
    from llava.eval.tasks.base import BadEvalData

    found = mmbench_table(mmbench_files / "t.tsv", mmbench_files / "mine.jsonl")
    assert list(found.columns) == ["index", "question", "A", "B", "split", "prediction"]
    assert list(found["prediction"]) == ["A", "B"]
    write_lines(mmbench_files / "mine.jsonl", answers({9: "B"}))
    with pytest.raises(BadEvalData, match="first: 5"):
        mmbench_table(mmbench_files / "t.tsv", mmbench_files / "mine.jsonl")


def test_mmbench_writes_a_workbook(script, mmbench_files):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("openpyxl", reason="openpyxl is not installed; pip install -e '.[eval]'")
    flags = ["--annotation-file", "t.tsv", "--result-dir", "", "--upload-dir", "up"]
    flags = [str(mmbench_files / flag) if not flag.startswith("--") else flag for flag in flags]
    assert script("convert_mmbench_for_submission").main([*flags, "--experiment", "mine"]) == 0
    assert list(pandas.read_excel(mmbench_files / "up" / "mine.xlsx")["prediction"]) == ["A", "B"]


@pytest.fixture
def scienceqa(tmp_path):
    problem = {"question": "Which one?", "choices": ["x", "y"], "answer": 1, "lecture": "one\ntwo", "solution": "so"}
    problems = {
        "1": {**problem, "hint": "", "image": None},
        "2": {**problem, "hint": "Look.", "image": "image.png", "lecture": ""},
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["1", "2"], "val": ["3"]}))
    return tmp_path


def test_scienceqa_becomes_training_records(script, scienceqa, capsys):
    convert = script("convert_sqa_to_llava")
    assert convert.main(["convert_to_llava", "--base-dir", str(scienceqa), "--split", "train"]) == 0
    assert json.loads((scienceqa / "llava_train_QCM-LEA.json").read_text()) == [
        {
            "id": "1",
            "conversations": [
                {"from": "human", "value": "Which one?\nContext: N/A\nOptions: (A) x (B) y"},
                {"from": "gpt", "value": "one\ntwo so The answer is B."},
            ],
        },
        {
            "id": "2",
            "image": "2/image.png",
            "conversations": [
                {"from": "human", "value": "Which one?\nContext: Look.\nOptions: (A) x (B) y\n<image>"},
                {"from": "gpt", "value": "so The answer is B."},
            ],
        },
    ]
    assert "Number of samples: 2" in capsys.readouterr().out
    assert convert.main(["convert_to_jsonl", "--base-dir", str(scienceqa), "--split", "train"]) == 0
    row = json.loads((scienceqa / "scienceqa_train_QCM-LEPA.jsonl").read_text().splitlines()[0])
    assert row["output"] == "LECTURE: one\ntwo\nSOLUTION: so\n###\nANSWER: B."


@pytest.mark.parametrize(
    ("split", "form", "message"),
    [
        ("val", "QCM-LEA", "problems.json lacks 1 problems of the split 'val'"),
        ("train", "QXM-A", "unknown question format 'QXM'"),
        ("train", "QCM-ZZ", "unknown answer format 'ZZ'"),
        ("train", "QCM", "expected QUESTION-ANSWER"),
    ],
)
def test_wrong_splits_and_formats_are_named(script, scienceqa, capsys, split, form, message):
    flags = ["convert_to_llava", "--base-dir", str(scienceqa), "--split", split, "--prompt-format", form]
    assert script("convert_sqa_to_llava").main(flags) == 1
    assert message in capsys.readouterr().err


def test_the_projector_is_cut_out(script, tmp_path, capsys):
    extract = script("extract_mm_projector")
    for name in ("mm_projector.bin", "mm_projector.safetensors", "projector.pt"):
        assert extract.main(["--model-path", str(CHECKPOINT), "--output", str(tmp_path / name)]) == 0
        found = read_projector_file(str(tmp_path / name))
        whole = load_file(CHECKPOINT / "model.safetensors")
        assert set(found) == {key for key in whole if "mm_projector" in key}
        assert all(torch.equal(found[key], whole[key]) for key in found)
    assert extract.main(["--model-path", str(tmp_path / "none"), "--output", str(tmp_path / "x.bin")]) == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.fixture
def base(tmp_path):
    """A language model: the golden model's without projector and tower, with two tokens less, and other numbers."""
    from safetensors.torch import save_file

    folder = tmp_path / "base"
    folder.mkdir()
    state = {}
    for key, tensor in load_file(CHECKPOINT / "model.safetensors").items():
        if "mm_projector" not in key and "vision_tower" not in key:
            rows = slice(0, -2) if key in ("model.embed_tokens.weight", "lm_head.weight") else slice(None)
            state[key] = (tensor[rows] * 0.5).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(CHECKPOINT / "config.json", folder)
    return folder


def test_a_delta_and_its_base_give_the_model(base, tmp_path):
    delta, model = tmp_path / "llava-delta", tmp_path / "llava-model"
    flags = ["--base-model-path", str(base), "--delta-path", str(delta), "--target-model-path"]
    assert make_delta.main([*flags, str(CHECKPOINT)]) == 0
    assert apply_delta.main([*flags, str(model)]) == 0
    expected = load_file(CHECKPOINT / "model.safetensors")
    difference, found = load_file(delta / "model.safetensors"), load_file(model / "model.safetensors")
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == torch.float16
        assert torch.allclose(found[key].float(), tensor.float(), atol=1e-3, rtol=2e-3), key
    key = "model.embed_tokens.weight"
    assert torch.allclose(difference[key][:-2].float(), expected[key][:-2].float() / 2, atol=1e-3)
    assert torch.equal(difference[key][-2:], expected[key][-2:].half())
    assert (model / "tokenizer.model").is_file() and (model / "config.json").is_file()


def test_a_delta_of_another_model_is_refused(base, tmp_path, capsys):
    flags = [
        "--base-model-path",
        str(CHECKPOINT),
        "--target-model-path",
        str(base),
        "--delta-path",
        str(tmp_path / "d"),
    ]
    assert make_delta.main(flags) == 1
    assert "the base model's is" in capsys.readouterr().err and not (tmp_path / "d").exists()
    assert make_delta.main([*flags[:1], str(tmp_path / "none"), *flags[2:]]) == 1
    assert "none does not exist" in capsys.readouterr().err


def test_consolidating_writes_the_same_weights_once(tmp_path, capsys):
    target = tmp_path / "whole"
    assert consolidate.main(["--src", str(CHECKPOINT), "--dst", str(target)]) == 0
    before, after = load_file(CHECKPOINT / "model.safetensors"), load_file(target / "model.safetensors")
    assert set(before) == set(after) and all(torch.equal(after[key], before[key].half()) for key in after)
    assert consolidate.main(["--src", str(CHECKPOINT), "--dst", str(target)]) == 1
    assert "already holds a model" in capsys.readouterr().err


def test_an_old_checkpoint_is_upgraded_only_by_its_owner(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "llava-7b-v0"
    folder.mkdir()
    old = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match='"model_type": "llava_llama"'):
        model_utils.auto_upgrade(str(folder))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdin, "readline", lambda: "n\n", raising=False)
    with pytest.raises(ValueError, match="left as it is"):
        model_utils.auto_upgrade(str(folder))
    assert json.loads((folder / "config.json").read_text()) == old
    monkeypatch.setattr(sys.stdin, "readline", lambda: "Y\n", raising=False)
    model_utils.auto_upgrade(str(folder))
    assert json.loads((folder / "config.json").read_text()) == old | model_utils.UPGRADE
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    model_utils.auto_upgrade(str(folder))
    model_utils.auto_upgrade(str(CHECKPOINT))
