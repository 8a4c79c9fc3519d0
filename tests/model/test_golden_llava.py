"""Unreduced LLaVA against the numbers of the original implementation."""

import pytest
import torch
from model_helpers import facts, golden_model, pixels, tensors

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return golden_model().eval()


def check_logits(logits, golden, valid=None):
    valid = torch.ones(logits.shape[:2], dtype=torch.bool) if valid is None else valid.bool()
    if "logits_v64" in golden:  # the batch case is stored without them
        assert (logits[..., :64] - golden["logits_v64"])[valid].abs().max() <= TOLERANCE
    assert (logits.logsumexp(-1) - golden["logits_lse"])[valid].abs().max() <= TOLERANCE
    assert torch.equal(logits.argmax(-1)[valid], golden["logits_argmax"][valid])
    last = valid.sum(1) - 1
    assert (logits[torch.arange(len(logits)), last] - golden["logits_last"]).abs().max() <= TOLERANCE


def test_vision_features_and_projection(model):
    name = "flower_tall"
    golden, image = tensors("vision_features"), pixels(name)[None]
    with torch.no_grad():
        features, projected = model.get_vision_tower()(image), model.encode_images(image)
    assert (features[0] - golden[f"{name}.features"]).abs().max() <= TOLERANCE
    assert (projected[0] - golden[f"{name}.projected"]).abs().max() <= TOLERANCE


def test_single_image_logits_and_greedy_tokens(model):
    golden, image = tensors("llava_single_flower_tall"), pixels("flower_tall")[None]
    with torch.no_grad():
        logits = model(input_ids=golden["input_ids"], images=image).logits
    check_logits(logits, golden)
    new = model.generate(golden["input_ids"], images=image, do_sample=False, max_new_tokens=12)
    assert new.tolist() == golden["greedy_ids"].tolist()


def test_text_only_logits_and_greedy_tokens(model):
    golden = tensors("llava_text_only")
    with torch.no_grad():
        logits = model(input_ids=golden["input_ids"], images=None, image_sizes=[]).logits
    check_logits(logits, golden)
    new = model.generate(golden["input_ids"], images=None, image_sizes=[], do_sample=False, max_new_tokens=12)
    assert new.tolist() == golden["greedy_ids"].tolist()


def training_batch():
    golden = tensors("llava_batch_train")
    names = [image for _, image in facts("llava_batch_train")["samples"]]
    images = torch.stack([torch.zeros(3, 336, 336) if name is None else pixels(name) for name in names])
    inputs = {key: golden[key] for key in ("input_ids", "attention_mask", "labels")}
    return golden, inputs | {"images": images}


def test_spliced_labels_and_mask_of_a_mixed_batch(model):
    golden, batch = training_batch()
    prepared = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"]
    )
    assert len(prepared) == 6 and prepared[0] is None and prepared[1] is None and prepared[3] is None
    valid = golden["expanded_attention_mask"].bool()
    assert torch.equal(prepared[2], golden["expanded_attention_mask"])
    assert torch.equal(prepared[5][valid], golden["expanded_labels"][valid])
    assert prepared.visual_mask.sum(1).tolist() == [576, 576, 576, 0]


def test_batch_logits_loss_and_gradients():
    golden, batch = training_batch()
    model = golden_model().eval()
    with torch.no_grad():
        out = model(**batch)
    check_logits(out.logits, golden, golden["expanded_attention_mask"])
    assert abs(out.loss.item() - golden["loss"].item()) <= TOLERANCE
    model.train()
    out = model(**batch, skip_logits=True)
    assert out.logits is None
    assert abs(out.loss.item() - golden["loss"].item()) <= TOLERANCE
    out.loss.backward()
    projector = model.get_model().mm_projector
    for layer in (0, 2):
        assert (projector[layer].weight.grad - golden[f"projector_{layer}_weight_grad"]).abs().max() <= TOLERANCE
    rows = model.get_input_embeddings().weight.grad.norm(dim=1)
    assert (rows - golden["embed_grad_rownorm"]).abs().max() <= TOLERANCE
    expected = facts("llava_batch_train")
    norm = torch.cat([p.grad.flatten() for p in projector.parameters()]).norm().item()
    assert norm == pytest.approx(expected["grad_norm_mm_projector"], abs=TOLERANCE)
    everything = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    assert everything == pytest.approx(expected["grad_norm_all"], abs=TOLERANCE)
    assert all(p.grad is None for p in model.get_vision_tower().parameters())


def test_loss_of_each_sample_alone(model):
    _, batch = training_batch()
    for row, expected in enumerate(facts("llava_single_losses")["losses"]):
        keep = batch["attention_mask"][row].bool()
        with torch.no_grad():
            loss = model(
                input_ids=batch["input_ids"][row][keep][None],
                labels=batch["labels"][row][keep][None],
                images=batch["images"][row][None],
            )["loss"]
        assert loss.item() == pytest.approx(expected, abs=TOLERANCE)


def test_truncation_after_the_splice(model):
    golden, image = tensors("llava_truncation"), pixels("astronaut")[None]
    prepared = model.prepare_inputs_labels_for_multimodal(
        golden["input_ids"], None, None, None, golden["labels"], image
    )
    assert prepared[4].shape[1] == facts("llava_truncation")["expanded_len"] == model.config.tokenizer_model_max_length
    assert torch.equal(prepared[5], golden["expanded_labels"])
    with torch.no_grad():
        loss = model(input_ids=golden["input_ids"], labels=golden["labels"], images=image).loss
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=TOLERANCE)
