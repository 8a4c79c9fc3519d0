"""A reduced prefill and decoding read nothing back from the device where counts are known; else they look once."""

from functools import partial

import pytest
import small
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import duet
from duet import DuetConfig, encode_vision, run_decoder
from duet.tokens import Counts

LENGTH, VISUAL = 60, slice(8, 44)
WAITS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)


class Lists(TorchFunctionMode):
    """Counts tensors that become lists, which no operator does."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.tolist:
            self.seen.append("tolist")
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts operators whose result, or its size, a device would have to report."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if function in WAITS or masks:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def waits(run):
    """What ``run`` reads back, and what it returns."""
    with Lists() as lists, Waits() as operators:
        out = run()
    return lists.seen + operators.seen, out


def decoder():
    return small.build().model.language_model


def batch(padded=False):
    visual = torch.zeros(2, LENGTH, dtype=torch.bool)
    visual[:, VISUAL] = True
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :3] = 0 if padded else 1
    return torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(0)), visual, mask


COUNTS = Counts([LENGTH] * 2, [36, 36])


def test_the_watcher_sees_every_way_to_look():
    x = torch.arange(3)
    looks = (x.sum().item, x.tolist, lambda: bool(x.any()), lambda: int(x.max()), x.nonzero, lambda: x[x > 1])
    assert [len(waits(look)[0]) for look in looks] == [1] * len(looks)
    assert not waits((x * 2).sum)[0]


@pytest.mark.parametrize(("known", "looks"), [(COUNTS, 0), (None, 1)])
@pytest.mark.parametrize("with_mask", [False, True])
def test_prefill_and_decoding(known, looks, with_mask):
    model, config = decoder(), DuetConfig(stage1="none", schedule={2: 0.5, 4: 0.0})
    embeds, visual, mask = batch()
    mask = mask if with_mask else None
    step = partial(run_decoder, model, config=config, use_cache=True)
    seen, out = waits(partial(step, embeds, visual_mask=visual, attention_mask=mask, counts=known))
    assert len(seen) == looks, seen
    cache = out.past_key_values
    assert cache.get_seq_length(2) == LENGTH - 18, "the prefill was reduced"

    for _ in range(2):
        assert not waits(partial(step, embeds[:, :1], past_key_values=cache))[0]


@pytest.mark.parametrize("queries", ["all", "salient"])
def test_rows_that_only_the_batch_knows_cost_one_look(queries):
    model, config = decoder(), DuetConfig(stage1="none", schedule={2: 0.5, 4: 0.25}, queries=queries)
    embeds, visual, _ = batch()
    seen, _ = waits(partial(run_decoder, model, embeds, visual_mask=visual, config=config, counts=COUNTS))
    assert len(seen) == 1, seen


@pytest.mark.parametrize("padded", [False, True])
def test_known_counts_change_nothing(padded):
    model, config = decoder(), DuetConfig(stage1="none", schedule={2: 0.5, 4: 0.0})
    embeds, visual, mask = batch(padded)
    counts = Counts([LENGTH, LENGTH - 3], [36, 36], left_padded=True) if padded else COUNTS
    with torch.no_grad():
        read, told = (
            run_decoder(model, embeds, visual_mask=visual, attention_mask=mask, config=config, counts=c)
            for c in (None, counts)
        )
    assert torch.equal(read.last_hidden_state, told.last_hidden_state)
    assert (read.attention_mask is None) == (told.attention_mask is None) == (not padded)


@pytest.mark.parametrize("sample", [0, 2])
def test_a_model_looks_at_its_prompt_before_the_tower_and_never_after(sample):
    model = small.build()
    inputs = small.mixed_singles()[sample]
    with duet.attach(model, DuetConfig(dominant=9, contextual=3, schedule={2: 0.5, 4: 0.0})):
        seen, out = waits(partial(model, **inputs, use_cache=True))
        after, _ = waits(partial(model, input_ids=inputs["input_ids"][:, :1], past_key_values=out.past_key_values))
    assert seen == ["tolist"] and not after, (seen, after)


@pytest.mark.parametrize("options", [{}, {"stage1": "fastervlm"}])
def test_the_tower_and_stage_1(options):
    tower = small.build().model.vision_tower
    config = DuetConfig(dominant=9, contextual=3, schedule={}, **options)
    pixels = small.pixels(2)
    assert not waits(partial(encode_vision, tower, pixels, config=config))[0]
