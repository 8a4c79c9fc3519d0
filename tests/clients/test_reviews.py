"""LLaVA's GPT reviews through any OpenAI-compatible endpoint: what is sent, what is stored, what cannot be used."""

import json
import re

import pytest
from video_stub_judge import MODEL, Status, error

from llava.eval import (
    eval_gpt_review,
    eval_gpt_review_bench,
    eval_gpt_review_visual,
    generate_webpage_data_from_table,
    qa_baseline_gpt35,
    summarize_gpt_review,
)

RULES = "llava/eval/table/rule.json"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path, request):
    """Three questions in LLaVA-Bench's form, two answers to each, what is in the pictures, and a small rule file."""
    categories = ["conv", "detail", "complex"]
    questions = [
        {"question_id": n, "image": f"{n}.jpg", "category": c, "text": f"ask {n}"} for n, c in enumerate(categories)
    ]
    context = [
        {
            "image": f"{n}.jpg",
            "caption": f"picture {n}",
            "captions": [f"picture {n}", "again"],
            "instances": [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}],
        }
        for n in range(3)
    ]
    first = [{"question_id": n, "answer_id": f"a{n}", "text": f"reference {n}"} for n in range(3)]
    own = [{"question_id": n, "answer_id": f"b{n}", "text": f"own {n}"} for n in range(3)]
    rules = {
        name: {"role": "Assistant", "prompt": f"Rate by {name}."}
        for c in categories
        for name in (c, f"llava_bench_{c}")
    } | {"default": {"role": "Helper", "prompt": "Rate."}}
    (tmp_path / "rule.json").write_text(json.dumps(rules))
    arguments = ["--question", write_lines(tmp_path / "q.jsonl", questions), "--rule", str(tmp_path / "rule.json")]
    arguments += ["--answer-list", write_lines(tmp_path / "a.jsonl", first), write_lines(tmp_path / "b.jsonl", own)]
    arguments += ["--output", str(tmp_path / "reviews.jsonl"), "--judge-model", MODEL]
    return tmp_path, arguments, ["--context", write_lines(tmp_path / "c.jsonl", context)]


def test_a_bench_review_sends_llavas_text_and_stores_llavas_row(files, judge):
    folder, arguments, context = files
    judge.always = "8 6.5\nThe first is better."
    assert eval_gpt_review_bench.main(arguments + context) == 0
    rows = read_lines(folder / "reviews.jsonl")
    assert rows[1] == {
        "id": 2, "question_id": 1, "answer1_id": "a1", "answer2_id": "b1", "category": "llava_bench_detail",
        "content": "8 6.5\nThe first is better.", "tuple": [8.0, 6.5],
    }  # fmt: skip
    sent = judge.requests[1][3]
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == (MODEL, 0.2, 1024)
    assert sent["messages"][1]["content"] == (
        "[Context]\npicture 1\n\n[Question]\nask 1\n\n[Assistant 1]\nreference 1\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nown 1\n\n[End of Assistant 2]\n\n[System]\nRate by llava_bench_detail.\n\n"
    )


def test_the_other_reviews_differ_in_context_and_rule(files, judge):
    folder, arguments, context = files
    judge.always = "1 2"
    assert eval_gpt_review_visual.main(arguments + context) == 0
    said = judge.requests[0][3]["messages"][1]["content"]
    assert said.startswith("[Context]\npicture 0\nagain\n\ncat: [0.1, 0.2, 0.3, 0.4]\n\n[Question]\nask 0\n\n")
    assert "Rate by conv." in said
    (folder / "reviews.jsonl").unlink()
    rules = json.loads((folder / "rule.json").read_text())
    (folder / "rule.json").write_text(json.dumps({"default": rules["default"]}))
    assert eval_gpt_review.main(arguments) == 0
    said = judge.requests[-1][3]["messages"][1]["content"]
    assert said.startswith("[Question]\nask 2\n\n[Helper 1]\n") and said.endswith("[System]\nRate.\n\n")


def test_an_interrupted_review_goes_on_and_pays_for_nothing_twice(files, judge):
    folder, arguments, context = files
    judge.plan = ["8 7", Status(401, error("no", "invalid_api_key"))]
    assert eval_gpt_review_bench.main(arguments + context) == 1
    assert len(read_lines(folder / "reviews.jsonl")) == 1
    judge.always = "5 5"
    assert eval_gpt_review_bench.main(arguments + context) == 0
    assert [row["tuple"] for row in read_lines(folder / "reviews.jsonl")] == [[8, 7], [5, 5], [5, 5]]
    assert len(judge.requests) == 4
    assert eval_gpt_review_bench.main(arguments + context) == 0
    assert len(judge.requests) == 4


def test_a_review_without_figures_is_no_score(files, judge, capsys):
    folder, arguments, context = files
    judge.plan = ["8 6", "I cannot say.", "6, 9"]
    assert eval_gpt_review_bench.main(arguments + context) == 2
    assert "1 reviews in" in capsys.readouterr().err
    assert [row["tuple"] for row in read_lines(folder / "reviews.jsonl")] == [[8, 6], [-1, -1], [6, 9]]
    assert summarize_gpt_review.main(["-f", str(folder / "reviews.jsonl")]) == 2
    out, err = capsys.readouterr()
    assert "all 107.1 70.0 75.0" in out.splitlines() and "1 reviews have no figures" in err


def test_a_summary_has_llavas_lines_and_filters(tmp_path, capsys):
    rows = [
        {"question_id": 1, "category": "llava_bench_conv", "tuple": [8.0, 6.0]},
        {"question_id": 2, "category": "llava_bench_conv", "tuple": [9.0, 7.0]},
        {"question_id": 3, "category": "llava_bench_detail", "tuple": [10.0, 5.0]},
    ]
    folder = tmp_path / "r"
    folder.mkdir()
    write_lines(folder / "gpt4_text_mine.jsonl", rows)
    write_lines(folder / "gpt4_text_0613.jsonl", rows)
    write_lines(folder / "answers.jsonl", rows)
    assert summarize_gpt_review.main(["-d", str(folder), "-v", "0314", "-i", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:4] == [
        "mine",
        "all 61.1 90.0 55.0",
        "llava_bench_conv 75.0 80.0 60.0",
        "llava_bench_detail 50.0 100.0 50.0",
    ]
    assert "0613" not in out and "answers" not in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:2], "has 2 answers to the 3 questions"),
        (lambda rows: rows[::-1], "both files must be in the questions' order"),
        (lambda rows: [{"question_id": 0}] * 3, "field 'text'"),
    ],
)
def test_files_that_do_not_belong_together_are_named(files, judge, capsys, change, message):
    folder, arguments, context = files
    rows = read_lines(folder / "b.jsonl")
    write_lines(folder / "b.jsonl", change(rows))
    assert eval_gpt_review_bench.main(arguments + context) == 1
    assert message in capsys.readouterr().err and not judge.requests


def test_a_category_without_a_rule_and_a_missing_endpoint_are_named(files, judge, capsys, monkeypatch):
    folder, arguments, context = files
    rules = json.loads((folder / "rule.json").read_text())
    del rules["llava_bench_conv"]
    (folder / "rule.json").write_text(json.dumps(rules))
    assert eval_gpt_review_bench.main(arguments + context) == 1
    assert "no entry for the category 'llava_bench_conv'" in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_API_BASE")
    assert eval_gpt_review_visual.main(arguments + context) == 1
    assert "OPENAI_API_BASE" in capsys.readouterr().err


def test_our_rules_serve_every_category_and_ask_for_what_is_parsed():
    from pathlib import Path

    rules = json.loads((Path(__file__).parents[2] / RULES).read_text())
    assert {"coding", "math", "default", "conv", "detail", "complex"} <= set(rules)
    assert {"llava_bench_conv", "llava_bench_detail", "llava_bench_complex"} <= set(rules)
    assert all(re.search(r"one line .* two numbers from 1 .* to 10", rule["prompt"]) for rule in rules.values())


def test_functions_that_clients_call(judge):
    judge.always = "9 8\nbecause"
    assert eval_gpt_review_bench.get_eval("compare", 100) == "9 8\nbecause"
    assert judge.requests[0][3]["model"] == "gpt-4-0314" and judge.requests[0][3]["max_tokens"] == 100
    assert eval_gpt_review.parse_score("9 8\nbecause") == [9.0, 8.0]
    assert eval_gpt_review.parse_score("nine") == [-1, -1] == eval_gpt_review.parse_score("1 2 3")
    row = qa_baseline_gpt35.get_answer(3, "why?", 50)
    assert row["text"] == "9 8\nbecause" and row["question_id"] == 3 and row["model_id"] == qa_baseline_gpt35.MODEL_ID


def test_a_baseline_answers_all_questions_and_names_those_without(tmp_path, judge, capsys):
    questions = write_lines(tmp_path / "q.jsonl", [{"question_id": n, "text": f"ask {n}"} for n in (3, 1, 2)])
    filtered = Status(400, error("filtered", "content_filter"))
    judge.always = lambda body: filtered if "ask 2" in body["messages"][-1]["content"] else "yes"
    assert qa_baseline_gpt35.main(["-q", questions, "-o", str(tmp_path / "a.jsonl")]) == 2
    rows = read_lines(tmp_path / "a.jsonl")
    assert [(row["question_id"], row["text"]) for row in rows] == [(1, "yes"), (2, "#ERROR#"), (3, "yes")]
    assert "1 questions have no answer" in capsys.readouterr().err


def test_a_page_joins_questions_answers_and_reviews(tmp_path, capsys):
    questions = write_lines(
        tmp_path / "q.jsonl",
        [{"question_id": 2, "text": "b", "category": "x"}, {"question_id": 1, "text": "a", "category": "x"}],
    )
    answers = write_lines(tmp_path / "v.jsonl", [{"question_id": n, "text": f"their {n}"} for n in (1, 2)])
    ours = write_lines(tmp_path / "o.jsonl", [{"question_id": n, "text": f"our {n}"} for n in (1, 2)])
    reviews = write_lines(
        tmp_path / "r.jsonl", [{"question_id": n, "tuple": [8, 7], "content": "8 7\nAssistant 1 wins"} for n in (1, 2)]
    )
    flags = [
        "--questions",
        questions,
        "--answers",
        f"vicuna={answers}",
        "--ours",
        ours,
        "--reviews",
        f"vicuna={reviews}",
    ]
    target = tmp_path / "page" / "data.json"
    assert generate_webpage_data_from_table.main([*flags, "--output", str(target)]) == 0
    data = json.loads(target.read_text())
    assert data["models"] == ["vicuna"] and [row["id"] for row in data["questions"]] == [1, 2]
    assert data["questions"][0]["answers"] == {"vicuna": "their 1", "ours": "our 1"}
    assert data["questions"][0]["evaluations"] == {"vicuna": "**Assistant 1** wins"}
    write_lines(tmp_path / "o.jsonl", [{"question_id": 1, "text": "our 1"}])
    assert generate_webpage_data_from_table.main([*flags, "--output", str(target)]) == 1
    assert "question 2 has no answer of ours" in capsys.readouterr().err
    assert generate_webpage_data_from_table.trim_hanging_lines(" a\nb\nc\n", 2) == "c"
