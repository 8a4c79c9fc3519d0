"""What every model family must do. Its models are in models.py; a new family is one more entry there."""

import pytest
import torch
from models import CASES, LAYERS
from qwen_models import CASES as QWEN

import duet
from duet import DuetConfig
from duet.budget import tokens_per_layer

ALL = CASES | QWEN
TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(params=list(ALL))
def case(request):
    return ALL[request.param]


@pytest.fixture
def model(case):
    return case.build()


def positions(inputs):
    """Inputs with the positions that ``generate`` would give."""
    if "mm_token_type_ids" in inputs:  # several axes; the model makes them
        return inputs
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def snapshot(model):
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    classes = {name: type(module) for name, module in model.named_modules()}
    return list(model.state_dict()), keys, classes, model.config.to_dict()


def labelled(inputs):
    """Inputs with the last text tokens of each sample as labels."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    from_end = mask.flip(1).cumsum(1).flip(1)
    return inputs | {"labels": ids.masked_fill(~mask | (from_end > 3), -100)}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_noop_is_bit_identical(case, model, side):
    inputs = positions(case.batch(model, side))
    valid = inputs["attention_mask"].bool()
    plain = model(**inputs).logits[valid]
    for config in case.noops:
        with duet.attach(model, config):
            assert torch.equal(model(**inputs).logits[valid], plain), config


@torch.no_grad()
def test_detach_is_exact(case, model):
    inputs = case.batch(model)
    plain = model(**inputs).logits
    before = snapshot(model)
    handle = duet.attach(model, case.config)
    assert type(model).__name__ in repr(handle)
    assert list(model.state_dict()) == before[0]
    assert model(**inputs).logits.shape[1] < plain.shape[1]
    duet.detach(model)
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("stage1", [True, False])
def test_budgets_per_layer(case, model, stage1):
    inputs = case.batch(model)
    entering = case.entering.values()
    config = case.config
    if not stage1:
        config = DuetConfig(stage1="none", schedule=config.schedule)
        ids = inputs["input_ids"]
        marks = [getattr(model.config, name, -1) for name in ("image_token_id", "video_token_id")]
        entering = torch.isin(ids, torch.tensor(marks)).sum(1).tolist()
    wanted = [tokens_per_layer(n, config.schedule, LAYERS) for n in entering]
    with duet.attach(model, config), duet.trace() as record:
        model(**inputs)
    (segments,) = record.passes
    seen = [[s.visual[row] for s in segments for _ in range(s.start, s.stop)] for row in range(len(wanted))]
    assert seen == wanted
    assert sum(len(image.source) for image in record.images) == sum(entering)
    kept = [sum(len(image.kept_after[layer]) for image in record.images) for layer in config.schedule]
    assert kept == [sum(row[layer] for row in wanted) for layer in config.schedule]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_mixed_samples_equals_single_ones(case, model, side):
    with duet.attach(model, case.config):
        out = model(**case.batch(model, side)).logits
        for row, single in enumerate(case.singles(model)):
            alone = model(**single).logits[0]
            mine = out[row, -len(alone) :] if side == "left" else out[row, : len(alone)]
            assert (mine - alone).abs().max() <= TOLERANCE, list(case.samples)[row]


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"do_sample": True, "temperature": 0.8}, {"num_beams": 3}])
def test_cached_equals_recomputed_decoding(case, model, how):
    inputs = case.batch(model) | {"max_new_tokens": 6, "do_sample": False} | how
    with duet.attach(model, case.config):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            found.append(model.generate(**inputs, use_cache=use_cache))
    assert torch.equal(*found)
    assert found[0].shape[1] == inputs["input_ids"].shape[1] + 6


@torch.no_grad()
def test_noop_generates_the_same_tokens(case, model):
    some = [case.samples["one image"], case.samples["text only"]]  # older hosts mix up several images under beams
    for inputs, beams in ((case.batch(model), 1), (case.inputs(model, some), 2)):
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        plain = model.generate(**inputs, **options)
        with duet.attach(model, case.noops[-1]):
            assert torch.equal(model.generate(**inputs, **options), plain)


def test_a_training_step_reaches_projector_and_language_model(case, model):
    model.train()
    with duet.attach(model, case.config):
        loss = model(**labelled(case.batch(model, "right"))).loss
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert torch.isfinite(loss) and all(g.isfinite().all() for g in grads.values())
    for part in ("language_model.layers.0.", f"language_model.layers.{LAYERS - 1}.", *case.projectors):
        mine = [g for name, g in grads.items() if part in name]
        assert mine and sum(g.abs().sum() for g in mine) > 0, part


@pytest.mark.parametrize("count", [None, 7])
def test_without_logits_the_loss_is_the_same(case, model, count):
    inputs = labelled(case.batch(model, "right")) | ({} if count is None else {"num_items_in_batch": count})
    duet.attach(model.train(), case.config)
    gradients = []
    for skip in (False, True):
        model.zero_grad()
        out = model(**inputs, skip_logits=skip)
        assert (out.logits is None) == skip
        out.loss.backward()
        gradients.append([out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for usual, short in zip(*gradients, strict=True):
        assert torch.allclose(usual, short, atol=1e-6, rtol=1e-4)


def test_lora_and_gradient_checkpointing_give_the_same_loss(case):
    peft = pytest.importorskip("peft", reason="peft is an optional extra (train)")
    losses, grads = [], []
    for change in ("nothing", "checkpointing", "lora"):
        model = case.build().train()
        inputs = labelled(case.batch(model, "right"))
        if change == "checkpointing":
            model.gradient_checkpointing_enable()
        duet.attach(model, case.config)
        wrapped = model
        if change == "lora":
            wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*(q|v)_proj"))
        out = wrapped(**inputs)
        out.loss.backward()
        losses.append(out.loss.item())
        grads.append({n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad and p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], abs=1e-6) and losses[2] == pytest.approx(losses[0], abs=1e-6)
    assert grads[1].keys() == grads[0].keys()
    assert all(torch.allclose(grads[1][name], grads[0][name], atol=1e-6) for name in grads[0])
    adapters = [g for name, g in grads[2].items() if "lora_B" in name]
    assert adapters and all(g.isfinite().all() and g.abs().sum() > 0 for g in adapters)


@torch.no_grad()
def test_save_and_load_keep_the_configuration(case, model, tmp_path):
    inputs = case.batch(model)
    with duet.attach(model, case.config):
        model.save_pretrained(tmp_path)
        wanted = model(**inputs).logits
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert loaded.config.architectures == [type(model).__name__]
    handle = duet.attach(loaded)
    assert handle.config == case.config.for_depth(LAYERS)
    assert torch.allclose(loaded(**inputs).logits, wanted, atol=TOLERANCE)


@torch.no_grad()
def test_bfloat16(case, model):
    inputs = case.batch(model)
    model.bfloat16()
    with duet.attach(model, case.config):
        logits = model(**inputs).logits
        assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2
