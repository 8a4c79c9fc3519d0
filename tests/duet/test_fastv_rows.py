"""FastV with the last row, and with the mean over every row, which SparseVLM's authors compared with."""

import pytest
import small
import torch

import duet
from duet import DuetConfig
from duet.methods import solve


@pytest.mark.parametrize("rows", ["queries", "every"])
@torch.no_grad()
def test_rows_that_rank(rows):
    model, single = small.build(), small.mixed_singles()[0]
    maps = small.build(attention="eager")(**single, output_attentions=True).attentions[0][0]
    visual = (single["input_ids"][0] == small.IMAGE_TOKEN).nonzero()[:, 0].tolist()
    received = maps.mean(0)[-1] if rows == "queries" else maps.mean(0).mean(0)
    best = sorted(range(36), key=lambda i: (-float(received[visual[i]]), i))[:10]
    config = DuetConfig(stage1="none", stage2="fastv", schedule={1: 10.5 / 36}, options={"rows": rows})
    with duet.attach(model, config), duet.trace() as record:
        model(**single)
    assert record.images[0].kept_after[1] == sorted(best)


@torch.no_grad()
def test_every_row_leaves_answers_out():
    model, single = small.build(), small.mixed_singles()[0]
    config = solve("fastv-all", 12, 36, small.LAYERS)
    assert config.positions == "original" and config.option("rows") == "every"
    with duet.attach(model, config):
        cached = model.generate(**single, max_new_tokens=6, do_sample=False)
        again = model.generate(**single, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)
