"""`python -m llava.eval.judge`: what it reads, writes, says and returns."""

import json
import logging
import runpy
import sys

import pytest
from video_helpers import ROWS, write_benchmark
from video_stub_judge import CASES, KEY, MODEL, SNAPSHOT, Status, error, serve_judge

from llava.eval import judge as command
from llava.eval.judge import read_predictions
from llava.eval.judging import PROMPT, Case, Prompt
from llava.eval.tasks.base import BadEvalData

HOME = "GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA"
# To ROWS; the stub finds rows 0 and 3 right, and the rules (`contains`) 0, 1 and 3.
SAID = ["a cat", "1", "a cup of coffee", "white", "stand", "a person"]


@pytest.fixture
def stub(monkeypatch):
    with serve_judge(monkeypatch) as server:
        yield server


def write_predictions(path, cases=CASES):
    rows = [{"id": c.id, "question": c.question, "answer": c.answer, "pred": c.prediction} for c in cases]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_answers(path, rows=ROWS, said=SAID):
    lines = [
        {"question_id": row[0], "prompt": row[2], "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}
        for row, text in zip(rows, said, strict=False)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def call(tmp_path, *flags, model=MODEL):
    """Judge CASES; returns the exit status and the result file."""
    predictions = write_predictions(tmp_path / "merge.jsonl")
    status = command.main(
        ["--predictions", str(predictions), "--out", str(tmp_path / "out"), "--judge-model", model, *flags]
    )
    result = tmp_path / "out" / "judge.json"
    return status, json.loads(result.read_text(encoding="utf-8")) if result.exists() else None


def test_predictions_of_video_llava_are_judged(stub, tmp_path, capsys):
    status, result = call(tmp_path)
    assert status == 0 and result["complete"]
    assert result["score"]["headline"] == "judge_accuracy"
    assert result["score"]["metrics"]["judge_accuracy"] == pytest.approx(600 / 9)
    assert result["score"]["metrics"]["judge_score"] == pytest.approx(33 / 9)  # 6 x 5 + 3 x 1
    assert result["score"]["metrics"]["contains"] == pytest.approx(600 / 9)
    assert result["judge"] == {
        "model": MODEL,
        "reported_as": [SNAPSHOT],
        "endpoints": [f"{stub.base}/chat/completions"],
        "prompt_version": PROMPT.version,
        "prompt_sha256": PROMPT.digest,
        "options": {"temperature": 0, "max_tokens": 64},
    }
    assert result["spent_now"] == {"requests": 9, "prompt_tokens": 900, "completion_tokens": 90}
    said = capsys.readouterr().out
    assert "judge_accuracy: 66.67" in said and MODEL in said and SNAPSHOT in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "judged.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [case.id for case in CASES]
    assert rows[0]["judge"] == {"pred": "no", "score": 1} and rows[1]["judge"] == {"pred": "yes", "score": 5}


def test_the_cost_is_said_before(stub, tmp_path, capsys):
    status, result = call(tmp_path, "--dry-run")
    places, texts = len("{question}{answer}{pred}"), len("what is number 0?" + "cat" + "a cat")
    letters = 9 * (len(PROMPT.system) + len(PROMPT.user) - places + texts)
    said = capsys.readouterr().out
    assert f"9 judgements to ask for, 9 answers: about {letters // 4} prompt tokens, at most 576 reply tokens" in said
    assert "at most 18 requests (--max-calls)" in said
    assert (status, result, stub.requests) == (0, None, [])


def test_without_a_judge_rules_score(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_BASE", raising=False)
    predictions = write_predictions(tmp_path / "merge.jsonl")
    assert command.main(["--predictions", str(predictions), "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert (result["score"]["headline"], result["judge"]) == ("contains", None)
    said = capsys.readouterr().out
    assert "contains: 66.67" in said and "not comparable with published numbers" in said


def test_a_judge_without_an_endpoint_is_an_error(tmp_path, capsys, monkeypatch):
    for name in ("OPENAI_API_BASE", "OPENAI_API_URL"):
        monkeypatch.delenv(name, raising=False)
    assert call(tmp_path)[0] == 1
    assert "OPENAI_API_BASE" in capsys.readouterr().err


def test_an_unreadable_judgement_is_named_and_ends_with_2(stub, tmp_path, capsys):
    stub.always = lambda body: "hm" if "number 5?" in body["messages"][1]["content"] else None
    status, result = call(tmp_path)
    said = capsys.readouterr()
    assert (status, result["complete"], list(result["unparsed"]), result["judged"]) == (2, False, ["5"], 8)
    assert "1 judgements could not be read: 5" in said.err and "incomplete" in said.err
    assert "\njudge_accuracy" not in said.out
    status, result = call(tmp_path, "--on-missing", "skip")
    assert status == 0 and result["score"]["metrics"]["judge_accuracy"] == pytest.approx(500 / 8)
    assert result["score"]["unparsed"] == 1 and "\njudge_accuracy: 62.50" in capsys.readouterr().out
    stub.always = None
    assert call(tmp_path)[1]["score"]["metrics"]["judge_accuracy"] == pytest.approx(600 / 9)


def test_a_stopped_run_is_incomplete_even_with_skip_and_continues(stub, tmp_path, capsys):
    status, result = call(tmp_path, "--max-calls", "4", "--on-missing", "skip")
    assert (status, result["judged"], len(stub.requests)) == (2, 4, 4)
    assert "limit of 4 requests" in result["stopped"] and "limit of 4 requests" in capsys.readouterr().err
    status, result = call(tmp_path)
    assert (status, result["judged"], len(stub.requests)) == (0, 9, 9)
    assert result["spent_now"]["requests"] == 5


def test_the_key_is_nowhere(stub, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    stub.plan = [
        Status(500, f"echo {KEY}"),
        Status(400, error(f"filtered {KEY}", "content_filter")),
        "I would rather not",
        Status(401, error(f"Incorrect API key provided: {KEY}")),
    ]
    status, result = call(tmp_path, "--num-tasks", "1", "--tries", "1")
    assert status == 2 and "***" in result["stopped"] and "***" in str(result["failed"])
    said = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written and b"***" in written
    assert KEY not in said.out + said.err + caplog.text


def test_the_module_runs_as_a_command(stub, tmp_path, monkeypatch, capsys):
    predictions = write_predictions(tmp_path / "merge.jsonl", CASES[:2])
    flags = ["--pred_path", predictions, "--output_dir", tmp_path / "o", "--judge_model", MODEL, "--num_tasks", 2]
    monkeypatch.setattr(sys, "argv", ["judge", *map(str, flags)])
    monkeypatch.delitem(sys.modules, "llava.eval.judge")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("llava.eval.judge", run_name="__main__")
    assert ended.value.code == 0 and "judge_accuracy: 50.00" in capsys.readouterr().out


@pytest.fixture
def benchmark_root(tmp_path):
    write_benchmark(tmp_path / HOME, "videos", frames=1)
    return tmp_path


def test_answers_of_our_runner_are_judged(stub, benchmark_root):
    answers = write_answers(benchmark_root / "answers.jsonl")
    out = benchmark_root / "out"
    flags = ["--benchmark", "msvd_qa", "--root", str(benchmark_root), "--judge-model", MODEL, "--out", str(out)]
    assert command.main(["--predictions", str(answers), *flags]) == 0
    result = json.loads((out / "judge.json").read_text())
    assert result["benchmark"] == "msvd_qa"
    assert result["score"]["metrics"]["judge_accuracy"] == pytest.approx(200 / 6)
    assert result["score"]["metrics"]["contains/0"] == 50.0


def test_unanswered_questions_are_named(stub, benchmark_root, capsys):
    answers = write_answers(benchmark_root / "answers.jsonl", ROWS[:4])
    flags = ["--benchmark", "msvd_qa", "--root", str(benchmark_root), "--judge-model", MODEL]
    assert command.main(["--predictions", str(answers), *flags, "--out", str(benchmark_root / "out")]) == 2
    assert "2 questions have no answer: 4, 5" in capsys.readouterr().err


def test_the_runners_record_is_completed(stub, benchmark_root):
    folder = benchmark_root / "results"
    folder.mkdir()
    write_answers(folder / "msvd_qa-0123.jsonl")
    path = folder / "msvd_qa-0123.result.json"
    before = {
        "name": "row", "benchmark": "msvd_qa", "headline": "contains", "metrics": {"contains": 50.0}, "n_expected": 6,
        "n_missing": 0, "n_unparsed": 0, "missing_skipped": False, "notes": ["old"], "digest": "0123",
    }  # fmt: skip
    path.write_text(json.dumps(before))
    stub.always = "cannot say"
    flags = ["--result", str(path), "--root", str(benchmark_root), "--judge-model", MODEL]
    assert command.main(flags) == 2
    assert json.loads(path.read_text()) == before, "an incomplete judgement leaves the record as it was"
    stub.always = None
    assert command.main(flags) == 0
    after = json.loads(path.read_text())
    assert after["headline"] == "judge_accuracy" and after["metrics"]["judge_accuracy"] == pytest.approx(200 / 6)
    assert after["judge"]["reported_as"] == [SNAPSHOT] and after["digest"] == "0123"
    assert not any("not comparable" in note for note in after["notes"])
    assert (folder / "msvd_qa-0123.judge" / "judgements.jsonl").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-tasks", "0"], "--num-tasks is 0"),
        (["--max-calls", "0"], "--max-calls is 0"),
        (["--tries", "-1"], "--tries is -1"),
        (["--request-options", "[1]"], "must be a JSON object"),
        (["--benchmark", "pope"], "has no judge"),
        (["--benchmark", "nothing"], "unknown benchmark"),
    ],
)
def test_wrong_flags_are_named(tmp_path, capsys, flags, message):
    assert call(tmp_path, *flags)[0] == 1
    assert message in capsys.readouterr().err


def test_out_is_needed(tmp_path, capsys):
    assert command.main(["--predictions", str(write_predictions(tmp_path / "p.jsonl"))]) == 1
    assert "--out is missing" in capsys.readouterr().err


def test_predictions_come_in_lines_an_array_or_several_files(tmp_path):
    lines = write_predictions(tmp_path / "0_0.json", CASES[:4])
    array = tmp_path / "0_1.json"
    rows = [json.loads(line) for line in write_predictions(tmp_path / "rest", CASES[4:]).read_text().splitlines()]
    array.write_text(json.dumps(rows))
    assert read_predictions([lines, array]) == CASES


ROW = {"id": 1, "question": "what?", "answer": "cat", "pred": "a cat"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["no predictions in"]),
        ("[]", ["no predictions in"]),
        ("{'id': 1, 'question': 'q', 'answer': 'a', 'pred': 'p'}", ["line 1", "broken JSON"]),
        ("__import__('os').abort()", ["line 1", "broken JSON"]),
        (json.dumps(ROW) + '\n{"id": 2, "ques', ["line 2", "broken JSON"]),
        (json.dumps(ROW) + "\n" + json.dumps(ROW), ["line 2", "id '1' occurs twice"]),
        (json.dumps({"id": 1, "question": "q", "answer": "a"}), ["line 1", "'pred'"]),
        (json.dumps([ROW | {"pred": None}]), ["record 0", "'pred'"]),
        (json.dumps(ROW | {"id": [1]}), ["line 1", "'id'"]),
        (json.dumps({"question_id": 1, "prompt": "q", "text": "a"}), ["line 1", "--benchmark NAME"]),
        (json.dumps([5]), ["record 0", "expected a JSON object"]),
    ],
)
def test_damaged_predictions_are_named(tmp_path, text, parts):
    path = tmp_path / "merge.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadEvalData) as caught:
        read_predictions([path])
    for part in (*parts, "merge.jsonl"):
        assert part in str(caught.value)


def test_absent_predictions_are_named(tmp_path):
    with pytest.raises(BadEvalData, match=r"nothing\.jsonl cannot be read"):
        read_predictions([tmp_path / "nothing.jsonl"])


def test_a_prompt_from_a_file(stub, tmp_path):
    path = tmp_path / "upstream.txt"
    path.write_text(
        "You grade.\nCarefully.\n---\nQ: {question}\nReference answer: {answer}\nModel's reply: {pred}\n{'pred': 'yes'}"
    )
    prompt = Prompt.from_file(path)
    assert prompt.messages(Case("1", "q", "a", "p")) == [
        {"role": "system", "content": "You grade.\nCarefully."},
        {"role": "user", "content": "Q: q\nReference answer: a\nModel's reply: p\n{'pred': 'yes'}"},
    ]
    status, result = call(tmp_path, "--prompt-file", str(path))
    assert status == 0
    assert result["judge"]["prompt_version"] == "file upstream.txt"
    assert result["judge"]["prompt_sha256"] == prompt.digest != PROMPT.digest


def test_a_prompt_file_without_a_system_part(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("{question} {answer} {pred}")
    assert Prompt.from_file(path).messages(Case("1", "q", "a", "p")) == [{"role": "user", "content": "q a p"}]


@pytest.mark.parametrize(
    ("content", "message"), [(b"{question} {pred}", "lacks {answer}"), (b"\xff\xfe", "cannot be read")]
)
def test_a_prompt_file_that_cannot_work(tmp_path, content, message):
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    with pytest.raises(BadEvalData, match=message):
        Prompt.from_file(path)
