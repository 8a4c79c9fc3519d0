"""Every way into an attached model is reduced, or closed with a message that says what to do (docs/models.md)."""

import pytest
import torch
from models import CASES
from qwen_models import CASES as QWEN
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import duet
from duet import DuetConfig
from duet.versions import CACHE, cache_of, declared_output

ALL = CASES | QWEN


@pytest.fixture(params=list(ALL), scope="module")
def case(request):
    return ALL[request.param]


@pytest.fixture(scope="module")
def model(case):
    """An attached model; tests leave it as it is."""
    model = case.build()
    duet.attach(model, case.config)
    return model


@pytest.fixture
def llava():
    model = CASES["llava"].build()
    duet.attach(model, CASES["llava"].config)
    return model


def text_labels(model, inputs):
    """Labels on every word of the prompt."""
    ids = inputs["input_ids"]
    marks = [getattr(model.config, name, -1) for name in ("image_token_id", "video_token_id")]
    first = inputs["attention_mask"].cumsum(1) == 1  # nothing but padding comes before it
    return ids.masked_fill(torch.isin(ids, torch.tensor(marks)) | first | ~inputs["attention_mask"].bool(), -100)


def visual(model, inputs):
    later = inputs["attention_mask"].bool() & (inputs["attention_mask"].cumsum(1) > 1)
    return (text_labels(model, inputs) == -100) & later


@torch.no_grad()
@pytest.mark.parametrize("door", ["model", "base_model"])
def test_the_inner_model_reduces_and_returns_its_own_output_class(case, model, door):
    inputs = case.batch(model)
    with duet.trace() as seen:
        out = getattr(model, door)(**inputs)
    assert len(seen.passes) == 1 and sum(seen.passes[0][0].visual) == sum(case.entering.values())
    assert type(out) is declared_output(type(model.model)._duet_host)
    assert out.last_hidden_state.shape[1] < inputs["input_ids"].shape[1]
    assert torch.equal(model.lm_head(out.last_hidden_state), model(**inputs).logits)
    positional = model.model(inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"})
    assert torch.equal(positional.last_hidden_state, out.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_kept_positions_say_which_of_the_callers_positions_are_left(case, model, side):
    inputs = case.batch(model, side)
    ids, texts = inputs["input_ids"], ~visual(model, inputs)
    out = model.model(**inputs)
    for row, kept in enumerate(out.kept_positions):
        kept = kept[kept >= 0]
        assert bool((kept.diff() > 0).all()), "in the caller's order"
        mine = texts[row] & inputs["attention_mask"][row].bool()
        assert set(mine.nonzero().flatten().tolist()) <= set(kept.tolist()), "all text stays"
        assert len(kept) == int(mine.sum()), "this schedule drops all visual tokens in the end"
    assert out.kept_positions.shape == out.last_hidden_state.shape[:2] and ids.shape[1] > out.kept_positions.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_labels_pair_with_the_callers_own_labels(case, model, side):
    inputs = case.batch(model, side)
    labels = text_labels(model, inputs)
    out = model(**inputs, labels=labels)
    assert out.logits.shape[:2] == labels.shape and torch.equal(out.labels, labels)
    paired = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(paired, out.loss, atol=1e-5)
    short = model(**inputs, labels=labels, skip_logits=True)
    assert torch.allclose(short.loss, out.loss, atol=1e-5) and short.labels.shape[1] < labels.shape[1]


@torch.no_grad()
def test_a_pass_without_a_cache_answers_at_the_callers_positions(case, model):
    inputs = case.batch(model, "right")
    reduced, whole = model(**inputs), model(**inputs, use_cache=False)
    assert reduced.logits.shape[1] < whole.logits.shape[1] == inputs["input_ids"].shape[1]
    for row, kept in enumerate(reduced.kept_positions):
        real = kept >= 0
        assert torch.equal(whole.logits[row, kept[real]], reduced.logits[row, real])
    inner = model.model(**inputs, use_cache=False)
    assert torch.allclose(model.lm_head(inner.last_hidden_state), whole.logits, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_to_keep_counts_the_callers_positions(model, case, side, use_cache):
    inputs = case.batch(model, side)
    whole = model(**inputs, use_cache=False).logits
    length = whole.shape[1]
    last = model(**inputs, use_cache=use_cache, logits_to_keep=3)
    assert torch.allclose(last.logits, whole[:, -3:], atol=1e-5)
    labelled = model(**inputs, labels=text_labels(model, inputs), logits_to_keep=3)
    assert torch.allclose(labelled.logits, whole[:, -3:].clone(), atol=10) and labelled.labels.shape[1] == 3
    text = (~visual(model, inputs)).all(0).nonzero().flatten()[-2:]
    for wanted in (text, text - length, text.expand(len(whole), -1), torch.zeros(length).scatter(0, text, 1).bool()):
        assert torch.allclose(model(**inputs, logits_to_keep=wanted).logits, whole[:, text], atol=1e-5)
    everywhere = ~visual(model, inputs)
    assert torch.allclose(model(**inputs, logits_to_keep=everywhere).logits, whole[everywhere], atol=1e-5)
    dropped = visual(model, inputs)[0].nonzero()[0]
    with pytest.raises(ValueError, match=f"logits_to_keep names position {int(dropped)} of sample 0.*dropped"):
        model(**inputs, logits_to_keep=dropped)


@torch.no_grad()
def test_the_decoder_takes_embeddings_only_with_what_is_visual(llava):
    one = CASES["llava"].singles(llava)[0]
    decoder = llava.model.language_model
    embeds = decoder.get_input_embeddings()(one["input_ids"])
    with pytest.raises(ValueError, match=r"visual_mask, \[B, L\] bool.*model\.model"):
        decoder(inputs_embeds=embeds)
    mask = visual(llava, one)
    with duet.trace() as seen:
        out = decoder(inputs_embeds=embeds, visual_mask=mask)
    assert [s.visual for s in seen.passes[0]] == [[36], [18], [0]]
    assert out.last_hidden_state.shape[1] == int((~mask).sum()) == out.kept_positions.shape[1]
    for door in (llava, llava.model):
        with pytest.raises(ValueError, match="visual_mask"):
            door(inputs_embeds=embeds)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cu_seq_lens_q'"):
        decoder(inputs_embeds=embeds, visual_mask=mask, cu_seq_lens_q=torch.tensor([0, 4]))
    whole = llava(inputs_embeds=embeds, visual_mask=mask)
    assert torch.equal(whole.logits, llava.lm_head(out.last_hidden_state))
    words = one["input_ids"][:, -6:]
    plain = decoder(input_ids=words).last_hidden_state
    duet.detach(llava)
    assert torch.equal(decoder(input_ids=words).last_hidden_state, plain)
    assert decoder(inputs_embeds=embeds).last_hidden_state.shape[1] == embeds.shape[1]


@torch.no_grad()
def test_a_misspelt_argument_is_refused_at_every_door(llava):
    one = CASES["llava"].singles(llava)[0]
    for door, name in ((llava, "LlavaForConditionalGeneration"), (llava.model, "LlavaModel")):
        with pytest.raises(TypeError, match=rf"{name}\.forward got an unexpected keyword argument 'atention_mask'"):
            door(**one, atention_mask=one["attention_mask"])
    with pytest.raises(TypeError, match=r"LlamaModel\.forward got an unexpected"):
        llava.model.language_model(input_ids=one["input_ids"][:, -3:], imputs=1)


@torch.no_grad()
def test_a_cache_that_holds_unreduced_positions_is_refused_whether_it_is_used_or_not(llava):
    one = CASES["llava"].singles(llava)[0]
    filled = DynamicCache(config=llava.config.text_config)
    duet.detach(llava)
    llava(input_ids=one["input_ids"][:, -4:], **{CACHE: filled})
    duet.attach(llava, CASES["llava"].config)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=r"already holds positions.*prefix tuning"):
            llava(**one, **{CACHE: filled}, use_cache=use_cache)
    offloaded = DynamicCache(config=llava.config.text_config)
    offloaded.offloading = True  # what offloading=True does on a machine with an accelerator
    with pytest.raises(ValueError, match="offloaded cache cannot hold layers of different lengths"):
        llava(**one, **{CACHE: offloaded})


def test_prefix_tuning_is_refused_and_prompt_tuning_works():
    peft = pytest.importorskip("peft", reason="peft is an optional extra (train)")
    case = CASES["llava"]
    model = case.build()
    one = case.singles(model)[0]
    duet.attach(model, case.config)
    prefix = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="prefix tuning puts virtual tokens there"):
        prefix(**one)
    model = case.build()
    prompted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    duet.attach(prompted, case.config)
    with duet.trace(prompted) as seen:
        out = prompted(**one, labels=text_labels(model, one))
        out.loss.backward()
    assert sum(seen.passes[0][0].visual) == 10 and out.logits.shape[1] == one["input_ids"].shape[1] + 5
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prompted.parameters() if p.requires_grad)
    prompted.eval()
    with torch.no_grad(), duet.trace() as seen:
        answer = prompted.generate(**one, max_new_tokens=3, do_sample=False)
    assert sum(seen.passes[0][0].visual) == 10
    assert answer[0, -3] == out.logits[0, -1].argmax()


@torch.no_grad()
def test_guidance_scale_generates_the_same_with_and_without_a_cache(llava):
    one = CASES["llava"].singles(llava)[0]
    how = {"max_new_tokens": 5, "do_sample": False}
    guided, again = (llava.generate(**one, **how, guidance_scale=2.5, use_cache=use) for use in (True, False))
    assert torch.equal(guided, again)


@torch.no_grad()
def test_a_second_turn_goes_on_with_the_returned_cache(llava):
    one = CASES["llava"].singles(llava)[0]
    how = {"max_new_tokens": 4, "do_sample": False}
    first = llava.generate(**one, **how, return_dict_in_generate=True)
    turn = torch.cat((first.sequences, torch.tensor([[5, 6, 7]])), 1)
    mask = torch.ones_like(turn)
    second = llava.generate(input_ids=turn, attention_mask=mask, **{CACHE: cache_of(first)}, **how)
    whole = llava(input_ids=second, pixel_values=one["pixel_values"], prompt_length=one["input_ids"].shape[1])
    assert torch.equal(whole.logits[0, -5:-1].argmax(-1), second[0, -4:])
    cache = llava.generate(**one, **how, return_dict_in_generate=True).past_key_values
    both = torch.cat((first.sequences, one["input_ids"]), 1)
    with pytest.raises(ValueError, match="cannot take new pictures"):
        llava(input_ids=one["input_ids"], pixel_values=one["pixel_values"], past_key_values=cache)
    assert both.shape[1] > turn.shape[1]


def test_export_says_what_to_do(llava):
    one = CASES["llava"].singles(llava)[0]
    with pytest.raises(ValueError, match=r"torch\.export cannot take an attached model.*[Dd]etach"):
        torch.export.export(llava, (), one, strict=False)


@torch.no_grad()
def test_a_trace_of_one_model_records_that_model_only():
    peft = pytest.importorskip("peft", reason="peft is an optional extra (train)")
    case = CASES["llava"]
    model, other = case.build(), case.build(seed=1)
    one = case.singles(model)[0]
    duet.attach(other, DuetConfig(stage1="none", schedule={2: 0.5}))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*language_model.*q_proj"))
    with duet.trace(wrapped) as mine, duet.trace(other) as theirs, duet.trace() as both:
        duet.attach(wrapped, case.config)
        wrapped(**one)
        other(**one)
        model.model(**one)
        model.generate(**one, max_new_tokens=2)
    assert [len(found.passes) for found in (mine, theirs, both)] == [3, 1, 4]
    assert len(mine.images) == 3 and len(theirs.images) == 1 and len(both.images) == 4
    assert {len(image.source) for image in mine.images} == {10} and len(theirs.images[0].source) == 36
    assert theirs.images[0].kept_after.keys() == {2} and mine.tower_passes == 3
    with pytest.raises(ValueError, match=r"trace\(model\) records one model"), duet.trace("llava"):
        pass
