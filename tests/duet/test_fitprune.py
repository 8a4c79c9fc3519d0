"""FitPrune's ranking and calibration against slow loops written from its description."""

import json
import math

import pytest
import small
import torch

import duet
from duet import DuetConfig
from duet.budget import average_tokens
from duet.calibrate import (
    Calibration,
    Calibrator,
    Curve,
    _spared,
    published_schedule,
    read_calibration,
    schedule_for,
)
from duet.signals import DecoderSignals

SCHEDULE = {1: 30.5 / 36, 2: 20.5 / 36, 3: 12.5 / 36, 5: 5.5 / 36}


@pytest.fixture(scope="module")
def model():
    return small.build()


def maps(block, normed, rotary):
    """All probabilities of one attention layer, [H, L, L], head by head."""
    cos, sin = (table[0] for table in rotary)
    turn = lambda x: x * cos + torch.cat((-x[:, 4:], x[:, :4]), 1) * sin  # noqa: E731
    query, key = block.q_proj(normed), block.k_proj(normed)
    heads = []
    for head in range(4):
        q, k = turn(query[:, 8 * head : 8 * head + 8]), turn(key[:, 8 * (head // 2) : 8 * (head // 2) + 8])
        causal = torch.ones(len(q), len(q)).tril().bool()
        heads.append((q @ k.T / 8**0.5).masked_fill(~causal, -math.inf).softmax(-1))
    return torch.stack(heads)


class Slow:
    """One prompt of the small model, layer by layer, with removal between attention and MLP as published."""

    def __init__(self, model, single):
        self.decoder = model.model.language_model
        self.head = model.lm_head
        with torch.no_grad():
            self.hidden = model(**single, output_hidden_states=True).hidden_states[0][0]
        ids = single["input_ids"][0].tolist()
        self.visual = [token == small.IMAGE_TOKEN for token in ids]
        self.text = [not image and i > self.visual.index(True) for i, image in enumerate(self.visual)]
        self.positions = list(range(len(ids)))

    @torch.no_grad()
    def layer(self, number, choose):
        """Run a layer; ``choose(self_masses, cross_masses) -> places among the visual tokens that leave``."""
        block = self.decoder.layers[number]
        rotary = self.decoder.rotary_emb(self.hidden[None], torch.tensor([self.positions]))
        normed = block.input_layernorm(self.hidden)
        most = maps(block.self_attn, normed, rotary).amax(0)
        images = [i for i, flag in enumerate(self.visual) if flag]
        words = [i for i, flag in enumerate(self.text) if flag]
        own = [sum(float(most[j, i]) for j in images) / max(1, len(images)) for i in images]
        cross = [sum(float(most[j, i]) for j in words) / len(words) for i in images]
        attended, _ = block.self_attn(normed[None], position_embeddings=rotary, attention_mask=None)
        residual = self.hidden + attended[0]
        gone = {images[place] for place in choose(own, cross)} if number < small.LAYERS - 1 else set()
        left = [i for i in range(len(residual)) if i not in gone]
        residual = residual[left]
        self.hidden = residual + block.mlp(block.post_attention_layernorm(residual))
        self.visual, self.text, self.positions = (
            [values[i] for i in left] for values in (self.visual, self.text, self.positions)
        )
        return own, cross, len(gone)


@torch.no_grad()
def test_ranking_equals_the_slow_loop(model):
    single = small.mixed_singles()[0]
    slow = Slow(model, single)
    for number in range(small.LAYERS):
        left = math.floor(SCHEDULE[number + 1] * 36) if number + 1 in SCHEDULE else sum(slow.visual)

        def smallest(own, cross, left=left):
            order = sorted(range(len(own)), key=lambda i: (-own[i] * cross[i], i))
            return order[left:]

        slow.layer(number, smallest)
    wanted = slow.head(slow.decoder.norm(slow.hidden))
    config = DuetConfig(stage1="none", stage2="fitprune", schedule=SCHEDULE, positions="original")
    with duet.attach(model, config):
        got = model(**single).logits[0]
    assert got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("block", [1, 1 << 23])
@torch.no_grad()
def test_head_maxima_are_summed_in_blocks(model, monkeypatch, block):
    """Grouped heads and padding; the smallest block is a single row."""
    monkeypatch.setattr("duet.kernels.reference.BLOCK_ELEMENTS", block)
    decoder = model.model.language_model
    layer, hidden = decoder.layers[0], torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 9:] = False
    rotary = decoder.rotary_emb(hidden, torch.arange(12)[None])
    rows = torch.tensor([[2, 5, 11], [3, 8, 0]])
    counted = torch.tensor([[True, True, True], [True, True, False]])
    got = DecoderSignals(layer, hidden, rotary, valid).largest_received(rows, counted)
    for row, (length, places) in enumerate(((12, [2, 5, 11]), (9, [3, 8]))):
        dense = maps(layer.self_attn, layer.input_layernorm(hidden[row, :length]), [t[:, :length] for t in rotary])
        assert torch.allclose(got[row, :length], dense.amax(0)[places].sum(0), atol=1e-5)


# --- calibration -----------------------------------------------------------------------------------------------------


def prompt(model, single):
    with torch.no_grad():
        embeds = model(**single, output_hidden_states=True).hidden_states[0]
    return {"inputs_embeds": embeds, "visual_mask": single["input_ids"] == small.IMAGE_TOKEN}


def spared(mass, alpha, whole):
    """The longest prefix of ascending masses, by trying."""
    order = sorted(range(len(mass)), key=lambda i: (mass[i], i))
    best = 0
    for count in range(len(mass) + 1):
        if sum(mass[i] for i in order[count:]) >= (1 - alpha) * whole:
            best = count
    return set(order[:best])


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_a_curve_equals_the_slow_loop(model, alpha):
    singles = [small.mixed_singles()[0], small.mixed_singles()[2], small.mixed_singles()[1]]
    calibrator = Calibrator(model.model.language_model, [prompt(model, single) for single in singles])
    removed = []
    for single in singles[:2]:
        full = Slow(model, single)
        entering = sum(full.visual)
        totals = []
        for number in range(small.LAYERS):
            own, cross, _ = full.layer(number, lambda own, cross: ())
            totals.append((sum(own), sum(cross)))
        pruned, counts = Slow(model, single), []
        for number in range(small.LAYERS):
            whole = totals[number]
            both = lambda own, cross, w=whole: spared(own, alpha, w[0]) & spared(cross, alpha, w[1])  # noqa: E731
            counts.append(pruned.layer(number, both)[2] / entering)
        removed.append(counts[:-1])
    wanted = [sum(column) / 2 for column in zip(*removed, strict=True)]
    assert calibrator.curve(alpha).removed == pytest.approx(wanted, abs=1e-6) and sum(wanted) > 0
    assert calibrator.result().samples == 2  # a prompt without an image says nothing


def test_a_search_stops_at_the_smallest_alpha(model):
    calibrator = Calibrator(model.model.language_model, [prompt(model, small.mixed_singles()[0])])
    found = calibrator.search(0.5)
    assert found.average() <= 0.5 < calibrator.curve(found.alpha - 2**-7).average()
    curves = calibrator.result().curves
    assert [curve.alpha for curve in curves] == sorted(curve.alpha for curve in curves) and len(curves) >= 7


@torch.no_grad()
def test_a_schedule_made_from_a_calibration_is_what_the_decoder_does(model):
    calibrator = Calibrator(model.model.language_model, [prompt(model, small.mixed_singles()[0])])
    calibrator.search(1 / 3)
    schedule = schedule_for(calibrator.result(), 36, 12)
    config = DuetConfig(stage1="none", stage2="fitprune", schedule=schedule, positions="original")
    with duet.attach(model, config), duet.trace() as record:
        model(**small.mixed_singles()[0])
    assert abs(record.average_tokens() - 12) <= 0.5
    assert record.average_tokens() == config.average_tokens(36, small.LAYERS)


MEASURED = Calibration(
    layers=8, width=64, mlp_width=128, samples=3,
    curves=(Curve(0.25, (0.1, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0)), Curve(0.5, (0.4, 0.2, 0.2, 0.1, 0.0, 0.0, 0.0))),
)  # fmt: skip


@pytest.mark.parametrize("tokens", [576, 550, 400, 300, 200, 192, 128, 90, 72])
def test_any_budget_is_met(tokens):
    schedule = schedule_for(MEASURED, 576, tokens)
    assert abs(average_tokens(576, schedule, 8) - tokens) <= 0.5
    assert list(schedule.values()) == sorted(schedule.values(), reverse=True)


def test_a_measured_average_gives_the_measured_counts():
    assert MEASURED.for_average(MEASURED.curves[1].average()).removed == pytest.approx(MEASURED.curves[1].removed)
    least = schedule_for(MEASURED, 576, 10)  # the first layer alone costs 72
    assert average_tokens(576, least, 8) == 72


def flops(counts):
    return sum(
        4 * n * 64**2 + 2 * n * n * 64 + 3 * left * 64 * 128
        for n, left in zip(counts, [*counts[1:], counts[-1]], strict=True)
    )


def test_flops_as_published():
    """Multiply-adds of visual tokens: attention on what enters a layer, the MLP on what it leaves."""
    curve = MEASURED.for_flops(0.5, 576)
    counts = [576 * share for share in curve.left()]
    before = [576 * share for share in MEASURED.for_alpha(curve.alpha - 0.01).left()]
    assert flops(counts) <= 0.5 * flops([576] * 8) < flops(before)
    floors, left = [576], 576
    for share in curve.removed:
        left -= math.floor(share * 576 + 1e-6)
        floors.append(left)
    config = DuetConfig(stage1="none", stage2="fitprune", schedule=published_schedule(MEASURED, 576, 0.5))
    assert config.tokens_per_layer(576, 8) == floors


def test_spared_tokens():
    mass = torch.tensor([0.4, 0.1, 0.3, 0.1, 0.1])
    assert _spared(mass, 0.0, 1.0).sum() == 0
    assert _spared(mass, 0.25, 1.0).tolist() == [False, True, False, True, False]  # ties to the lower index
    assert _spared(mass, 1.0, 1.0).all()
    assert _spared(mass, 0.5, 2.1).sum() == 0  # less than the whole is there already


def test_the_file_round_trips_and_is_checked(tmp_path):
    path = tmp_path / "calibration.json"
    MEASURED.save(path)
    assert read_calibration(path) == MEASURED
    broken = json.loads(path.read_text())
    cases = {
        "another format": broken | {"format": "x"},
        "another number of layers": broken | {"layers": 9},
        "unexpected": broken | {"unexpected": 1},
        "format": {},
    }
    for message, values in cases.items():
        path.write_text(json.dumps(values))
        with pytest.raises(
            ValueError, match=f"calibration.json is no calibration of the format duet-fitprune-1.*{message}"
        ):
            read_calibration(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no calibration"):
        read_calibration(path)
    with pytest.raises(ValueError, match=r"nowhere\.json cannot be read: No such file"):
        read_calibration(tmp_path / "nowhere.json")


def test_nothing_to_calibrate(model):
    with pytest.raises(ValueError, match="1 prompts, none with an image"):
        Calibrator(model.model.language_model, [prompt(model, small.mixed_singles()[1])])
