"""What the Qwen families do beyond the contract: shares of a frame, M-RoPE in decoding, their own inputs and errors."""

import copy
import inspect

import pytest
import qwen_models as qwen
import torch

import duet
from duet import DuetConfig

CONFIG = DuetConfig(dominant=4, contextual=2, cluster_width=3, schedule={1: 0.5, 3: 0.0})
SHARES = DuetConfig(dominant=0.5, contextual=0.125, schedule={2: 0.5}, queries="all", variant="release")


@pytest.fixture(params=qwen.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return qwen.build(family)


def changed(inputs, **values):
    return {name: value for name, value in (inputs | values).items() if value is not None}


def loss_of(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= qwen.IMAGE, -100)
    labels[:, :-4] = -100
    return model(**inputs, labels=labels).loss


@torch.no_grad()
def test_shares_are_of_each_frame(model, family):
    with duet.attach(model, SHARES) as handle, duet.trace() as trace:
        model(**qwen.mixed_batch(family))
    one, small, tall, clip = 12 + 3, 3 + 1, 8 + 2, 6 + 2  # round(0.5 N) + round(0.125 N), halves to even
    assert trace.passes[0][0].visual == [one, 0, small + tall, 3 * clip, 3 * clip + tall]
    assert "0.5 + 0.125 visual tokens per frame" in repr(handle)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_shares_of_a_batch_equal_those_of_its_samples(model, family, side):
    inputs = qwen.mixed_batch(family, side)
    with duet.attach(model, SHARES):
        together = model(**inputs).logits
        for row, single in enumerate(qwen.mixed_singles(family)):
            alone = model(**single).logits[0]
            mine = together[row, -len(alone) :] if side == "left" else together[row, : len(alone)]
            assert torch.allclose(mine, alone, atol=1e-5), row


@torch.no_grad()
def test_renumbered_positions_decode_with_and_without_a_cache(model, family):
    inputs = qwen.mixed_batch(family) | {"max_new_tokens": 6, "do_sample": False}
    config = DuetConfig(dominant=4, contextual=2, schedule={1: 0.5, 3: 0.0}, positions="compact")
    with duet.attach(model, config):
        assert torch.equal(model.generate(**inputs), model.generate(**inputs, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_step_by_hand_stands_where_the_rope_index_puts_it(model, family, positions):
    """The host's positions of prompt and answer decide; in Qwen2.5-VL a video ends at a later time than they do."""
    config = DuetConfig(dominant=4, contextual=2, schedule={1: 0.5}, positions=positions)
    answer = torch.tensor([[17, 23]])
    for sample in qwen.SAMPLES.values():
        inputs = qwen.make_inputs(family, [sample])
        length = inputs["input_ids"].shape[1]
        longer = inputs | {
            "input_ids": torch.cat((inputs["input_ids"], answer), 1),
            "attention_mask": torch.ones(1, length + 2, dtype=torch.long),
            "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 2)),
        }
        with duet.attach(model, config):
            whole = model(**longer, prompt_length=length).logits[:, -2:]
            cache = model(**inputs, use_cache=True).past_key_values
            steps = [model(input_ids=answer[:, i : i + 1], past_key_values=cache).logits for i in range(2)]
        assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


@torch.no_grad()
def test_two_generations_on_one_model_do_not_disturb_each_other(model, family):
    first, second = qwen.mixed_singles(family)[0], qwen.mixed_singles(family)[3]
    token = torch.tensor([[11]])
    with duet.attach(model, CONFIG):
        alone = model(input_ids=token, past_key_values=model(**first, use_cache=True).past_key_values).logits
        cache = model(**first, use_cache=True).past_key_values
        model(**second, use_cache=True)
        assert torch.equal(model(input_ids=token, past_key_values=cache).logits, alone)


def test_gradients_reach_the_tower_through_averages_and_with_checkpointing(model, family):
    inputs, found = qwen.mixed_batch(family, "right"), []
    for checkpointing in (False, True):
        twin = copy.deepcopy(model).train()
        if checkpointing:
            twin.gradient_checkpointing_enable()
        with duet.attach(twin, CONFIG):
            loss_of(twin, inputs).backward()
        found.append(twin.model.visual.patch_embed.proj.weight.grad)
    assert found[0].isfinite().all() and found[0].abs().max() > 0
    assert torch.allclose(*found, atol=1e-6)


def test_lora_in_the_tower_learns(model, family):
    peft = pytest.importorskip("peft", reason="peft is an optional extra (train)")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*visual.*qkv"))
    with duet.attach(wrapped, CONFIG):
        loss_of(wrapped.train(), qwen.mixed_batch(family, "right")).backward()
    gradients = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert gradients and all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_generate_sees_the_signature_of_the_host(model):
    host = set(inspect.signature(model.forward).parameters)
    with duet.attach(model, CONFIG):
        assert host - {"mm_encoder_outputs"} <= set(inspect.signature(model.forward).parameters)


@torch.no_grad()
def test_bad_input_says_what_is_wrong(model, family):
    single = qwen.mixed_singles(family)[2]
    axes = torch.zeros(3, 1, single["input_ids"].shape[1], dtype=torch.long)
    with duet.attach(model, CONFIG):
        with pytest.raises(ValueError, match="pixel_values needs image_grid_thw"):
            model(**changed(single, image_grid_thw=None, position_ids=axes))
        with pytest.raises(ValueError, match=r"pixel_values holds 80 patches, but image_grid_thw .* describes 84"):
            model(**changed(single, pixel_values=single["pixel_values"][:80]))
        with pytest.raises(ValueError, match=r"image_grid_thw\[1\] is \[1, 10, 5\].*multiples of 2"):
            model(**changed(single, image_grid_thw=torch.tensor([[1, 4, 6], [1, 10, 5]]), position_ids=axes))
        ids = single["input_ids"].clone()
        ids[0, (ids[0] == qwen.IMAGE).nonzero()[-1]] = 5
        with pytest.raises(ValueError, match=r"the samples hold \[20\] image placeholder tokens.*\[6, 15\]"):
            model(**changed(single, input_ids=ids, position_ids=axes))
        packed = torch.cat((torch.arange(10), torch.arange(axes.shape[2] - 10)))[None, None]
        with pytest.raises(ValueError, match="pack several samples into one row"):
            model(**changed(single, attention_mask=None, position_ids=torch.cat((packed, axes))))
        cache = model(**single, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="a reduced cache cannot take new pictures"):
            model(**single, past_key_values=cache)


def test_a_tower_without_any_full_block_is_refused():
    model = qwen.build("qwen2_5_vl", fullatt_block_indexes=[])
    with pytest.raises(ValueError, match="fullatt_block_indexes names no block"):
        duet.attach(model, CONFIG)
    assert not hasattr(model.config, "duet")


@torch.no_grad()
def test_a_second_turn_goes_on_from_the_reduced_cache(model, family):
    """Words after a prefill stand after the prompt, whatever was dropped; without pictures nothing is ranked."""
    inputs = qwen.make_inputs(family, [qwen.SAMPLES["image and video"]])
    turn = torch.tensor([[5, 6, 7]])
    with duet.attach(model, CONFIG):
        at_once = model(**inputs, use_cache=True).past_key_values
        one_by_one = model(**inputs, use_cache=True).past_key_values
        together = model(input_ids=turn, past_key_values=at_once).logits
        steps = [model(input_ids=turn[:, i : i + 1], past_key_values=one_by_one).logits for i in range(3)]
    assert torch.allclose(torch.cat(steps, 1), together, atol=1e-5)
