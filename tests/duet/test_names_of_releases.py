"""What transformers renames from release to release: both names work, nothing that carries state is swallowed."""

import dataclasses

import golden_llava
import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

import duet
from duet import versions

CONFIG = duet.DuetConfig(dominant=54, contextual=10, schedule={4: 0.5, 6: 0.0})


@pytest.fixture(scope="module")
def model():
    model = golden_llava.build()
    with duet.attach(model, CONFIG):
        yield model


@pytest.fixture(scope="module")
def inputs():
    text = torch.randint(5, 1900, (1, 12), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.tensor([[1]]), torch.full((1, 576), golden_llava.IMAGE_TOKEN), text], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": golden_llava.pixels("astronaut")[None],
    }


def test_the_name_is_that_of_the_installed_outputs():
    assert versions.CACHE in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}


@pytest.mark.parametrize("name", versions.CACHE_NAMES)
def test_a_cache_goes_on_under_either_name(model, inputs, name):
    first = inputs | {key: inputs[key][:, :-1] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        cache = versions.cache_of(model(**first, use_cache=True))
        step = model(input_ids=inputs["input_ids"][:, -1:], **{name: cache}, use_cache=True)
    assert versions.cache_of(step) is cache and cache.get_seq_length() == inputs["input_ids"].shape[1]
    assert step.logits.shape[1] == 1


@pytest.mark.parametrize("name", versions.CACHE_NAMES)
def test_generation_goes_on_from_a_cache_under_either_name(model, inputs, name):
    steps = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    once = model.generate(**inputs, max_new_tokens=6, **steps)
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, **steps)
    mask = torch.ones_like(first.sequences)
    later = {"attention_mask": mask, name: versions.cache_of(first)}
    again = model.generate(first.sequences, max_new_tokens=3, **later, **steps)
    assert torch.equal(once, again)


def test_two_different_caches_are_refused(model, inputs):
    with pytest.raises(ValueError, match="two names of one argument"):
        model(**inputs, cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"atention_mask": torch.ones(1, 589)}, "did you mean 'attention_mask'"),
        (
            {"past_key_value": DynamicCache()},
            "did you mean 'past_key_values'" if versions.CACHE != "cache" else "argument 'past_key_value'",
        ),
        (
            {"cache_position": torch.arange(589)},
            "unexpected keyword argument 'cache_position'; it would have no effect",
        ),
        ({"shift_labels": torch.ones(1, 589)}, "unexpected keyword argument 'shift_labels'"),
    ],
)
def test_what_nobody_reads_is_refused(model, inputs, given, message):
    with pytest.raises(TypeError, match=message):
        model(**inputs, **given)


def test_what_processors_give_in_vain_is_taken(model, inputs):
    model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"]), shift_labels=None)


def test_outputs_are_built_from_declared_fields():
    @dataclasses.dataclass
    class WithProperty(CausalLMOutputWithPast):
        @property
        def image_hidden_states(self):
            return "a property, no field"

    tokens = torch.ones(3, 2)
    built = versions.build_output(WithProperty, cache=None, pictures={"image": tokens}, logits=tokens)
    assert built.logits is tokens and built.image_hidden_states == "a property, no field"
    built = versions.build_output(duet.families.FAMILIES.get("llava").output, pictures={"image": tokens})
    names = {field.name for field in dataclasses.fields(built)}
    held = built.image_outputs.pooler_output if "image_outputs" in names else built.image_hidden_states
    assert held is tokens
    with pytest.raises(TypeError):
        versions.build_output(CausalLMOutputWithPast, no_field=tokens)


def test_layers_that_would_swallow_the_cache_are_refused(model, inputs):
    class Swallows(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    decoder = model.model.language_model
    layers, decoder.layers = decoder.layers, nn.ModuleList([Swallows(), *decoder.layers[1:]])
    try:
        with pytest.raises(ValueError, match=f"Swallows.forward takes no argument '{versions.CACHE}'"):
            model(**inputs, use_cache=True)
    finally:
        decoder.layers = layers


def test_stop_strings_work_although_generate_hands_their_tokenizer_to_forward(model, inputs):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(golden_llava.GOLDEN / "tokenizer")
    steps = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 5}
    whole = model.generate(**inputs, **steps)
    assert torch.equal(model.generate(**inputs, stop_strings=["never said"], tokenizer=tokenizer, **steps), whole)
