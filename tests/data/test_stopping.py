"""Image tokens in prompts, and stopping at keywords."""

import pytest
import torch
from data_helpers import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.mm_utils import KeywordsStoppingCriteria, tokenizer_image_token


def new_ids(text):
    return tokenizer()(text, add_special_tokens=False, return_tensors="pt").input_ids


PROMPT = torch.tensor([[1, 5, 6, 7]])


@given(pieces=st.lists(st.text(alphabet="ab \n", max_size=6), min_size=1, max_size=4))
@settings(deadline=None)
def test_pieces_are_tokenised_one_by_one(pieces):
    ids = tokenizer_image_token("<image>".join(pieces), tokenizer())
    expected = [1]
    for index, piece in enumerate(pieces):
        expected += ([-200] if index else []) + tokenizer()(piece).input_ids[1:]
    assert ids == expected


def test_return_types():
    assert tokenizer_image_token("<image>", tokenizer()) == [1, -200]
    tensor = tokenizer_image_token("<image>a", tokenizer(), image_token_index=-7, return_tensors="pt")
    assert tensor.dtype == torch.long and tensor.dim() == 1 and tensor[1] == -7
    with pytest.raises(ValueError, match="np"):
        tokenizer_image_token("a", tokenizer(), return_tensors="np")


@pytest.mark.parametrize("with_prompt", [True, False])
@pytest.mark.parametrize(
    ("said", "done"), [("hello there</s>", True), ("hello###", True), ("hello", False), ("a", False)]
)
def test_stops_at_a_keyword(with_prompt, said, done):
    criteria = KeywordsStoppingCriteria(["</s>", "###"], tokenizer(), PROMPT)
    ids = new_ids(said)
    output = torch.cat([PROMPT, ids], dim=1) if with_prompt else ids
    assert criteria(output, None) is done


def test_every_row_must_be_done():
    criteria = KeywordsStoppingCriteria(["</s>"], tokenizer(), PROMPT.repeat(2, 1))
    rows = torch.tensor([[9, 2], [2, 9]])
    assert criteria(rows, None) is False
    assert criteria(torch.tensor([[9, 2], [8, 2]]), None) is True


def test_a_keyword_at_the_prompts_end_does_not_count():
    prompt = torch.cat([PROMPT, new_ids("###")], dim=1)
    criteria = KeywordsStoppingCriteria(["###"], tokenizer(), prompt)
    assert criteria(torch.cat([prompt, torch.tensor([[9]])], dim=1), None) is False
