"""What the released code for Qwen does in the decoder, by name: attention without a causal mask, and its counts."""

import math

import pytest
import small
import torch

import duet
from duet import DuetConfig, run_decoder


def visual_counts(entering, schedule, layers, **options):
    decoder = small.build().model.language_model
    visual = torch.zeros(1, entering + 8, dtype=torch.bool)
    visual[:, 3 : 3 + entering] = True
    embeds = torch.randn(1, entering + 8, 32, generator=torch.Generator().manual_seed(0))
    config = DuetConfig(stage1="none", schedule=schedule, queries="all", positions="original", options=options)
    with duet.trace() as record, torch.no_grad():
        run_decoder(decoder, embeds, visual_mask=visual, config=config)
    return [segment.visual[0] for segment in record.passes[0]]


@pytest.mark.parametrize(
    ("schedule", "right", "released"),
    [
        ({2: 0.5, 4: 0.25}, [64, 32, 16], [64, 32, 24]),  # 640, 320, 240 in the release
        ({2: 0.75, 3: 0.5, 4: 0.25}, [64, 48, 32, 16], [64, 48, 36, 30]),
    ],
)
def test_counts(schedule, right, released):
    assert visual_counts(64, schedule, 6) == right
    assert visual_counts(64, schedule, 6, recount=True) == released


@torch.no_grad()
def test_the_first_of_the_tokens_are_looked_at():
    model, single = small.build(), small.mixed_singles()[0]
    schedule = {2: 0.5, 4: 0.25}
    config = DuetConfig(stage1="none", schedule=schedule, options={"recount": True})
    with duet.attach(model, config), duet.trace() as record:
        model(**single)
    kept = record.images[0].kept_after
    assert len(kept[2]) == 18 and len(kept[4]) == 4 + 9
    assert set(kept[4]) >= set(kept[2][9:])  # the second half was taken for text


@torch.no_grad()
def test_rows_without_a_causal_mask_see_later_text():
    model, single = small.build(), small.mixed_singles()[0]
    hidden = model(**single, output_hidden_states=True).hidden_states[2][0]
    decoder = model.model.language_model
    block = decoder.layers[2]
    normed = block.input_layernorm(hidden)
    cos, sin = (table[0] for table in decoder.rotary_emb(hidden[None], torch.arange(len(hidden))[None]))
    turn = lambda x: x * cos + torch.cat((-x[:, 4:], x[:, :4]), 1) * sin  # noqa: E731
    query, key = block.self_attn.q_proj(normed), block.self_attn.k_proj(normed)
    visual = (single["input_ids"][0] == small.IMAGE_TOKEN).nonzero()[:, 0].tolist()
    rows = range(visual[-1] + 1, len(hidden))
    received = 0
    for head in range(4):
        q, k = turn(query[:, 8 * head : 8 * head + 8]), turn(key[:, 8 * (head // 2) : 8 * (head // 2) + 8])
        received = received + (q[rows] @ k.T / math.sqrt(8)).softmax(-1).sum(0)
    best = sorted(range(36), key=lambda i: (-float(received[visual[i]]), i))[:18]
    for causal in (True, False):
        config = DuetConfig(stage1="none", schedule={2: 0.5}, queries="all", options={"causal": causal})
        with duet.attach(model, config), duet.trace() as record:
            model(**single)
        assert (record.images[0].kept_after[2] == sorted(best)) is not causal


@torch.no_grad()
def test_answers_do_not_matter():
    model, inputs = small.build(), small.mixed_batch("left")
    options = {"causal": False, "recount": True}
    with duet.attach(model, DuetConfig(stage1="none", schedule={2: 0.5, 4: 0.25}, queries="all", options=options)):
        cached = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        again = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)
