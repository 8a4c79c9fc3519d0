"""Every vision reducer works in every family, or says why not; signals of units equal those of a full attention map."""

import pytest
import torch
from models import CASES

import duet
from duet import DuetConfig
from duet.families.internvl import _clip_like, _joined
from duet.families.passes import UnitSignals, View
from duet.stage1 import VISION_REDUCERS
from duet.vision import run_tower


@torch.no_grad()
@pytest.mark.parametrize("family", list(CASES))
@pytest.mark.parametrize("stage1", VISION_REDUCERS.names())
def test_reducers_in_families(stage1, family):
    case = CASES[family]
    model = case.build()
    config = DuetConfig(dominant=4, contextual=2, cluster_width=2, stage1=stage1, schedule={2: 0.5})
    try:
        handle = duet.attach(model, config)
        with duet.trace() as record:
            batch = model(**case.batch(model)).logits
    except ValueError as error:
        assert stage1 in str(error) or "class token" in str(error) or "vision layer" in str(error)
        return
    assert batch.isfinite().all()
    entering, passes = record.passes[0][0].visual, [n // case.config.entering for n in case.entering.values()]
    if stage1 == "hired":  # what it spends on padding is lost
        assert all(
            found <= 6 * count and (found > 0) == (count > 0) for found, count in zip(entering, passes, strict=True)
        )
    elif not config.adaptive:
        assert entering == [6 * count for count in passes]
    for row, single in enumerate(case.singles(model)):
        alone = model(**single).logits[0]
        assert (batch[row, -len(alone) :] - alone).abs().max() <= 1e-5
    handle.model.eval()


def attention_of(model, family, pixels):
    """Attention probabilities of the block that ranks, [T, H, M, M], as the tower itself computes them."""
    found = {}
    tower = model.model.vision_tower
    blocks = tower.encoder.layer if family == "internvl" else tower.encoder.layers
    block = blocks[-1 if family in ("internvl", "llava_onevision") else -2]
    attention = block.attention if family == "internvl" else block.self_attn
    hook = attention.register_forward_hook(lambda module, args, out: found.update(probabilities=out[1]))
    tower(pixels)
    hook.remove()
    return found["probabilities"]


@torch.no_grad()
@pytest.mark.parametrize("family", ["internvl", "llava_onevision", "llava_next"])
def test_signals_of_units_are_means_over_a_dense_map(family):
    model = CASES[family].build(attention="eager")
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    first = int(family != "llava_onevision")
    dense = attention_of(model, family, pixels).mean(1)[:, first:]  # rows of patches
    tower = _clip_like(model.model.vision_tower) if family == "internvl" else model.model.vision_tower
    output = run_tower(tower, pixels, -2 if family == "llava_next" else -1)
    view = {
        "internvl": lambda: _joined(model),
        "llava_onevision": lambda: View.weighted(torch.rand(5, 36).softmax(1), (1, 5)),
        "llava_next": lambda: View.rectangle((6, 6), range(1, 4), range(2, 6)),
    }[family]()
    weights = torch.zeros(len(view.units), 36)
    weights.scatter_(1, view.units, torch.ones(view.units.shape) if view.weights is None else view.weights)
    signals = UnitSignals(output.signals, view, class_token=False)
    assert torch.allclose(signals.column_mass(), dense.mean(1)[:, first:] @ weights.t(), atol=1e-6)
    chosen = torch.tensor([[3, 0], [1, 2]])
    rows = weights[chosen] @ dense[:, :, first:] @ weights.t()
    assert torch.allclose(torch.cat(list(signals.rows(chosen)), 1), rows, atol=1e-6)
    keys = output.signals.key_metric()[:, first:]
    assert torch.allclose(signals.key_metric(), weights @ keys, atol=1e-5)


def test_units_of_internvl_are_squares():
    view = _joined(CASES["internvl"].build())
    squares = {tuple(sorted(unit)) for unit in view.units.tolist()}
    wanted = {(a, a + 1, a + 6, a + 7) for row in (0, 2, 4) for a in (6 * row, 6 * row + 2, 6 * row + 4)}
    assert squares == wanted and view.grid == (3, 3)


@torch.no_grad()
@pytest.mark.parametrize("family", ["internvl", "llava_onevision", "llava_next_video"])
def test_kept_units_are_the_most_attended_ones(family):
    """What stays of a frame is what a dense map ranks first, as the host pools it."""
    case = CASES[family]
    model = case.build(attention="eager")
    kind = "image" if family == "internvl" else "video"
    inputs = case.inputs(model, [(2, [(kind, (24, 24) if kind == "image" else 3)], 4)])
    pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values")).flatten(0, -4)
    first = int(family != "llava_onevision")
    mass = attention_of(model, family, pixels).mean(1)[:, first:, first:].mean(1)
    if family == "llava_onevision":
        pooled = torch.nn.functional.interpolate(mass.view(-1, 1, 6, 6), size=[3, 3], mode="bilinear").flatten(1)
    else:
        pooled = torch.nn.functional.avg_pool2d(mass.view(-1, 1, 6, 6), 2).flatten(1)
    best = pooled.topk(4).indices.sort(1).values
    host = model.model
    whole = host.get_image_features(pixels) if kind == "image" else host.get_video_features(pixels[None])
    units = torch.stack(list(whole.pooler_output)).flatten(0, -2)[: 9 * len(pixels)].view(len(pixels), 9, -1)
    with duet.attach(model, DuetConfig(dominant=4, contextual=0, schedule={})):
        out = model(**inputs)
    wanted = units.gather(1, best.unsqueeze(-1).expand(-1, -1, units.shape[-1])).flatten(0, 1)
    seen = out.image_hidden_states if kind == "image" else out.video_hidden_states
    assert torch.allclose(seen, wanted, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["video_llava", "llava_onevision", "llava_next_video"])
def test_a_long_video_goes_through_the_tower_a_few_frames_at_a_time(family, monkeypatch):
    case = CASES[family]
    model = case.build()
    inputs = case.inputs(model, [(2, [("video", 40)], 4)])
    sizes = []
    tower = model.model.video_tower if family == "video_llava" else model.model.vision_tower
    tower.encoder.layers[0].register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    with duet.attach(model, case.config):
        chunked = model(**inputs).logits
        assert sizes == [16, 16, 8]
        monkeypatch.setattr("duet.families.passes._PASSES_AT_ONCE", 40)
        assert torch.allclose(model(**inputs).logits, chunked, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage1": "tome", "dominant": 4}, "one token stands for several patches"),
        ({"stage1": "tome", "per": "picture"}, "use per='pass'"),
        ({"per": "picture", "dominant": 2}, "cannot be shared by its 3 tower passes"),
    ],
)
def test_what_cannot_work_on_frames_says_so(changes, message):
    case = CASES["llava_next_video"]
    model = case.build()
    inputs = case.inputs(model, [(2, [("video", 3)], 4)])
    values = {"dominant": 9, "contextual": 3, "schedule": {}} | changes
    with duet.attach(model, DuetConfig(**values)), pytest.raises(ValueError, match=message):
        model(**inputs)
