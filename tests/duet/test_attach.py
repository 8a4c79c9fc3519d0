"""Attaching changes one instance and nothing else; detaching restores it exactly."""

import copy
import functools
import importlib
import io
import pickle
import types

import pytest
import small
import torch
from transformers import LlavaForConditionalGeneration

import duet
from duet import DuetConfig

attach_module = importlib.import_module("duet.attach")
CONFIG = DuetConfig(dominant=10, contextual=3, cluster_width=3, schedule={2: 0.5, 4: 0.0})
NOOPS = [
    DuetConfig.none(),
    DuetConfig(dominant=small.PATCHES, contextual=0, schedule={}),
    DuetConfig(dominant=small.PATCHES, contextual=0, schedule={2: 1.0, 4: 1.0}, queries="all"),
    DuetConfig(stage1="none", schedule={3: 1.0}),
]


@pytest.fixture
def model():
    return small.build()


def snapshot(model):
    state = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    classes = {name: type(module) for name, module in model.named_modules()}
    return state, keys, classes, model.config.to_dict()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", NOOPS, ids=["none", "all-dominant", "keep-all", "ratio-1"])
def test_noop_is_bit_identical(model, config, side):
    inputs = small.mixed_batch(side)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    plain = model(**inputs).logits
    assert config.is_noop(small.PATCHES)
    with duet.attach(model, config):
        reduced = model(**inputs).logits
    valid = inputs["attention_mask"].bool()
    assert torch.equal(plain[valid], reduced[valid])


@torch.no_grad()
def test_noop_generates_the_same_tokens(model):
    inputs = small.mixed_batch("left")
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with duet.attach(model, NOOPS[1]):
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=8, do_sample=False))


@torch.no_grad()
def test_detach_is_exact_and_a_second_instance_never_feels_it(model):
    other = small.build()
    inputs = small.mixed_batch("left")
    plain = model(**inputs).logits  # transformers installs its own hooks lazily at the first call
    before = snapshot(model)
    handle = duet.attach(model, CONFIG)
    assert "36 -> 13 visual tokens" in repr(handle)
    assert model(**inputs).logits.shape[1] < plain.shape[1]
    assert torch.equal(other(**inputs).logits, plain)
    assert type(other) is LlavaForConditionalGeneration
    assert list(model.state_dict()) == list(before[0])
    duet.detach(model)
    after = snapshot(model)
    assert after[1:] == before[1:]
    for key, (pointer, value) in before[0].items():
        assert after[0][key][0] == pointer and torch.equal(after[0][key][1], value)
    assert torch.equal(model(**inputs).logits, plain)


def test_context_manager_detaches_after_an_error(model):
    with pytest.raises(RuntimeError, match="boom"), duet.attach(model, CONFIG):
        raise RuntimeError("boom")
    assert type(model) is LlavaForConditionalGeneration


def test_attach_twice_and_detach_twice_are_errors(model):
    duet.attach(model, CONFIG)
    with pytest.raises(ValueError, match="already attached"):
        duet.attach(model, CONFIG)
    duet.detach(model)
    with pytest.raises(ValueError, match="not attached"):
        duet.detach(model)


def test_unsupported_model_names_its_type_and_the_supported_ones(model):
    with pytest.raises(ValueError, match=r"LlamaModel.*'llama'.*supported.*llava"):
        duet.attach(model.model.language_model, CONFIG)
    with pytest.raises(ValueError, match="head included"):
        duet.attach(model.model, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dominant": 35, "contextual": 2}, r"35 \+ 2 = 37.*36 tokens"),
        ({"schedule": {6: 0.5}}, "beyond the model"),
        ({"schedule": {2: 0.5, 16: 0.0}}, "beyond the model"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_before_anything_changes(model, changes, message):
    values = CONFIG.to_dict() | changes
    with pytest.raises(ValueError, match=message):
        duet.attach(model, DuetConfig.from_dict(values))
    assert type(model) is LlavaForConditionalGeneration and not hasattr(model.config, "duet")


def test_save_and_load_keep_the_configuration(model, tmp_path):
    with duet.attach(model, CONFIG):
        model.save_pretrained(tmp_path)
        wanted = model(**small.mixed_batch("left")).logits
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert loaded.config.architectures == ["LlavaForConditionalGeneration"]
    handle = duet.attach(loaded)
    assert handle.config == CONFIG.for_depth(small.LAYERS)
    assert torch.allclose(loaded(**small.mixed_batch("left")).logits, wanted, atol=1e-5)


def test_attach_without_any_configuration_says_what_to_pass(model):
    with pytest.raises(ValueError, match="pass a DuetConfig"):
        duet.attach(model)


@torch.no_grad()
def test_deep_copies_are_independent(model):
    with duet.attach(model, CONFIG):
        twin = copy.deepcopy(model)
        inputs = small.mixed_batch("left")
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
        duet.detach(twin)
        assert twin(**inputs).logits.shape[1] > model(**inputs).logits.shape[1]
        assert not hasattr(twin.config, "duet") and "_old_forward" not in vars(twin)


@torch.no_grad()
def test_models_with_device_map_hooks(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(model, ModelHook())
    inputs = small.mixed_batch("left")
    plain = model(**inputs).logits
    with duet.attach(model, CONFIG):
        assert model(**inputs).logits.shape[1] < plain.shape[1]
    assert torch.equal(model(**inputs).logits, plain)


def test_peft_models_reduce_their_base(model):
    peft = pytest.importorskip("peft", reason="peft is an optional extra (train)")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*q_proj"))
    with duet.attach(wrapped, CONFIG):
        wrapped.train()
        inputs = small.mixed_batch("right")
        out = wrapped(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] > 50, -100))
        out.loss.backward()
    grads = [p.grad for n, p in wrapped.named_parameters() if p.requires_grad and "lora_B" in n]
    assert grads and all(g is not None and g.isfinite().all() for g in grads)


def wrapped_by_hand(model):
    inner = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: inner(*args, **kwargs), model)


def compiled(model):
    model.forward = torch.compile(model.forward, backend="eager")


def hooked(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(model, ModelHook())
    add_hook_to_module(model.model, ModelHook())


def prepared(model):
    """What accelerate's mixed precision does."""
    function = model.forward.__func__
    model._original_forward = model.forward

    @functools.wraps(function)
    def autocast(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    model.forward = types.MethodType(autocast, model)


@torch.no_grad()
@pytest.mark.parametrize("wrap", [wrapped_by_hand, compiled, hooked, prepared])
def test_a_forward_that_is_wrapped_while_attached_runs_the_plain_model_afterwards(model, wrap):
    inputs = small.mixed_batch("left")
    plain = model(**inputs).logits
    torch._dynamo.reset()
    with duet.attach(model, CONFIG):
        wanted = model(**inputs).logits
        wrap(model)
        with duet.trace() as seen:
            model(**inputs)
        assert [s.visual for s in seen.passes[0]][::2] == [[13, 0, 26], [0, 0, 0]]
    assert torch.equal(model(**inputs).logits, plain)
    with duet.attach(model, CONFIG):  # and again, with the wrapper on
        out = model(**inputs)
        kept = model.model(**inputs).kept_positions
        for row, places in enumerate(kept):
            real = places >= 0
            mine = out.logits[row, places[real]] if out.logits.shape == plain.shape else out.logits[row, real]
            assert torch.allclose(mine, wanted[row, real], atol=1e-5)


@torch.no_grad()
def test_hooks_may_come_off_while_attached_and_wrappers_after_it(model):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    inputs = small.mixed_batch("left")
    plain = model(**inputs).logits
    add_hook_to_module(model, ModelHook())
    with duet.attach(model, CONFIG):
        remove_hook_from_module(model)
        assert model(**inputs).logits.shape[1] < plain.shape[1]
        before = model.forward
        wrapped_by_hand(model)
    model.forward = before
    assert torch.equal(model(**inputs).logits, plain)
    del model.forward
    assert torch.equal(model(**inputs).logits, plain) and type(model) is LlavaForConditionalGeneration


@torch.no_grad()
def test_a_forward_that_was_replaced_before_is_reduced_on_the_whole_model_and_refused_inside(model):
    inputs = small.mixed_batch("right")
    nothing = (inputs["input_ids"] > 90) | ~inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(nothing, -100)
    wanted = duet.attach(model, CONFIG) and model(**inputs, labels=labels)
    duet.detach(model)
    wrapped_by_hand(model)
    with duet.attach(model, CONFIG), duet.trace() as seen:
        out = model(**inputs, labels=labels)
    assert sum(seen.passes[0][0].visual) == 3 * 13
    assert torch.allclose(out.loss, wanted.loss, atol=1e-5) and torch.allclose(out.logits, wanted.logits, atol=1e-5)
    for inner in (model.model, model.model.language_model):
        kept = inner.forward
        wrapped_by_hand(inner)
        with pytest.raises(ValueError, match=r"forward of this \w+ was replaced.*before duet\.attach"):
            duet.attach(model, CONFIG)
        inner.forward = kept  # the class's own, as wrappers leave it
        with duet.attach(model, CONFIG):
            assert sum(model.model(**inputs).kept_positions[0] >= 0) < inputs["input_ids"].shape[1]
        assert vars(inner).pop("forward") == kept


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("copied", [pickled, saved, copy.deepcopy])
def test_copies_are_reduced_and_can_be_detached_by_themselves(model, copied):
    inputs = small.mixed_batch("left")
    plain = small.build()(**inputs).logits  # another instance: transformers' own hooks of a first call have no pickle
    duet.attach(model, CONFIG)
    wanted = model(**inputs).logits
    attach_module._reduced_class.cache_clear()  # as in a new process
    twin = copied(model)
    assert torch.equal(twin(**inputs).logits, wanted) and duet.handle(twin).model is twin
    assert torch.equal(copied(model.model)(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    duet.detach(twin)
    assert type(twin) is LlavaForConditionalGeneration and torch.equal(twin(**inputs).logits, plain)
    assert {type(module).__module__ for module in twin.modules()}.isdisjoint({"duet.families.reduced"})
    assert torch.equal(model(**inputs).logits, wanted)


@torch.no_grad()
def test_the_handle_is_found_from_wrappers_and_parts(model):
    assert duet.handle(model) is None
    handle = duet.attach(torch.compile(model, backend="eager"), CONFIG)
    found = (model, model.model, model.model.language_model, torch.compile(model), torch.nn.DataParallel(model))
    assert all(duet.handle(one) is handle for one in found)
    duet.detach(model.model)
    assert duet.handle(model) is None and type(model) is LlavaForConditionalGeneration
