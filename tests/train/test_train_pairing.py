"""Losses and metrics that pair logits with labels get the labels that stand beside the logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer

from llava.train.arguments import parse_arguments
from llava.train.build import build
from llava.train.llava_trainer import LLaVATrainer
from llava.train.train import load_data

WHOLE = {"dominant": None, "contextual": None, "layer_list": None, "image_token_ratio_list": None}


@pytest.fixture
def make(flags):
    def trainer(further=None, kind=LLaVATrainer, **overrides):
        args = parse_arguments(flags(save_strategy="no", max_steps=1, learning_rate=1e-3, **overrides))
        torch.manual_seed(0)
        model, tokenizer = build(args, "sdpa")
        data = load_data(args, tokenizer)
        return kind(model=model, args=args.training, tokenizer=tokenizer, **data, **(further or {}))

    return trainer


def first_batch(trainer):
    return {name: value for name, value in next(iter(trainer.get_train_dataloader())).items() if name != "sample_ids"}


def paired(trainer, batch):
    """What the model gives for a batch, computed beside the trainer."""
    model = copy.deepcopy(trainer.model).train()
    with torch.no_grad():
        out = model(**batch)
    return out.logits[:, :-1].flatten(0, 1).float(), out.labels[:, 1:].flatten()


@pytest.mark.parametrize("more", [{}, WHOLE, {"bf16": True}], ids=["reduced", "whole", "mixed precision"])
def test_label_smoothing_trains_on_the_labels_beside_the_logits(make, more):
    trainer = make(label_smoothing_factor=0.1, **more)
    batch = first_batch(trainer)
    expected = cross_entropy(*paired(trainer, batch), label_smoothing=0.1)
    assert trainer.train().training_loss == pytest.approx(expected.item(), abs=0.05 if more.get("bf16") else 1e-5)


@pytest.mark.parametrize("reduction", [{}, WHOLE], ids=["reduced", "whole"])
def test_a_loss_of_the_callers_own_gets_the_labels_beside_the_logits(make, reduction):
    seen = []

    def own_loss(outputs, labels, num_items_in_batch=None):
        seen.append((outputs.logits.shape[:2] == labels.shape, int(num_items_in_batch)))
        total = cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
        return total / num_items_in_batch

    trainer = make({"compute_loss_func": own_loss}, **reduction)
    batch = first_batch(trainer)
    expected = cross_entropy(*paired(trainer, batch))
    assert trainer.train().training_loss == pytest.approx(expected.item(), abs=1e-5)
    assert seen == [(True, int((batch["labels"][:, 1:] != -100).sum()))]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_metrics_get_logits_with_the_labels_beside_them(make, world, smoothing):
    found = {}

    def metrics(prediction):
        logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        found["shapes"] = logits.shape[:2] == labels.shape
        found["loss"] = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()).item()
        return {"supervised": int((labels != -100).sum())}

    trainer = make(
        {"compute_metrics": metrics}, eval_data_path=world.data[0], per_device_eval_batch_size=64,
        label_smoothing_factor=smoothing,
    )  # fmt: skip
    result = trainer.evaluate()
    assert found["shapes"]
    if not smoothing:
        assert found["loss"] == pytest.approx(result["eval_loss"], abs=1e-4)
    labels = [trainer.eval_dataset[index]["labels"] for index in range(len(trainer.eval_dataset))]
    assert result["eval_supervised"] == sum(int((row != -100).sum()) for row in labels)


def test_logits_are_made_only_where_somebody_reads_them(make, monkeypatch):
    trainer, kinds = make(), []
    own = type(trainer.model).forward

    def watched(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        kinds.append(out.logits is not None)
        return out

    monkeypatch.setattr(type(trainer.model), "forward", watched)
    trainer.train()
    assert kinds == [False]
    batch = first_batch(trainer)
    loss, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    assert outputs.logits is not None and kinds == [False, True]
    assert torch.allclose(loss, trainer.compute_loss(trainer.model, batch))


def test_a_batch_without_labels_gives_a_loss_of_zero_that_reaches_every_weight(make):
    trainer = make(label_smoothing_factor=0.1)
    batch = first_batch(trainer)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    assert loss.item() == 0 and trainer.model.lm_head.weight.grad is not None


def test_the_trainer_takes_llavas_names(make, tmp_path):
    trainer = make()
    assert trainer.tokenizer is trainer.processing_class is not None
    with pytest.raises(ValueError, match="two names of one argument"):
        make({"processing_class": object()})

    class Fork(LLaVATrainer):
        def _save_checkpoint(self, model, trial, metrics=None):
            super()._save_checkpoint(model, trial, metrics)

    fork = make(kind=Fork, output="fork")
    fork.train()
    fork._save_checkpoint(fork.model, None)
    assert (tmp_path / "fork" / "checkpoint-1" / "checkpoint_complete.json").is_file()


def test_the_plain_trainer_trains_a_llava_model(make):
    """Without our trainer nobody asks to skip logits, and the loss is the same."""
    ours, plain = (
        make(),
        make(output="plain", kind=lambda tokenizer, **rest: Trainer(processing_class=tokenizer, **rest)),
    )
    plain.data_collator = lambda samples: {k: v for k, v in ours.data_collator(samples).items() if k != "sample_ids"}
    assert plain.train().training_loss == pytest.approx(ours.train().training_loss, abs=1e-5)
