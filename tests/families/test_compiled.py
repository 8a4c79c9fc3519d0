"""torch.compile: decoder layers in a reduced pass, and decoding with fixed shapes, where one graph serves all steps."""

import models
import pytest
import qwen_models
import torch
from transformers import StaticCache

import duet
from duet.cache import DuetCache

CASES = models.CASES | qwen_models.CASES
ROOM = 6


def prefilled(family: str, room: int = ROOM):
    """A model with DUET after the prefill of a padded batch into a static cache."""
    case = CASES[family]
    model = case.build()
    inputs = case.batch(model)
    duet.attach(model, case.config)
    given = StaticCache(config=model.config.get_text_config(), max_cache_len=inputs["input_ids"].shape[1] + room)
    with torch.no_grad():
        out = model(**inputs, past_key_values=given, use_cache=True)
    return model, inputs, out


@pytest.mark.parametrize("family", sorted(CASES))
def test_static_generation_equals_dynamic(family):
    case = CASES[family]
    model = case.build()
    inputs = case.batch(model)
    duet.attach(model, case.config)
    settings = {"max_new_tokens": ROOM, "do_sample": False}
    for further in ({}, {"num_beams": 2}):
        dynamic = model.generate(**inputs, **settings, **further)
        static = model.generate(**inputs, **settings, **further, cache_implementation="static")
        assert torch.equal(dynamic, static)


def test_each_layer_is_as_long_as_what_it_kept():
    _, inputs, out = prefilled("llava")
    cache = out.past_key_values
    assert isinstance(cache, DuetCache) and cache.is_static
    held = [int(cache.get_seq_length(layer)) for layer in range(models.LAYERS)]
    assert [layer.max_cache_len for layer in cache.layers] == [length + ROOM for length in held]
    assert held[0] > held[1] == held[2] > held[3]
    assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_one_graph_decodes_all_steps(family):
    """No graph breaks, no recompilation, storage that stays where it is, and the logits of decoding without a graph."""
    model, _, out = prefilled(family)
    plain, _, again = prefilled(family)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend=count, fullgraph=True)
    cache = out.past_key_values
    places = [layer.keys.data_ptr() for layer in cache.layers]
    token = out.logits[:, -1:].argmax(-1)
    with torch.no_grad():
        for _ in range(ROOM):
            stepped = compiled(input_ids=token, past_key_values=cache, use_cache=True)
            expected = plain(input_ids=token, past_key_values=again.past_key_values, use_cache=True)
            assert torch.allclose(stepped.logits, expected.logits, atol=1e-5)
            token = stepped.logits[:, -1:].argmax(-1)
    assert len(graphs) == 1
    assert places == [layer.keys.data_ptr() for layer in cache.layers]


def test_no_room_is_refused():
    with pytest.raises(ValueError, match="room is 0"):
        prefilled("llava", room=0)


def test_other_caches_name_the_static_one():
    case = CASES["llava"]
    model = case.build()
    inputs = case.batch(model)
    duet.attach(model, case.config)

    class Other(StaticCache):
        pass

    with pytest.raises(ValueError, match='cache_implementation="static"'):
        model(**inputs, past_key_values=Other(config=model.config.get_text_config(), max_cache_len=99), use_cache=True)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_compiled_layers_give_the_same_logits_and_gradients(family):
    """Segments have different lengths and masks; no layer breaks its graph."""
    case = CASES[family]
    results = []
    for compiled in (False, True):
        model = case.build()
        inputs = case.batch(model, "right")
        duet.attach(model, case.config)
        torch._dynamo.reset()
        for layer in model.model.language_model.layers if compiled else ():
            layer.compile(backend="eager", fullgraph=True)
        out = model(**inputs, labels=inputs["input_ids"])
        out.loss.backward()
        results.append((out.logits, [weight.grad for weight in model.model.language_model.parameters()]))
    (logits, gradients), (compiled_logits, compiled_gradients) = results
    assert torch.allclose(compiled_logits, logits, atol=1e-5)
    for one, other in zip(gradients, compiled_gradients, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.allclose(one, other, atol=1e-5))
