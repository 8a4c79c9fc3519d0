"""The loss is LLaVA's: mean over a device's tokens, averaged over passes; one that is not finite names its samples."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import train_world

from llava.train.arguments import parse_arguments
from llava.train.build import build
from llava.train.callbacks import StopSignal
from llava.train.train import load_data, make_trainer


def make(flags, **overrides):
    args = parse_arguments(flags(optim="sgd", lr_scheduler_type="constant", save_strategy="no", **overrides))
    torch.manual_seed(0)
    model, tokenizer = build(args, "sdpa")
    trainer = make_trainer(args, model, tokenizer, load_data(args, tokenizer), StopSignal())
    return trainer, model


def batches_of_first_step(trainer):
    loader = iter(trainer.get_train_dataloader())
    return [next(loader) for _ in range(trainer.args.gradient_accumulation_steps)]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_step_equals_the_mean_of_per_device_means(flags, tmp_path, accumulation):
    """One SGD step against gradients that are computed by hand from the same batches."""
    trainer, model = make(
        flags, gradient_accumulation_steps=accumulation, max_steps=1, max_grad_norm=0, learning_rate=1.0
    )
    reference = copy.deepcopy(model).train()
    losses = []
    for batch in batches_of_first_step(trainer):
        inputs = {key: value for key, value in batch.items() if key != "sample_ids"}
        loss = reference(**inputs).loss
        (loss / accumulation).backward()
        losses.append(loss.item())
    assert len(set(losses)) == accumulation
    trainer.train()
    assert train_world.losses(tmp_path)[1] == pytest.approx(sum(losses) / accumulation, abs=1e-5)
    before = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = before[name] - before[name].grad
            torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=1e-4, msg=name)


def test_global_normalisation_divides_by_all_label_tokens(flags, tmp_path):
    """With accumulation, the mean over all label tokens differs from the mean of the means."""
    trainer, model = make(flags, gradient_accumulation_steps=3, max_steps=1, loss_normalization="global")
    total = count = 0.0
    for batch in batches_of_first_step(trainer):
        inputs = {key: value for key, value in batch.items() if key != "sample_ids"}
        tokens = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            total += copy.deepcopy(model).train()(**inputs).loss.item() * tokens
        count += tokens
    trainer.train()
    assert train_world.losses(tmp_path)[1] == pytest.approx(total / count, abs=1e-5)


def test_loss_that_is_not_finite_names_the_samples(flags):
    from llava.train.llava_trainer import NonFiniteLossError

    trainer, model = make(flags, max_steps=1)
    names = next(iter(trainer.get_train_dataloader()))["sample_ids"]
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 1, rank 0") as caught:
        trainer.train()
    assert len(names) == 2 and all(name in str(caught.value) for name in names)
    assert "r" in names[0] and "record" in names[0]


def test_nan_gradient_norm_stops_the_run_when_asked(flags):
    from llava.train.callbacks import LogCallback

    trainer, _ = make(flags, max_steps=1)
    callback = LogCallback(trainer, trainer.run_log, raise_on_nan_grad=True)
    with pytest.raises(FloatingPointError, match="gradient norm is nan at step 0"):
        callback.on_log(trainer.args, trainer.state, None, logs={"grad_norm": float("nan")})


def test_validation_loss(train, tmp_path, world):
    train(max_steps=2, eval_data_path=world.data[0], eval_strategy="steps", eval_steps=1, save_strategy="no")
    values = [r["eval_loss"] for r in train_world.figures(tmp_path) if "eval_loss" in r]
    assert len(values) == 2 and values[1] < values[0]


def test_bf16_with_gradient_checkpointing_and_fp32_master(train, tmp_path, flags):
    train("plain", max_steps=3, save_strategy="no")
    train("saving", max_steps=3, save_strategy="no", gradient_checkpointing=True)
    plain, saving = train_world.losses(tmp_path, "plain"), train_world.losses(tmp_path, "saving")
    assert all(saving[step] == pytest.approx(loss, abs=1e-4) for step, loss in plain.items())
    train("bf16", max_steps=3, save_strategy="no", bf16=True)
    narrow = train_world.losses(tmp_path, "bf16")
    assert all(narrow[step] == pytest.approx(loss, rel=0.02) for step, loss in plain.items())
    args = parse_arguments(flags("wide", bf16=True))
    model, _ = build(args, "sdpa")
    kinds = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_grouped_sampler_keeps_modalities_apart(flags, world):
    records = json.loads(world.data[0].read_text())
    args = parse_arguments(flags(group_by_modality_length=True, gradient_accumulation_steps=2))
    model, tokenizer = build(args, "sdpa")
    trainer = make_trainer(args, model, tokenizer, load_data(args, tokenizer), StopSignal())
    order = list(trainer._get_train_sampler(trainer.train_dataset))
    assert sorted(order) == list(range(len(records)))
    has_image = ["image" in records[index] for index in order]
    assert all(len(set(has_image[start : start + 4])) == 1 for start in range(0, len(order), 4))


def test_reduction_is_trained_and_stored(train, tmp_path):
    train(max_steps=1, save_strategy="no")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["duet"]["dominant"], config["duet"]["contextual"]) == (10, 3)
    line = next(record for record in train_world.figures(tmp_path) if "loss" in record)
    assert line["visual_tokens_entering"] == 13
    assert line["visual_tokens_from_layer_1"] == 6 and line["visual_tokens_from_layer_2"] == 0
    assert line["visual_tokens_average"] == pytest.approx((13 + 6) / 4)
