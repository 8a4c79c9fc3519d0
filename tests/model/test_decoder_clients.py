"""What LLaVA's clients do to the decoder: hooks, replaced forwards, maps, own losses, own splices, calls of its inside.

A model without a reduction is a plain model. With one every way in is reduced, or an error that says what to do.
"""

import functools

import pytest
import torch
from model_helpers import IMAGE, golden_model, pad_batch, pixels, prompt
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

import duet
from duet import DuetConfig
from llava.model.llava_arch import LlavaMetaForCausalLM

DUET = DuetConfig(dominant=60, contextual=5, schedule={4: 0.5, 6: 0.0})
STAGE1 = DuetConfig(dominant=60, contextual=5, schedule={})
KEPT = {None: 576, "stage 1": 65, "duet": 0}
CONFIGS = {None: None, "stage 1": STAGE1, "duet": DUET}
ROW = prompt([5, 6], IMAGE, [7, 8, 9, 10])
TEXT = torch.tensor([prompt([5, 6, 7, 8])])


@pytest.fixture(scope="module")
def shared():
    return golden_model().eval()


@pytest.fixture
def model(shared):
    """The model without a reduction, whatever a test did to it."""
    yield shared.eval()
    shared.set_reduction(None)
    shared.set_attn_implementation("sdpa")
    vars(shared.model).pop("forward", None)


@functools.cache
def batch(labels=True):
    rows = [ROW, prompt([11, 12, 13])]
    ids, mask = pad_batch(rows, "right")
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "images": torch.stack([pixels("coffee"), torch.zeros(3, 336, 336)]),
    }
    target = ids.masked_fill((mask == 0) | (ids == IMAGE), -100)
    target[:, :3] = -100
    return inputs | ({"labels": target} if labels else {})


def spliced(model, **changes):
    given = batch() | changes
    return model.prepare_inputs_labels_for_multimodal(
        given["input_ids"], None, given["attention_mask"], None, given["labels"], given["images"]
    )


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or batch(labels=False))).logits


# ---- hooks and replaced forwards


@pytest.mark.parametrize("name", CONFIGS)
def test_hooks_on_the_inner_model_fire_and_what_they_return_counts(model, name):
    model.set_reduction(CONFIGS[name])
    before, seen = logits(model), []
    handle = model.model.register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state.shape[1]))
    assert torch.equal(logits(model), before) and seen == [7 + KEPT[name]]
    handle.remove()

    def doubled(_, args, out):
        out.last_hidden_state = 2 * out.last_hidden_state
        return out

    with torch.no_grad():
        handle = model.model.register_forward_hook(doubled)
        assert torch.allclose(logits(model), 2 * before, atol=1e-5)
    handle.remove()


def test_a_forward_replaced_on_the_class_is_the_models_forward(model, monkeypatch):
    before, calls, own = logits(model), [], LlamaModel.forward

    def counted(self, *args, **kwargs):
        calls.append(kwargs["inputs_embeds"].shape)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    assert torch.equal(logits(model), before) and calls == [(2, 583, 64)]
    model.set_reduction(DUET)
    with pytest.raises(ValueError, match=r"forward of test_decoder_clients.*never be called.*set_reduction\(None\)"):
        logits(model)


def test_a_forward_replaced_on_the_instance_is_called(model):
    before, own = logits(model), model.model.forward
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    def of_old(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
               use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):  # fmt: skip
        out = own(attention_mask=attention_mask, inputs_embeds=inputs_embeds, use_cache=use_cache)
        return (out.last_hidden_state,)

    for forward in (wrapped, of_old):
        model.model.forward = forward
        assert torch.equal(logits(model), before)
    model.set_reduction(DUET)
    with pytest.raises(ValueError, match=r"of test_decoder_clients\) takes no 'visual_mask' and would go past it"):
        logits(model)
    model.model.forward = wrapped
    assert logits(model).shape[1] == 7 and len(calls) == 2
    model.model.forward = lambda **kwargs: BaseModelOutputWithPast(kwargs["inputs_embeds"])
    with pytest.raises(ValueError, match="returned a BaseModelOutputWithPast"):
        logits(model)


# ---- attention maps and hidden states


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_maps_are_returned_by_eager_attention_at_each_layers_length(model, name):
    model.set_reduction(CONFIGS[name])
    inputs = {"input_ids": torch.tensor([ROW]), "images": pixels("coffee")[None]}
    expected = logits(model, **inputs)
    with pytest.raises(ValueError, match=r"needs eager attention.*runs 'sdpa'.*set_attn_implementation\('eager'\)"):
        model(**inputs, output_attentions=True)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=True)
        again = model(torch.tensor([[7]]), past_key_values=out.past_key_values, output_attentions=True)
    torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=1e-4)
    lengths = [7 + (KEPT[name] if name != "duet" else kept) for kept in (65,) * 4 + (32,) * 2 + (0,) * 2]
    assert [tuple(m.shape[-2:]) for m in out.attentions] == [(n, n) for n in lengths]
    assert [h.shape[1] for h in out.hidden_states] == [*lengths, lengths[-1]]
    assert [tuple(m.shape[-2:]) for m in again.attentions] == [(1, n + 1) for n in lengths]
    for found in out.attentions:
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found.sum(-1)))
    assert model(**inputs).attentions is None


# ---- losses and logits of the caller's own


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_logits_and_the_labels_beside_them_exist_in_training_too(model, name, training):
    model.set_reduction(CONFIGS[name])
    out = model.train(training)(**batch())
    assert out.labels.shape == out.logits.shape[:2]
    pairs = out.logits[:, :-1].flatten(0, 1), out.labels[:, 1:].flatten()
    torch.testing.assert_close(torch.nn.functional.cross_entropy(*pairs), out.loss)
    wanted = batch()["labels"]
    assert out.labels[out.labels != -100].tolist() == wanted[wanted != -100].tolist()
    short = model(**batch(), skip_logits=True)
    assert short.logits is None and torch.equal(short.loss, out.loss) and torch.equal(short.labels, out.labels)
    assert out.logits.requires_grad and model(**batch(labels=False), skip_logits=True).logits is not None
    assert torch.equal(model(**batch(), return_dict=False)[-1], out.labels)


# ---- splices of the caller's own, and calls of the inside


@pytest.mark.parametrize("name", CONFIGS)
def test_a_caller_that_splices_by_itself_gets_the_reduction(model, name):
    model.set_reduction(CONFIGS[name])
    with torch.no_grad():
        expected = model(**batch())
        _, positions, mask, _, embeds, labels = spliced(model)
        out = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, labels=labels)
        inner = model.model(inputs_embeds=embeds, attention_mask=mask)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=0)
    assert torch.equal(out.labels, expected.labels)
    torch.testing.assert_close(model.lm_head(inner.last_hidden_state), expected.logits, atol=1e-5, rtol=0)
    assert inner.last_hidden_state.shape[1] == 7 + KEPT[name]


def test_embeddings_of_unknown_origin_are_refused_where_layers_drop_tokens(model):
    prepared = spliced(model)
    copies = {"inputs_embeds": prepared[4].clone(), "attention_mask": prepared[2]}
    whole = logits(model, **copies)
    assert whole.shape[1] == 583
    model.set_reduction(STAGE1)
    assert logits(model, **copies).shape[1] == 583  # nothing is left to do after the tower
    model.set_reduction(DUET)
    for door in (model, model.model, model.base_model):
        with pytest.raises(ValueError, match="do not say which positions are visual: pass visual_mask="):
            door(**copies)
    assert logits(model, **copies, visual_mask=prepared.visual_mask).shape[1] == 7
    nothing = torch.zeros_like(prepared.visual_mask)
    torch.testing.assert_close(
        logits(model, **copies, visual_mask=nothing)[0], whole[0], atol=1e-5, rtol=0
    )  # text alone: nothing is dropped


def test_a_projects_own_splice_keeps_the_reduction_or_is_refused(model, monkeypatch):
    model.set_reduction(DUET)
    own = LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal
    monkeypatch.setattr(
        LlavaMetaForCausalLM, "prepare_inputs_labels_for_multimodal", lambda self, *a, **k: tuple(own(self, *a, **k))
    )
    assert logits(model).shape[1] == 7
    assert model.generate(batch()["input_ids"][:1], images=batch()["images"][:1], max_new_tokens=2).shape == (1, 2)

    def copied(self, *args, **kwargs):
        found = list(own(self, *args, **kwargs))
        return (*found[:4], None if found[4] is None else found[4].clone(), found[5])

    monkeypatch.setattr(LlavaMetaForCausalLM, "prepare_inputs_labels_for_multimodal", copied)
    for call in (
        lambda: logits(model),
        lambda: model.generate(batch()["input_ids"][:1], images=batch()["images"][:1], max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="which positions are visual"):
            call()


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("cached", [True, False])
def test_a_caller_that_splices_and_generates_by_the_hosts_generate(model, beams, cached):
    model.set_reduction(DUET)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams, "use_cache": cached}
    ids, images = torch.tensor([ROW]), pixels("coffee")[None]
    with torch.no_grad():
        expected = model.generate(ids, images=images, **settings)
        prepared = model.prepare_inputs_labels_for_multimodal(ids, None, torch.ones_like(ids), None, None, images)
        embeds = {"inputs_embeds": prepared[4], "attention_mask": prepared[2]}
        if beams > 1:  # the rows are repeated, and copies know nothing
            with pytest.raises(ValueError, match="visual_mask"):
                LlamaForCausalLM.generate(model, **embeds, **settings)
            embeds["visual_mask"] = prepared.visual_mask
        with duet.trace() as seen:
            assert torch.equal(LlamaForCausalLM.generate(model, **embeds, **settings), expected)
    assert seen.passes[0][-1].visual == [0] * beams


@pytest.mark.parametrize("cached", [True, False])
def test_text_alone_generates_with_a_reduction_in_force(model, cached):
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": cached}
    expected = model.generate(TEXT, **settings)
    model.set_reduction(DUET)
    assert torch.equal(model.generate(TEXT, **settings), expected)
    with torch.no_grad():
        torch.testing.assert_close(
            model.model(TEXT).last_hidden_state, LlamaModel.forward(model.model, TEXT).last_hidden_state
        )


@pytest.mark.parametrize("name", [None, "duet"])
def test_the_inside_takes_no_pictures_and_says_so(model, name):
    model.set_reduction(CONFIGS[name])
    for door in (model.model, model.base_model, model.get_model()):
        with pytest.raises(ValueError, match=r"takes no pictures.*DUET reduces them there"):
            door(input_ids=torch.tensor([ROW]), images=pixels("coffee")[None])
    if name:
        with pytest.raises(ValueError, match="hold <image> marks"):
            model.model(torch.tensor([ROW]))
        with pytest.raises(TypeError, match=r"'visual_mas'.*'visual_mask'"):
            model.model(TEXT, visual_mas=torch.zeros(1, 5))


def test_the_trace_counts_passes_of_a_plain_model(model):
    with torch.no_grad(), duet.trace() as seen:
        model(**batch(labels=False))
        model.generate(torch.tensor([ROW]), images=pixels("coffee")[None], max_new_tokens=2)
    assert [p[0].visual for p in seen.passes] == [[576, 0], [576]]
    assert [p[0].tokens for p in seen.passes] == [[583, 4], [583]]
