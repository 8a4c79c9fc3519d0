"""Budgets as shares of the patches, where every picture has the same number of them."""

import torch
from models import CASES

import duet
from duet import DuetConfig


@torch.no_grad()
def test_shares_equal_the_counts_that_they_stand_for():
    case = CASES["llava"]
    model = case.build()
    inputs = case.batch(model)
    found = []
    for dominant, contextual in ((0.25, 0.125), (9, 4)):  # of 36 patches; 4.5 rounds to even
        with duet.attach(model, DuetConfig(dominant=dominant, contextual=contextual, schedule={1: 0.5})) as handle:
            found.append(model(**inputs).logits)
            assert "36 -> 13 visual tokens" in repr(handle)
    assert torch.equal(*found)
