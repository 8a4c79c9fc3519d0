"""Small functions that clients of LLaVA import: what they give is what LLaVA's give."""

import json
import logging
import sys

import pytest
import torch

from llava import utils
from llava.eval import eval_pope, eval_science_qa, eval_science_qa_gpt4, eval_science_qa_gpt4_requery, eval_textvqa
from llava.eval import m4c_evaluator as m4c
from llava.eval.tasks.base import BadEvalData
from llava.train import train


def test_lines_of_a_stream_become_records(caplog):
    logger = logging.getLogger("stdout-test")
    stream = utils.StreamToLogger(logger, logging.INFO)
    with caplog.at_level(logging.INFO):
        assert stream.write("one\ntwo ") == 8
        stream.write("and a half\nthr")
        assert [record.getMessage() for record in caplog.records] == ["one", "two and a half"]
        stream.flush()
        stream.flush()
    assert [record.getMessage() for record in caplog.records] == ["one", "two and a half", "thr"]
    assert stream.encoding == sys.stdout.encoding and utils.handler is None


def test_pope_by_places(tmp_path, capsys):
    labels = tmp_path / "coco_pope_random.json"
    labels.write_text("".join(json.dumps({"label": label}) + "\n" for label in ("yes", "no", "yes", "no")))
    answers = [{"text": text} for text in ("Yes, it is.", "No.", "There is not", "It is.")]
    counts = eval_pope.eval_pope(answers, str(labels))
    assert (counts.tp, counts.fp, counts.tn, counts.fn) == (1, 1, 1, 1)
    assert [answer["text"] for answer in answers] == ["yes", "no", "no", "yes"]
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == ["TP\tFP\tTN\tFN\t", "1\t1\t1\t1", "Accuracy: 0.5"]
    assert out[-1] == "0.500, 0.500, 0.500, 0.500, 0.500"
    with pytest.raises(BadEvalData, match="4 labels for 3 answers"):
        eval_pope.eval_pope(answers[:3], str(labels))


@pytest.mark.parametrize(
    "prompt",
    [
        "What is IT?\nReference OCR token: a, b\nAnswer the question using a single word or phrase.",
        "Reference OCR token: a, b\nWhat is IT?\nAnswer the question using a single word or phrase.",
        "What is IT?\nAnswer the question using a single word or phrase.",
        "OCR tokens: a. Question: What is IT? Short answer:",
    ],
)
def test_a_prompt_of_textvqa_gives_its_question(prompt):
    assert eval_textvqa.prompt_processor(prompt) == "what is it?"


def test_steps_of_the_answer_processor():
    processor = m4c.EvalAIAnswerProcessor()
    assert processor.word_tokenize("It's A, B?") == "it 's a b"
    assert processor.process_punctuation("10,000; (a) x") == "10000 a x"
    assert processor.process_punctuation("a/b 3.5 c.") == "a b 3.5 c"
    assert processor.process_digit_article("The two dont") == "2 don't"
    assert processor("Two, the cats.") == "2 cats"


def test_scores_of_st_vqa_and_textcaps():
    rows = [
        {"pred_answer": "the cat", "gt_answers": ["cat", "dog"]},
        {"pred_answer": "kitten", "gt_answers": ["sitting", "mittens"]},
    ]
    assert m4c.STVQAAccuracyEvaluator().eval_pred_list(rows) == 0.5
    anls = m4c.STVQAANLSEvaluator()
    assert m4c.edit_distance("kitten", "sitting") == 3 and m4c.edit_distance("", "ab") == 2
    assert anls.get_anls("Kitten", "mittens ") == 1 - 2 / 7 and anls.get_anls("a", "xyz") == 0.0
    assert anls.eval_pred_list(rows) == pytest.approx((0 + 1 - 2 / 7) / 2)
    with pytest.raises(ValueError, match="no predictions"):
        anls.eval_pred_list([])
    with pytest.raises(ImportError, match="pip install pycocoevalcap"):
        m4c.TextCapsBleu4Evaluator()


@pytest.fixture
def science(tmp_path):
    """Four problems whose answer is A, B, A, B; ours, GPT-4's and the judge's answers."""
    problem = {"question": "q", "choices": ["x", "y"], "hint": "", "image": None}
    problems = {str(n): {**problem, "answer": n % 2} for n in range(4)}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))

    def rows(name, letters):
        lines = [
            {"question_id": str(n), "prompt": f"p{n}", "text": f"The answer is {c}."} for n, c in enumerate(letters)
        ]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    rows("ours.jsonl", "ABBA")
    rows("requery.jsonl", "ABA")
    gpt4 = {
        str(n): text for n, text in enumerate(("The answer is A.", "no idea", "The answer is A.", "The answer is A."))
    }
    (tmp_path / "gpt4.json").write_text(json.dumps({"outputs": gpt4}))
    flags = ["--base-dir", tmp_path, "--our-result", tmp_path / "ours.jsonl", "--gpt4-result", tmp_path / "gpt4.json"]
    return tmp_path, [str(flag) for flag in flags]


def test_scienceqa_with_gpt4(science, capsys):
    folder, flags = science
    assert eval_science_qa_gpt4.main(flags) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Total: 4, Correct: 3, Accuracy: 75.00%",
        "Total: 4, Correct (upper): 3, Accuracy: 75.00%",
        "Total: 4, GPT-4 NO-ANS (RANDOM): 1, Percentage: 25.00%",
    ]
    more = ["--requery-result", str(folder / "requery.jsonl"), "--output-result", str(folder / "out.json")]
    assert eval_science_qa_gpt4_requery.main(flags + more) == 0
    out = capsys.readouterr().out
    assert "Total: 4, Our-Correct: 2, Accuracy: 50.00%" in out
    assert "Total: 4, GPT-4-OursVisual-Correct: 3, Accuracy: 75.00%" in out
    assert "Total: 4, Requery-Correct: 3, Accuracy: 75.00%" in out
    written = json.loads((folder / "out.json").read_text())
    assert (written["correct"], written["count"], written["results"]) == (3, 4, {"0": 0, "1": 1, "2": 0, "3": 0})
    (folder / "ours.jsonl").write_text((folder / "ours.jsonl").read_text().split("\n")[0] + "\n")
    assert eval_science_qa_gpt4_requery.main(flags + more) == 1
    assert "3 problems have no answer" in capsys.readouterr().err


def test_helpers_of_scienceqa():
    assert eval_science_qa.get_pred_idx("B", ["x", "y"], list("ABCDE")) == 1
    assert eval_science_qa.get_pred_idx("C", ["x", "y"], list("ABCDE")) == -1
    assert eval_science_qa_gpt4.get_pred_idx("C", ["x", "y"], list("ABCDE")) in (0, 1)
    assert eval_science_qa.convert_caps([{"question_id": "7", "text": "t"}]) == [{"image_id": 7, "caption": "t"}]


def test_label_steps_of_the_first_generation():
    source = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}, {"from": "other", "value": "x"}]
    human, assistant = train.conversation_lib.default_conversation.roles
    text = train._add_speaker_and_signal("H", source)
    assert text == f"H### {human}: hi\n### {assistant}: yo\n### unknown: x\n### "
    assert source[0]["value"] == f"### {human}: hi\n"
    target = torch.arange(12)
    train._mask_targets(target, [2, 4, 3], ["human", "gpt"])
    assert target.tolist() == [-100, -100, 2, 3, -100, -100, 6, 7, 8, 9, 10, 11]


def test_texts_are_tokenised_one_by_one():
    from pathlib import Path

    from llava.tokenization import load_tokenizer

    tokenizer = load_tokenizer(str(Path(__file__).parents[1] / "golden" / "tokenizer"), model_max_length=6)
    tokenizer.pad_token = tokenizer.unk_token
    found = train._tokenize_fn(["a b", "a b c d e f g h i"], tokenizer)
    assert found["input_ids_lens"] == found["labels_lens"] == [len(row) for row in found["input_ids"]]
    assert found["input_ids_lens"][1] == 6 and found["input_ids"][0].tolist() == tokenizer("a b").input_ids
