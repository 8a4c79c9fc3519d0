"""Samples from records: pictures, several pictures, text only, length limit, and the policy for bad records."""

import json
import logging
from pathlib import Path

import pytest
import torch
from data_helpers import (
    GOLDEN,
    data_args,
    image_processor,
    record,
    short_tokenizer,
    supervised_runs,
    tokenizer,
    write_json,
)
from PIL import Image
from torch.utils.data import DataLoader

from llava import conversation as conversation_lib
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.train.dataset import LazySupervisedDataset, make_supervised_data_module
from llava.train.records import BadSampleError

TEXT_ONLY = record("why?", "because it is", id="text")
ONE = record("<image>\nwhat?", "a cup", id="one", image="coffee.png")
TWO = record("<image> or <image>?", "the second", id="two", image=["coffee.png", "astronaut.png"])


@pytest.fixture
def dataset(tmp_path):
    def make(records, limit=None, **changes):
        path = write_json(tmp_path / "data.json", records)
        changes.setdefault("bad_sample_file", str(tmp_path / "bad.jsonl"))
        loaded = tokenizer() if limit is None else short_tokenizer(limit)
        return LazySupervisedDataset(path, loaded, data_args(**changes))

    return make


def pixels(name, **changes):
    picture = Image.open(GOLDEN / "images" / name).convert("RGB")
    return process_images([picture], image_processor(), data_args(**changes))[0]


def answers(sample):
    runs = supervised_runs(sample["input_ids"].tolist(), sample["labels"].tolist())
    return [tokenizer().decode(run).strip() for run in runs]


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_one_picture(dataset, aspect):
    sample = dataset([ONE], image_aspect_ratio=aspect)[0]
    assert torch.equal(sample["image"], pixels("coffee.png", image_aspect_ratio=aspect))
    assert sample["image_size"] == Image.open(GOLDEN / "images" / "coffee.png").size
    assert sample["input_ids"].dim() == 1 and answers(sample) == ["a cup</s>"]


def test_several_pictures_keep_their_order(dataset):
    sample = dataset([TWO])[0]
    assert torch.equal(sample["image"][0], pixels("coffee.png"))
    assert torch.equal(sample["image"][1], pixels("astronaut.png"))
    assert (sample["input_ids"] == IMAGE_TOKEN_INDEX).sum() == 2 == len(sample["image_size"])


def test_text_only_gets_a_zero_picture(dataset):
    sample = dataset([TEXT_ONLY])[0]
    assert sample["image"].shape == (3, 336, 336) and not sample["image"].any()
    assert sample["image_size"] == (336, 336) and answers(sample) == ["because it is</s>"]


def test_without_a_vision_tower_marks_are_text(dataset, caplog):
    with caplog.at_level(logging.WARNING):
        made = dataset([ONE], is_multimodal=False)
    assert "no vision tower" in caplog.text
    sample = made[0]
    assert "image" not in sample and IMAGE_TOKEN_INDEX not in sample["input_ids"]


def test_anyres(dataset):
    grids = [(336, 672), (672, 336), (672, 672)]
    made = dataset([ONE, TEXT_ONLY], image_aspect_ratio="anyres", image_grid_pinpoints=grids)
    assert made[0]["image"].shape[1:] == (3, 336, 336) and made[0]["image"].shape[0] in (3, 5)
    assert made[1]["image"].shape == (1, 3, 336, 336)


def test_lengths(dataset):
    made = dataset([ONE, TEXT_ONLY, TWO])
    assert made.lengths == [4 + 128, 4, 5 + 128]
    assert made.modality_lengths == [4, -4, 5]
    assert len(made) == 3 and [one["id"] for one in made.list_data_dict] == ["one", "text", "two"]


def test_a_batch_of_everything(dataset, tmp_path):
    path = write_json(tmp_path / "data.json", [ONE, TEXT_ONLY, TWO])
    module = make_supervised_data_module(tokenizer(), data_args(data_path=path, eval_data_path=path))
    assert len(module["eval_dataset"]) == 3
    batch = next(iter(DataLoader(module["train_dataset"], batch_size=3, collate_fn=module["data_collator"])))
    assert batch["images"].shape == (4, 3, 336, 336) and len(batch["image_sizes"]) == 4
    assert make_supervised_data_module(tokenizer(), data_args(data_path=path))["eval_dataset"] is None


def test_the_template_is_kept_from_the_start(dataset):
    """A worker process that imports the module anew would see another default."""
    try:
        conversation_lib.set_default_conversation("plain")
        made = dataset([ONE])
    finally:
        conversation_lib.set_default_conversation("vicuna_v1")
    assert made[0]["input_ids"][:2].tolist() == [1, IMAGE_TOKEN_INDEX]


def test_workers_give_the_same_samples(dataset):
    made = dataset([ONE, TEXT_ONLY, TWO])
    loaded = list(DataLoader(made, batch_size=None, num_workers=1))
    for index in range(3):
        assert torch.equal(loaded[index]["input_ids"], made[index]["input_ids"])


def test_the_scan_knows_what_the_plain_template_takes(dataset):
    try:
        conversation_lib.set_default_conversation("plain")
        report = dataset([ONE, TEXT_ONLY, record("<image>", "a", "q", "b", id="talk", image="coffee.png")]).preflight()
    finally:
        conversation_lib.set_default_conversation("vicuna_v1")
    assert [bad.id for bad in report.bad] == ["text", "talk"] and report.counts == {"not a caption": 2}


# --- length ---------------------------------------------------------------------------------------------------------

LONG = record(
    *("<image> first question", "first answer", "second question", "second answer", "third question", "third answer"),
    id="long",
    image="coffee.png",
)


def full_length(records, dataset):
    return len(dataset([records])[0]["input_ids"])


def test_whole_turns_are_left_out(dataset):
    full = full_length(LONG, dataset)
    two = full_length(record(*[turn["value"] for turn in LONG["conversations"][:4]], image="coffee.png"), dataset)
    assert answers(dataset([LONG], limit=full)[0])[-1] == "third answer</s>"
    for limit in (full - 1, two):
        sample = dataset([LONG], limit=limit)[0]
        assert answers(sample) == ["first answer</s>", "second answer</s>"] and len(sample["input_ids"]) == two
    assert answers(dataset([LONG], limit=two - 1)[0]) == ["first answer</s>"]


def test_visual_tokens_are_counted(dataset):
    full = full_length(LONG, dataset)
    fits = dataset([LONG], limit=full + 575, visual_tokens_per_image=576)
    assert len(answers(fits[0])) == 3
    assert len(answers(dataset([LONG], limit=full + 574, visual_tokens_per_image=576)[0])) == 2


def test_pictures_of_left_out_turns_go_too(dataset):
    texts = ["<image> first", "one", "<image> second", "two"]
    long = record(*texts, image=["coffee.png", "astronaut.png"])
    full = full_length(long, dataset)
    sample = dataset([long], limit=full - 1)[0]
    assert answers(sample) == ["one</s>"] and len(sample["image"]) == 1
    assert torch.equal(sample["image"][0], pixels("coffee.png"))


def test_a_system_turn_stays(dataset):
    long = {**LONG, "conversations": [{"from": "system", "value": "Be brief."}, *LONG["conversations"]]}
    full = full_length(long, dataset)
    sample = dataset([long], limit=full - 1)[0]
    assert "Be brief." in tokenizer().decode(sample["input_ids"][:8]) and len(answers(sample)) == 2


@pytest.mark.parametrize("texts", [["q", "word " * 400], ["word " * 400, "a"], ["<image>", "a"]])
def test_first_turns_that_do_not_fit(dataset, texts):
    long = record(*texts, id="too-long", **({"image": "coffee.png"} if "<image>" in texts[0] else {}))
    made = dataset(
        [ONE, long] if "<image>" not in texts[0] else [TEXT_ONLY, long], limit=300, visual_tokens_per_image=576
    )
    with pytest.raises(BadSampleError, match=r"data\.json, record 1 \(id too-long\): .* the context holds 300"):
        made[1]
    bad = made.preflight().bad
    assert "too-long" in [one.id for one in bad] and {one.kind for one in bad} == {"too long"}


# --- bad records ----------------------------------------------------------------------------------------------------

MISSING = record("<image>", "a", id="lost", image="no_such.png")
OUTSIDE = record("<image>", "a", id="out", image="../prompts.json")


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (MISSING, "does not exist"),
        (OUTSIDE, "lies outside the image folder"),
        (record("<image>", "a", id="x", image=str(GOLDEN / "cases" / "pixels_coffee.png")), "lies outside"),
        (record("<image>", "", id="x", image="coffee.png"), "answer in turn 1 is empty"),
        (record("<image>", "a", id="x"), "more <image> marks than images: 1 for 0"),
        (record("q", "a", id="x", image="coffee.png"), "fewer <image> marks than images: 0 for 1"),
        (record("q", "a", id="x", video="v.mp4"), "videos are not supported"),
        ({"id": "x", "conversations": [{"from": "bot", "value": "q"}]}, "unknown role 'bot'"),
    ],
)
def test_error_names_file_index_and_id(dataset, one, message):
    made = dataset([ONE, one])
    with pytest.raises(BadSampleError, match=message) as caught:
        made[1]
    assert f"data.json, record 1 (id {one['id']})" in str(caught.value)
    assert "--on_bad_sample skip" in str(caught.value)


def test_a_worker_passes_the_error_on(dataset):
    loader = DataLoader(dataset([MISSING]), batch_size=None, num_workers=1)
    with pytest.raises(BadSampleError, match="id lost"):
        next(iter(loader))


def test_skip_replaces_and_counts(dataset):
    made = dataset([MISSING, TEXT_ONLY, OUTSIDE, ONE], on_bad_sample="skip")
    assert torch.equal(made[0]["input_ids"], made[3]["input_ids"])
    assert torch.equal(made[1]["input_ids"], dataset([TEXT_ONLY])[0]["input_ids"])
    made[0]
    assert sorted(bad.id for bad in made.bad_sample_report()) == ["lost", "out"]


def test_skipped_in_workers_are_counted_too(dataset):
    made = dataset([MISSING, ONE, OUTSIDE, ONE], on_bad_sample="skip")
    assert len(list(DataLoader(made, batch_size=None, num_workers=2))) == 4
    lines = [json.loads(line) for line in Path(made.bad_samples.path).read_text(encoding="utf-8").splitlines()]
    assert {line["id"] for line in lines} == {"lost", "out"}
    assert sorted(bad.index for bad in made.bad_sample_report()) == [0, 2]


def test_nothing_left_to_replace_with(dataset):
    with pytest.raises(BadSampleError, match="no good record in place of"):
        dataset([MISSING, OUTSIDE, TEXT_ONLY], on_bad_sample="skip")[0]


def test_drop_leaves_the_good_ones(dataset):
    made = dataset([MISSING, ONE, OUTSIDE, TEXT_ONLY], on_bad_sample="skip")
    report = made.preflight()
    assert report.positions == [0, 2]
    made.drop(report)
    assert [one["id"] for one in made.list_data_dict] == ["one", "text"]
    assert [origin.index for origin in made.origins] == [1, 3]
    assert sorted(bad.id for bad in made.bad_sample_report()) == ["lost", "out"]
    assert made.preflight().ok


def test_dropping_everything_is_an_error(dataset):
    made = dataset([MISSING])
    with pytest.raises(ValueError, match="all 1 records are bad"):
        made.drop(made.preflight())


def test_no_records(dataset):
    with pytest.raises(ValueError, match="no records"):
        dataset([])


def test_attributes_set_by_hand_are_enough(dataset):
    """Projects that bring their own records skip the constructor."""
    made = dataset([ONE, TEXT_ONLY])
    by_hand = LazySupervisedDataset.__new__(LazySupervisedDataset)
    by_hand.tokenizer, by_hand.data_args, by_hand.list_data_dict = made.tokenizer, made.data_args, [ONE, TEXT_ONLY]
    for index in range(2):
        for name, value in made[index].items():
            other = by_hand[index][name]
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
    assert by_hand.modality_lengths == made.modality_lengths
    by_hand.list_data_dict = [{"id": "x", "conversations": []}]
    with pytest.raises(BadSampleError, match=r"records.*0.*\bx\b"):
        by_hand[0]
