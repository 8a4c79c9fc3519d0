"""Qwen2.5-VL, Qwen2-VL and Qwen3-VL attached: off means off, batches equal single samples, caches equal no caches."""

import copy
import inspect

import pytest
import qwen_models as qwen
import torch

import duet
from duet import DuetConfig

CONFIG = DuetConfig(dominant=4, contextual=2, cluster_width=3, schedule={1: 0.5, 3: 0.0})
SHARES = DuetConfig(dominant=0.5, contextual=0.125, schedule={2: 0.5}, queries="all", variant="release")
NOOPS = {
    "none": DuetConfig.none(),
    "more than there is": DuetConfig(dominant=500, contextual=20, schedule={}),
    "all of it": DuetConfig(dominant=1.0, contextual=0, schedule={1: 1.0, 3: 1.0}, queries="all"),
    "ratio 1": DuetConfig(stage1="none", schedule={2: 1.0}),
}


@pytest.fixture(params=qwen.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return qwen.build(family)


def loss_of(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= qwen.IMAGE, -100)
    labels[:, :-4] = -100
    return model(**inputs, labels=labels).loss


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_configuration_that_removes_nothing_is_bit_identical(model, family, side):
    inputs = qwen.mixed_batch(family, side)
    plain = model(**inputs).logits
    valid = inputs["attention_mask"].bool()
    for name, config in NOOPS.items():
        with duet.attach(model, config):
            assert torch.equal(plain[valid], model(**inputs).logits[valid]), name


@torch.no_grad()
def test_without_reduction_generate_gives_the_same_tokens(model, family):
    inputs = qwen.mixed_batch(family)
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    for name in ("none", "all of it"):
        with duet.attach(model, NOOPS[name]):
            assert torch.equal(plain, model.generate(**inputs, max_new_tokens=6, do_sample=False)), name


@torch.no_grad()
def test_detach_is_exact_and_a_second_instance_never_feels_it(model, family):
    other, inputs = qwen.build(family), qwen.mixed_batch(family)
    plain = model(**inputs).logits
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    stored, keys = model.config.to_dict(), list(model.state_dict())
    handle = duet.attach(model, CONFIG)
    assert "4 + 2 visual tokens per frame" in repr(handle)
    assert model(**inputs).logits.shape[1] < plain.shape[1]
    assert torch.equal(other(**inputs).logits, plain)
    assert list(model.state_dict()) == keys
    duet.detach(model)
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == before
    assert model.config.to_dict() == stored
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_every_layer_sees_what_the_budget_says(model, family):
    inputs = qwen.mixed_batch(family)
    with duet.attach(model, CONFIG), duet.trace() as trace:
        model(**inputs)
    seen = [(part.start, part.stop, part.visual) for part in trace.passes[0]]
    entering = [6, 0, 6 + 6, 3 * 6, 3 * 6 + 6]  # six of each image and of each frame
    assert seen == [(0, 1, entering), (1, 3, [n // 2 for n in entering]), (3, 4, [0] * 5)]


@torch.no_grad()
def test_shares_are_of_each_frame(model, family):
    with duet.attach(model, SHARES), duet.trace() as trace:
        model(**qwen.mixed_batch(family))
    one, small, tall, clip = 12 + 3, 3 + 1, 8 + 2, 6 + 2  # round(0.5 N) + round(0.125 N), halves to even
    assert trace.passes[0][0].visual == [one, 0, small + tall, 3 * clip, 3 * clip + tall]


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, SHARES], ids=["counts", "shares"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_samples_alone(model, family, side, config):
    inputs = qwen.mixed_batch(family, side)
    with duet.attach(model, config):
        together = model(**inputs)
        for row, single in enumerate(qwen.mixed_singles(family)):
            alone = model(**single).logits[0]
            mine = together.logits[row]
            mine = mine[-len(alone) :] if side == "left" else mine[: len(alone)]
            assert torch.allclose(mine, alone, atol=1e-5, rtol=1e-5), (row, (mine - alone).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("positions", ["auto", "compact"])
@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"do_sample": True, "top_k": 20}, {"do_sample": False, "num_beams": 3}],
    ids=["greedy", "sampling", "beams"],
)
def test_cached_decoding_equals_recomputing(model, family, how, positions):
    inputs = qwen.mixed_batch(family)
    config = DuetConfig(dominant=4, contextual=2, schedule={1: 0.5, 3: 0.0}, positions=positions)
    with duet.attach(model, config):
        torch.manual_seed(3)
        cached = model.generate(**inputs, max_new_tokens=6, **how)
        torch.manual_seed(3)
        assert torch.equal(cached, model.generate(**inputs, max_new_tokens=6, use_cache=False, **how))


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_step_by_hand_stands_where_the_rope_index_puts_it(model, family, positions):
    """The host's positions of prompt and answer decide; a video's last time stamp lies beyond them in Qwen2.5-VL."""
    config = DuetConfig(dominant=4, contextual=2, schedule={1: 0.5}, positions=positions)
    for sample in qwen.SAMPLES.values():
        inputs = qwen.make_inputs(family, [sample])
        answer = torch.tensor([[17, 23]])
        longer = inputs | {
            "input_ids": torch.cat((inputs["input_ids"], answer), 1),
            "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 2, dtype=torch.long),
            "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 2)),
        }
        with duet.attach(model, config):
            whole = model(**longer, prompt_length=inputs["input_ids"].shape[1]).logits[:, -2:]
            cache = model(**inputs, use_cache=True).past_key_values
            steps = [model(input_ids=answer[:, i : i + 1], past_key_values=cache).logits for i in range(2)]
        assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


def test_gradients_reach_merger_tower_and_language_model_through_averages(model, family):
    model.train()
    with duet.attach(model, CONFIG):
        loss_of(model, qwen.mixed_batch(family, "right")).backward()
    parts = {"visual.merger": [], "language_model.layers.0": [], "language_model.layers.3": [], "visual.blocks.0": []}
    if family == "qwen3_vl":
        parts["deepstack_merger_list.1"] = []
    for name, parameter in model.named_parameters():
        for part in parts:
            if part in name and parameter.grad is not None:
                parts[part].append(parameter.grad)
    for part, gradients in parts.items():
        assert gradients and all(g.isfinite().all() for g in gradients), part
        assert any(g.abs().max() > 0 for g in gradients), part


def test_gradient_checkpointing_gives_the_same_loss_and_gradients(model, family):
    inputs = qwen.mixed_batch(family, "right")
    found = []
    for checkpointing in (False, True):
        twin = copy.deepcopy(model).train()
        if checkpointing:
            twin.gradient_checkpointing_enable()
        with duet.attach(twin, CONFIG):
            loss = loss_of(twin, inputs)
            loss.backward()
        found.append((loss.detach(), twin.lm_head.weight.grad, twin.model.visual.patch_embed.proj.weight.grad))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_lora_starts_at_the_same_loss_and_learns(model, family):
    peft = pytest.importorskip("peft", reason="peft is an optional extra (train)")
    inputs = qwen.mixed_batch(family, "right")
    with duet.attach(model, CONFIG):
        plain = loss_of(model, inputs).detach()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*(language_model.*q_proj|visual.*qkv)"))
    with duet.attach(wrapped, CONFIG):
        loss = loss_of(wrapped.train(), inputs)
        loss.backward()
    assert torch.allclose(plain, loss.detach(), atol=1e-6)
    gradients = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert gradients and all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients)


@torch.no_grad()
def test_save_and_load_keep_the_configuration(model, family, tmp_path):
    inputs = qwen.mixed_batch(family)
    with duet.attach(model, SHARES):
        wanted = model(**inputs).logits
        model.save_pretrained(tmp_path)
    loaded = qwen.CLASSES[family].from_pretrained(tmp_path).eval()
    assert duet.attach(loaded).config == SHARES.for_depth(qwen.LAYERS)
    assert torch.allclose(loaded(**inputs).logits, wanted, atol=1e-5)


@torch.no_grad()
def test_bfloat16(model, family):
    inputs = qwen.mixed_batch(family)
    model.bfloat16()
    with duet.attach(model, CONFIG):
        assert model(**inputs).logits.isfinite().all()
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


@torch.no_grad()
def test_two_generations_on_one_model_do_not_disturb_each_other(model, family):
    first, second = qwen.mixed_singles(family)[0], qwen.mixed_singles(family)[3]
    token = torch.tensor([[11]])
    with duet.attach(model, CONFIG):
        alone = model(input_ids=token, past_key_values=model(**first, use_cache=True).past_key_values).logits
        cache = model(**first, use_cache=True).past_key_values
        model(**second, use_cache=True)
        assert torch.equal(model(input_ids=token, past_key_values=cache).logits, alone)


@torch.no_grad()
def test_the_signature_is_the_hosts(model, family):
    inputs = inspect.signature(model.forward).parameters
    with duet.attach(model, CONFIG):
        reduced = inspect.signature(model.forward).parameters
    assert set(inputs) - {"mm_encoder_outputs"} <= set(reduced)


def changed(inputs, **values):
    return {name: value for name, value in (inputs | values).items() if value is not None}


@torch.no_grad()
def test_bad_input_says_what_is_wrong(model, family):
    single = qwen.mixed_singles(family)[2]
    with duet.attach(model, CONFIG):
        with pytest.raises(ValueError, match="pixel_values needs image_grid_thw"):
            model(**changed(single, image_grid_thw=None, mm_token_type_ids=None, position_ids=torch.arange(33)[None]))
        with pytest.raises(ValueError, match=r"holds 80 patches, but image_grid_thw .* describes 84"):
            model(**changed(single, pixel_values=single["pixel_values"][:80]))
        with pytest.raises(ValueError, match=r"image_grid_thw\[1\] is \[1, 10, 5\].*multiples of 2"):
            grid = torch.tensor([[1, 4, 6], [1, 10, 5]])
            model(**changed(single, image_grid_thw=grid, position_ids=torch.zeros(3, 1, 33, dtype=torch.long)))
        with pytest.raises(ValueError, match=r"the samples hold \[20\] image placeholder tokens"):
            ids = single["input_ids"].clone()
            ids[ids == qwen.IMAGE] = torch.tensor([qwen.IMAGE] * 20 + [5])
            model(**changed(single, input_ids=ids, position_ids=torch.zeros(3, 1, 33, dtype=torch.long)))
        cache = model(**single, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="reduced cache cannot take new pictures"):
            model(**single, past_key_values=cache)


def test_a_tower_without_any_full_block_is_refused():
    with pytest.raises(ValueError, match="fullatt_block_indexes names no block"):
        duet.attach(qwen.build("qwen2_5_vl", fullatt_block_indexes=[]), CONFIG)
