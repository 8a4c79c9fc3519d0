"""Batched answers: any mix of pictures, the same texts as one by one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import runner_world
import torch
from runner_world import noise

import duet
from llava.conversation import conv_templates
from llava.eval import bench
from llava.eval.generate import Answerer, mark_images, pack, preprocess, stop_string, template_for
from llava.eval.ledger import sample_metadata, summarise
from llava.eval.runner import Item, make_batches
from llava.eval.tasks.base import Question

PLAIN = SimpleNamespace(mm_use_im_start_end=False)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return runner_world.load_model(tmp_path_factory.mktemp("generate"))


@pytest.fixture
def answerer(loaded):
    tokenizer, model, processor = loaded
    model.set_reduction(None)
    return Answerer(model, tokenizer, processor, "vicuna_v1")


def mixed_batch():
    same = noise(9)
    return [
        ("What is it?", [noise(1)]),
        ("No picture, a much longer question about nothing at all?", []),
        ("Which of these two is the red one, or are they the same?", [noise(2), noise(3, (30, 80))]),
        ("Short?", [same]),
        ("And then?", [same, same, same]),
    ]


REDUCTION = duet.DuetConfig(dominant=10, contextual=2, schedule={1: 0.5, 3: 0.0})


@pytest.mark.parametrize("reduction", [None, REDUCTION], ids=["full", "duet"])
def test_a_batch_answers_as_its_samples_do_alone(answerer, reduction):
    answerer.model.set_reduction(reduction)
    batch = mixed_batch()
    alone = [answerer.answer([sample], 12)[0] for sample in batch]
    assert answerer.answer(batch, 12) == alone
    assert answerer.answer(batch[::-1], 12) == alone[::-1]
    assert len(set(alone)) > 3, "answers that are all alike prove nothing"
    assert answerer.answer(batch[1:2] * 2, 12) == [alone[1]] * 2


def test_nothing_to_answer(answerer):
    assert answerer.answer([], 4) == []


def test_the_ledger_counts_every_sample(answerer):
    answerer.model.set_reduction(REDUCTION)
    batch = mixed_batch()
    with duet.trace(images=False) as trace:
        answerer.answer(batch, 3)
    patches = [36 * len(pictures) for _, pictures in batch]
    facts = sample_metadata(trace, patches, None)
    assert [f["visual"] for f in facts[:3]] == [
        [[12, 1], [6, 2], [0, 1]],
        [[0, 1], [0, 2], [0, 1]],
        [[24, 1], [12, 2], [0, 1]],
    ]
    ledger = summarise(facts, REDUCTION, 4)
    assert ledger["samples"] == 4
    assert ledger["tokens_per_layer"] == [21.0, 10.5, 10.5, 0.0]  # 12, 24, 12 and 36 enter
    assert ledger["average_tokens"] == 10.5
    assert ledger["untouched"] == {"stage 1": 0, "stage 2, layer 1": 0, "stage 2, layer 3": 0}


def test_the_ledger_finds_stages_that_did_nothing_and_cut_prompts():
    reduction = duet.DuetConfig(dominant=30, contextual=6, schedule={1: 1.0, 3: 0.0})
    facts = [{"patches": 36, "visual": [[36, 1], [36, 2], [0, 1]]}, {"patches": 72, "visual": [[36, 3], [0, 1]]}]
    ledger = summarise([*facts, {"patches": 0, "visual": [[0, 4]]}, {}], reduction, 4)
    assert ledger["untouched"] == {"stage 1": 1, "stage 2, layer 1": 2, "stage 2, layer 3": 0}
    segments = [SimpleNamespace(start=0, stop=4, visual=[5, 5], tokens=[20, 19])]
    cut = sample_metadata(SimpleNamespace(passes=[segments]), [5, 5], limit=20)
    assert [f.get("cut") for f in cut] == [True, None]
    assert summarise([], None, 4)["average_tokens"] is None


def test_marks_go_in_front_once_per_picture():
    assert mark_images("Why?", 3, PLAIN) == "<image><image><image>\nWhy?"
    assert mark_images("Why?", 0, PLAIN) == "Why?"
    assert mark_images("a <image> b <image>", 2, PLAIN) == "a <image> b <image>"
    assert mark_images("Why?", 1, SimpleNamespace(mm_use_im_start_end=True)) == "<im_start><image><im_end>\nWhy?"
    with pytest.raises(ValueError, match=r"1 <image> mark\(s\) but 2 picture\(s\)"):
        mark_images("a <image>", 2, PLAIN)


def test_the_prompt_is_llavas(answerer):
    ids = answerer.prompt_ids("Why?", 1)
    text = answerer.tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=True)
    assert ids.count(-200) == 1
    assert text.startswith("A chat between a curious user and an artificial intelligence assistant.")
    assert text.endswith("Why? ASSISTANT:")


@pytest.mark.parametrize(
    ("name", "stored", "wanted", "video", "expected"),
    [
        ("llava-v1.5-7b", None, None, False, "vicuna_v1"),
        ("run", None, None, False, "vicuna_v1"),
        ("Video-LLaVA-7B", None, None, True, "llava_v1"),
        ("llava-v1.6-mistral-7b", None, None, False, "mistral_instruct"),
        ("run", "llava_v0", None, False, "llava_v0"),
        ("run", "vicuna_v1", "llava_v1", True, "llava_v1"),
    ],
)
def test_the_template_follows_the_protocol_and_the_checkpoint(name, stored, wanted, video, expected):
    assert template_for(name, SimpleNamespace(conv_version=stored), wanted, video) == expected


def test_an_unknown_template_or_a_model_without_eyes_is_refused(answerer):
    with pytest.raises(ValueError, match="unknown conversation template 'nope'"):
        Answerer(answerer.model, answerer.tokenizer, answerer.image_processor, "nope")
    with pytest.raises(ValueError, match="plain language model"):
        Answerer(answerer.model, answerer.tokenizer, None, "vicuna_v1")


def test_answers_end_at_the_templates_separator(loaded, monkeypatch):
    tokenizer, model, processor = loaded
    model.set_reduction(None)
    assert stop_string(conv_templates["vicuna_v1"], tokenizer) is None
    assert stop_string(conv_templates["llava_v0"], tokenizer) == "###"
    full = Answerer(model, tokenizer, processor, "vicuna_v1")
    batch = mixed_batch()[:3]
    texts = full.answer(batch, 12)
    stop = texts[0][2]
    monkeypatch.setattr("llava.eval.generate.stop_string", lambda *_: stop)
    stopped = Answerer(model, tokenizer, processor, "vicuna_v1")
    assert stopped.answer(batch, 12) == [text.split(stop)[0].strip() for text in texts]
    assert stopped.answer(batch[:1], 12) != texts[:1]


def test_pictures_are_processed_once_and_stacked_where_they_fit(answerer):
    same = noise(1)
    pixels = preprocess([same, noise(2), same], answerer.image_processor, answerer.model.config)
    assert pixels[0] is pixels[2] and not torch.equal(pixels[0], pixels[1])
    assert pack(pixels[:2]).shape == (2, 3, 84, 84)
    assert pack([]) is None
    assert pack([pixels[0], pixels[1], pixels[0]])[2] is pixels[0]
    assert len(pack([torch.zeros(3, 2, 2), torch.zeros(4, 3, 2, 2)])) == 2


def test_a_picture_that_several_questions_share_is_encoded_once(answerer, monkeypatch):
    encoded = []
    before = answerer.model.encode_images
    monkeypatch.setattr(answerer.model, "encode_images", lambda images: encoded.append(len(images)) or before(images))
    same, other = noise(9), noise(8)
    texts = answerer.answer([("What?", [same]), ("Why is it so?", [other, same]), ("Who?", [same])], 6)
    assert encoded == [2]
    assert texts == [
        answerer.answer([sample], 6)[0]
        for sample in [("What?", [same]), ("Why is it so?", [other, same.copy()]), ("Who?", [same])]
    ]


def test_batches_keep_the_questions_about_a_picture_together():
    def item(key, picture, length):
        return Item(Question(key, key, "", (Path(picture),)), 1, (0,) * length)

    items = [item("a1", "a", 5), item("b1", "b", 9), item("a2", "a", 8), item("c1", "c", 6), item("b2", "b", 4)]
    items.append(Item(Question("t", "t", ""), 0, (0,) * 50))
    keys = [[item.question.key for item in batch] for batch in make_batches(items, 2)]
    assert keys == [["b1", "b2"], ["a2", "a1"], ["c1", "t"]]


def test_the_bench_reports_the_ratio(loaded, monkeypatch, capsys):
    tokenizer, model, processor = loaded
    monkeypatch.setattr(bench, "load", lambda args: Answerer(model, tokenizer, processor, "vicuna_v1"))
    short = ["--batch", "2", "--samples", "2", "--rounds", "1", "--new-tokens", "1", "--budgets", "0"]
    assert bench.main(short) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].strip().startswith("full, 1:") and lines[3].strip().startswith("full, 6:")
    one, many, ratio = (float(part.split()[0]) for part in lines[2].split(":")[1].split(","))
    assert ratio == pytest.approx(one / many, rel=0.2)
    assert bench.main(["--samples", "2"]) == 1
