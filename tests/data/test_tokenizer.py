"""The loaded tokenizer gives the ids of the slow sentencepiece tokenizer."""

import functools
import json
import pickle
import re

import pytest
import sentencepiece
from data_helpers import GOLDEN, golden_json, tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llava.mm_utils import tokenizer_image_token
from llava.tokenization import load_tokenizer

FOLDERS = ["tokenizer", "tokenizer_legacy"]
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
TEXTS = st.lists(
    st.sampled_from(
        ["USER", "hello", " ", "  ", "\n", "</s>", "<s>", "é", "花", "😀", "a", ":", " two", "\t", "3", "▁"]
    ),
    max_size=8,
).map("".join)


@functools.cache
def _sentencepiece(dummy_prefix):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((GOLDEN / "tokenizer" / "tokenizer.model").read_bytes())
    proto.normalizer_spec.add_dummy_prefix = dummy_prefix
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def slow_ids(text, legacy):
    """What the slow tokenizer does, written down from its description: sentencepiece between special tokens.

    Legacy lets sentencepiece add its word-start mark to every part; otherwise only the start of the text gets one.
    """
    if not legacy:
        text = "▁" + text.replace("▁", " ") if text else ""
    parts = [part for part in re.split(r"(<unk>|<s>|</s>)", text) if part]
    if not legacy and len(parts) > 1 and parts[0] == "▁" and parts[1] in SPECIAL:
        parts = parts[1:]
    ids = [1]
    for part in parts:
        ids += [SPECIAL[part]] if part in SPECIAL else _sentencepiece(legacy).encode(part)
    return ids


@pytest.mark.parametrize("folder", FOLDERS)
@given(text=TEXTS)
@example(text=" hello")
@example(text=" ")
@example(text="</s>USER: a</s> b")
@example(text=" </s>")
@settings(max_examples=300, deadline=None)
def test_ids_equal_the_slow_tokenizer(folder, text):
    assert tokenizer(folder)(text).input_ids == slow_ids(text, folder == "tokenizer_legacy")


@pytest.mark.parametrize(
    "case", golden_json("prompts.json")["cases"], ids=lambda case: f"{case['tokenizer']}-{case['name']}"
)
def test_golden_prompt_ids(case):
    assert tokenizer_image_token(case["prompt"], tokenizer(case["tokenizer"])) == case["input_ids"]


def test_plain_fast_tokenizer_differs_after_a_leading_space():
    """The reason for load_tokenizer: without it "<image> <image>" gets other ids."""
    plain = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    assert plain(" ").input_ids != slow_ids(" ", legacy=False)
    assert tokenizer()(" ").input_ids == slow_ids(" ", legacy=False)


@pytest.mark.parametrize("folder", FOLDERS)
def test_saved_and_loaded_again(folder, tmp_path):
    text = " a</s>USER: b</s> c é"
    tokenizer(folder).save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert isinstance(again, PreTrainedTokenizerFast) and again.legacy == tokenizer(folder).legacy
    assert again(text).input_ids == tokenizer(folder)(text).input_ids
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["legacy"] == (folder == "tokenizer_legacy")


@pytest.mark.parametrize("folder", FOLDERS)
def test_legacy_is_found_in_a_folder_that_transformers_5_wrote(folder, tmp_path):
    AutoTokenizer.from_pretrained(GOLDEN / folder).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).legacy == (folder == "tokenizer_legacy")


def test_an_old_folder_means_the_old_defaults(tmp_path):
    config = json.loads((GOLDEN / "tokenizer" / "tokenizer_config.json").read_text())
    del config["legacy"], config["add_bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "tokenizer" / "tokenizer.model").read_bytes())
    old = load_tokenizer(str(tmp_path))
    text = " a</s>USER"
    assert old.legacy is True and old(text).input_ids == slow_ids(text, legacy=True)
    old.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved"))(text).input_ids == slow_ids(text, legacy=True)
    assert load_tokenizer(str(tmp_path), add_bos_token=False)("a").input_ids == slow_ids("a", legacy=True)[1:]
    assert load_tokenizer(str(tmp_path), legacy=False).legacy is False


def test_settings_and_workers():
    loaded = load_tokenizer(str(GOLDEN / "tokenizer"), model_max_length=77, padding_side="left", use_fast=False)
    assert (loaded.model_max_length, loaded.padding_side) == (77, "left")
    assert tokenizer().padding_side == "right"
    copy = pickle.loads(pickle.dumps(tokenizer()))
    assert copy(" x</s>USER").input_ids == tokenizer()(" x</s>USER").input_ids


@given(text=st.text(alphabet="abc é花\n 3:", max_size=30))
@settings(max_examples=100, deadline=None)
def test_decoding_returns_the_text(text):
    assert tokenizer().decode(tokenizer()(text).input_ids, skip_special_tokens=True) == text


def test_special_tokens_can_be_added():
    loaded = load_tokenizer(str(GOLDEN / "tokenizer"))
    assert loaded.add_tokens(["<im_start>", "<im_end>"], special_tokens=True) == 2
    ids = loaded("a <im_start>b").input_ids
    assert loaded.convert_tokens_to_ids("<im_start>") in ids


def test_other_tokenizers_are_left_alone(tmp_path):
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate("abcĠ")}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(" ab").input_ids == [3, 0, 1]
    assert tokenizer_image_token("a<image>b", loaded) == [0, -200, 1]
