"""What training needs from the model: gradients, checkpointing, loss normalisation, a trainable tower, attach."""

import pytest
import torch
from model_helpers import IMAGE, golden_model, pad_batch, pixels, prompt
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import duet
from duet import DuetConfig
from llava.model import LlavaLlamaForCausalLM

DUET = DuetConfig(dominant=60, contextual=5, schedule={4: 0.5, 6: 0.0})


def batch():
    rows = [prompt([5, 6], IMAGE, [7, 8, 9, 10]), prompt([11, 12, 13])]
    ids, mask = pad_batch(rows, "right")
    labels = ids.masked_fill((mask == 0) | (ids == IMAGE), -100)
    labels[:, :3] = -100
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "images": torch.stack([pixels("coffee"), torch.zeros(3, 336, 336)]),
    }


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [None, DUET], ids=["full", "duet"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(config, reentrant):
    results = []
    for checkpointing in (False, True):
        model = golden_model()
        model.set_reduction(config)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(**batch()).loss
        loss.backward()
        results.append((loss.item(), gradients(model)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert results[0][1].keys() == results[1][1].keys()
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, atol=1e-6, rtol=1e-4)


def test_only_the_projector_learns_in_stage_one_with_checkpointing():
    model = golden_model()
    model.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(**batch()).loss.backward()
    assert set(gradients(model)) == {f"model.mm_projector.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}


@pytest.mark.parametrize("config", [None, DUET], ids=["full", "duet"])
def test_a_freed_tower_gets_gradients(config):
    model = golden_model()
    model.set_reduction(config)
    model.train()
    for parameter in model.get_vision_tower().parameters():
        parameter.requires_grad_(True)
    model(**batch()).loss.backward()
    tower = model.get_vision_tower().vision_tower
    assert tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    assert tower.encoder.layers[22].mlp.fc1.weight.grad.abs().sum() > 0
    assert tower.encoder.layers[23].mlp.fc1.weight.grad is None  # never runs


def test_a_text_only_batch_keeps_the_projector_in_the_graph():
    model = golden_model().train()
    ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=ids, labels=ids, images=torch.zeros(1, 3, 336, 336)).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.get_model().mm_projector.parameters())


def test_the_loss_is_normalised_in_one_place():
    model = golden_model().train()
    inputs = batch()
    mean = model(**inputs).loss
    assert model.accepts_loss_kwargs is False
    assert torch.equal(model(**inputs, num_items_in_batch=3).loss, mean)
    model.config.loss_normalization = "global"
    assert model.accepts_loss_kwargs is True
    labels = (inputs["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(model(**inputs, num_items_in_batch=torch.tensor(7)).loss, mean * labels / 7)
    model.config.loss_normalization = "both"
    with pytest.raises(ValueError, match="loss_normalization"):
        _ = model.accepts_loss_kwargs


def test_the_trainer_sees_the_switch(tmp_path):
    model = golden_model()
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    assert Trainer(model=model, args=args).model_accepts_loss_kwargs is False
    model.config.loss_normalization = "global"
    assert Trainer(model=model, args=args).model_accepts_loss_kwargs is True


def test_evaluation_gives_loss_and_logits_with_the_same_loss():
    model = golden_model()
    inputs = batch()
    train = model.train()(**inputs).loss
    out = model.eval()(**inputs, logits_to_keep=0)
    torch.testing.assert_close(out.loss, train)
    shifted = out.logits[:, :-1].flatten(0, 1)
    labels = model.prepare_inputs_labels_for_multimodal(
        inputs["input_ids"], None, inputs["attention_mask"], None, inputs["labels"], inputs["images"]
    )[5]
    torch.testing.assert_close(torch.nn.functional.cross_entropy(shifted, labels[:, 1:].flatten()), out.loss)
    assert model(**inputs, logits_to_keep=2).logits.shape[1] == 2
    assert isinstance(model(**inputs, return_dict=False), tuple)
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 9


def test_attach_and_detach_are_exact():
    model, other = golden_model().eval(), golden_model().eval()
    inputs = {"input_ids": torch.tensor([prompt([5], IMAGE, [6, 7])]), "images": pixels("coffee")[None]}
    keys, attributes = set(model.state_dict()), set(vars(model))
    with torch.no_grad():
        before = model(**inputs).logits
        handle = duet.attach(model, DUET)
        assert "576 -> 65 visual tokens" in repr(handle) and model.reduction == DUET
        during = model(**inputs).logits
        assert during.shape[1] == 4 and torch.equal(other(**inputs).logits, before)
        duet.detach(model)
        assert torch.equal(model(**inputs).logits, before)
        assert set(model.state_dict()) == keys and set(vars(model)) == attributes and not hasattr(model.config, "duet")
        with duet.attach(model, DuetConfig.none()):
            assert torch.equal(model(**inputs).logits, before)
        model.set_reduction(DUET)
        assert torch.equal(model(**inputs).logits, during)
    with pytest.raises(ValueError, match="has no vision tower"):
        config = golden_model().config
        del config.mm_vision_tower
        duet.attach(LlavaLlamaForCausalLM(config), DUET)


def test_the_trace_sees_pictures():
    model = golden_model().eval()
    model.set_reduction(DUET)
    with torch.no_grad(), duet.trace(model) as trace:
        model(input_ids=torch.tensor([prompt([5], IMAGE, [6], IMAGE, [7])]), images=torch.stack([pixels("coffee")] * 2))
    assert len(trace.images) == 2


def test_registered_with_the_auto_classes(tmp_path):
    golden_model().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "LlavaConfig"
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), LlavaLlamaForCausalLM)


def test_new_image_tokens_start_as_the_mean():
    from types import SimpleNamespace

    from llava.tokenization import load_tokenizer

    model = golden_model()
    tokenizer = load_tokenizer(model.config._name_or_path)
    args = SimpleNamespace(mm_use_im_patch_token=True, mm_use_im_start_end=True, tune_mm_mlp_adapter=True)
    model.initialize_vision_tokenizer(args, tokenizer)
    weight = model.get_input_embeddings().weight
    assert len(tokenizer) == len(weight) == 2003
    torch.testing.assert_close(weight[-1], weight[:-2].mean(0))
    assert weight.requires_grad and not model.get_output_embeddings().weight.requires_grad
