"""Every named method that drops inside the decoder, as its row of the table sets it: what all of them must hold."""

import pytest
import small
import torch

import duet
from duet import DuetConfig
from duet.calibrate import Calibrator
from duet.methods import METHODS, solve
from duet.stage2 import LANGUAGE_REDUCERS, keep_best

INSIDE = [name for name, method in METHODS.items() if method.schedule or method.solve == "calibrated"]
TOKENS = small.PATCHES // 3  # the share of which 192 is of 576


@pytest.fixture(scope="module")
def model():
    return small.build()


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    single = small.mixed_singles()[0]
    with torch.no_grad():
        embeds = model(**single, output_hidden_states=True).hidden_states[0]
    sample = {"inputs_embeds": embeds, "visual_mask": single["input_ids"] == small.IMAGE_TOKEN}
    calibrator = Calibrator(model.model.language_model, [sample])
    calibrator.search(1 / 3)
    path = tmp_path_factory.mktemp("rows") / "calibration.json"
    calibrator.result().save(path)
    return {"options": {"calibration": str(path)}}


def configured(name, calibration, tokens=TOKENS):
    given = calibration if METHODS[name].solve == "calibrated" else {}
    return solve(name, tokens, small.PATCHES, small.LAYERS, **given)


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_no_sample_looks_at_another(model, calibration, name, side):
    with duet.attach(model, configured(name, calibration)):
        together = model(**small.mixed_batch(side)).logits
        for row, single in enumerate(small.mixed_singles()):
            alone = model(**single).logits[0]
            got = together[row, -len(alone) :] if side == "left" else together[row, : len(alone)]
            assert torch.allclose(got, alone, atol=1e-5)


@pytest.mark.parametrize("name", INSIDE)
@torch.no_grad()
def test_cached_generation_equals_recomputation(model, calibration, name):
    inputs = small.mixed_batch("left")
    with duet.attach(model, configured(name, calibration)):
        cached = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        again = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)


@pytest.mark.parametrize("name", INSIDE)
@torch.no_grad()
def test_the_ledger_says_what_was_planned(model, calibration, name):
    config = configured(name, calibration)
    with duet.attach(model, config), duet.trace() as record:
        out = model(**small.mixed_singles()[0], use_cache=True)
    planned = config.tokens_per_layer(small.PATCHES, small.LAYERS)
    seen = [segment.visual[0] for segment in record.passes[0] for _ in range(segment.stop - segment.start)]
    text = small.mixed_singles()[0]["input_ids"].shape[1] - small.PATCHES
    assert [out.past_key_values.get_seq_length(layer) - text for layer in range(small.LAYERS)] == seen
    if name == "sparsevlm-1.0-release":  # its schedule is the most that may stay
        assert all(now <= most for now, most in zip(seen, planned, strict=True))
        return
    assert seen == planned and record.average_tokens() == config.average_tokens(small.PATCHES, small.LAYERS)
    assert not METHODS[name].meets_budgets or abs(record.average_tokens() - TOKENS) <= 0.5


@pytest.mark.parametrize(
    "name", [name for name in INSIDE if METHODS[name].meets_budgets and METHODS[name].stage1 == "none"]
)
@torch.no_grad()
def test_the_whole_budget_changes_nothing(model, calibration, name):
    single = small.mixed_singles()[0]
    plain = model(**single).logits
    with duet.attach(model, configured(name, calibration, small.PATCHES)):
        assert torch.equal(model(**single).logits, plain)


EDGES = {
    "image at the end": small.prompt(5, 1, 0, 4)[:-1],
    "image at the start": small.prompt(0, 1, 6, 5)[1:],
    "one word": small.prompt(0, 1, 1, 6),
}


@pytest.mark.parametrize("name", INSIDE)
@torch.no_grad()
def test_odd_prompts(model, calibration, name):
    config = configured(name, calibration)
    ids, mask = small.pad(list(EDGES.values()), "left")
    with duet.attach(model, config), duet.trace() as record:
        together = model(input_ids=ids, attention_mask=mask, pixel_values=small.pixels(len(EDGES))).logits
        for row, single in enumerate(EDGES.values()):
            alone = model(
                input_ids=torch.tensor([single]), pixel_values=small.pixels(len(EDGES))[row : row + 1]
            ).logits[0]
            assert alone.isfinite().all() and torch.allclose(together[row, -len(alone) :], alone, atol=1e-5)
    if METHODS[name].solve != "published":
        planned = config.tokens_per_layer(small.PATCHES, small.LAYERS)
        assert [segment.visual for segment in record.passes[0]] == [
            [planned[s.start]] * len(EDGES) for s in record.passes[0]
        ]


def test_ties_go_to_the_lower_index():
    visual = torch.tensor([[False, True, True, True, False], [False, False, True, True, True]])
    score = torch.tensor([[9.0, 1.0, 1.0, 1.0, 9.0], [9.0, 9.0, 1.0, 2.0, 1.0]])
    assert keep_best(score, visual, [2, 2]).nonzero().tolist() == [[0, 1], [0, 2], [1, 2], [1, 3]]
    assert keep_best(score, visual, [0, 3]).sum(1).tolist() == [0, 3]


def modules_that_run(decoder, images, length, rows, config):
    """Names of the decoder's modules in the order in which a training pass runs them."""
    seen, names = [], {module: name for name, module in decoder.named_modules()}
    hooks = [m.register_forward_pre_hook(lambda module, _: seen.append(names[module])) for m in decoder.modules()]
    visual = torch.zeros(rows, length, dtype=torch.bool)
    visual[:, 2 : 2 + images] = True
    embeds = torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(length))
    labels = torch.full((rows, length), -100)
    labels[:, -2:] = 3
    duet.run_decoder(decoder, embeds, visual_mask=visual, labels=labels, config=config)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", LANGUAGE_REDUCERS.names())
@pytest.mark.parametrize("block", [1, 1 << 23])
def test_every_rank_trains_through_the_same_modules(name, block, monkeypatch):
    """With or without images, long or short, in one block of rows or many: ZeRO-3 gathers weights module by module."""
    monkeypatch.setattr("duet.kernels.reference.BLOCK_ELEMENTS", block)
    decoder = small.build().model.language_model.train()
    extremes = [(small.PATCHES, 60, 2), (0, 12, 1), (1, 9, 1)]
    settings = [{}] if name != "sparsevlm" else [{}, {"plus": True}, {"scale": 1.0}]
    for options in settings:
        config = DuetConfig(
            stage1="none", stage2=name, schedule={2: 0.5, 3: 0.25, 4: 0.0}, queries="all", options=options
        )
        runs = [modules_that_run(decoder, *extreme, config) for extreme in extremes]
        assert runs[0] == runs[1] == runs[2] and len(runs[0]) > small.LAYERS
