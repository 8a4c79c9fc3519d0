"""Optimizer groups, trainable parts, LoRA targets and the frozen tower."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava.train.arguments import parse_arguments
from llava.train.build import build
from llava.train.callbacks import StopSignal
from llava.train.optim import frozen_digest, parameter_groups, part_of, trainable_table


def built(argv):
    args = parse_arguments(argv)
    model, tokenizer = build(args, "sdpa")
    return args, model, tokenizer


def names_of(model, group):
    wanted = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_four_groups_with_a_projector_rate(flags):
    from llava.train.train import load_data, make_trainer

    args, model, tokenizer = built(flags(mm_projector_lr=2e-5, weight_decay=0.1))
    trainer = make_trainer(args, model, tokenizer, load_data(args, tokenizer), StopSignal())
    groups = trainer.create_optimizer().param_groups
    assert [(g["name"], g["weight_decay"], g["lr"]) for g in groups] == [
        ("base", 0.1, 1e-3),
        ("base_no_decay", 0.0, 1e-3),
        ("mm_projector", 0.1, 2e-5),
        ("mm_projector_no_decay", 0.0, 2e-5),
    ]
    assert names_of(model, groups[2]) == {"model.mm_projector.0.weight", "model.mm_projector.2.weight"}
    assert names_of(model, groups[3]) == {"model.mm_projector.0.bias", "model.mm_projector.2.bias"}
    assert all("norm" in name for name in names_of(model, groups[1]))
    everything = set().union(*(names_of(model, group) for group in groups))
    assert everything == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("vision_tower" in name for name in everything)


def test_two_groups_without_a_projector_rate_and_none_is_empty(flags):
    _, model, _ = built(flags())
    decay = {name for name, _ in model.named_parameters() if "norm" not in name and "bias" not in name}
    groups = parameter_groups(model.named_parameters(), decay, weight_decay=0.0, learning_rate=1.0)
    assert [group["name"] for group in groups] == ["base", "base_no_decay"]
    projector = [(name, p) for name, p in model.named_parameters() if name.endswith("mm_projector.0.weight")]
    assert len(parameter_groups(projector, decay, weight_decay=0.0, learning_rate=1.0, projector_lr=0.5)) == 1
    with pytest.raises(ValueError, match="no parameter is trainable"):
        parameter_groups([], decay, weight_decay=0.0, learning_rate=1.0)


@pytest.mark.parametrize(
    ("overrides", "learns"),
    [
        ({}, {"language", "mm_projector"}),
        ({"tune_mm_mlp_adapter": True}, {"mm_projector"}),
        ({"freeze_mm_mlp_adapter": True}, {"language"}),
        ({"unfreeze_mm_vision_tower": True}, {"language", "mm_projector", "vision_tower"}),
        ({"mm_tunable_parts": "mm_mlp_adapter,mm_vision_tower"}, {"mm_projector", "vision_tower"}),
        ({"lora_enable": True, "lora_r": 2}, {"language", "mm_projector"}),
    ],
)
def test_what_learns(flags, overrides, learns):
    _, model, _ = built(flags(**overrides))
    assert {part_of(name) for name, p in model.named_parameters() if p.requires_grad} == learns
    table = trainable_table(model)
    assert "vision_tower" in table and f"{sum(p.numel() for p in model.parameters()):,}" in table


def test_freeze_backbone_freezes_the_decoder_only(flags):
    _, model, _ = built(flags(freeze_backbone=True))
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns and all("mm_projector" in name or name.startswith("lm_head") for name in learns)


def test_unknown_tunable_part(flags):
    with pytest.raises(ValueError, match=r"mm_tunable_parts.*mm_language_model"):
        built(flags(mm_tunable_parts="vision"))


def test_lora_never_touches_tower_projector_or_head(flags):
    _, model, _ = built(flags(lora_enable=True, lora_r=2))
    adapted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted
    assert not any(part in name for name in adapted for part in ("vision_tower", "mm_projector", "lm_head"))
    per_layer = {name.split("layers.")[1].split(".lora_")[0] for name in adapted}
    leaves = {leaf.split(".")[-1] for leaf in per_layer}
    assert leaves == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def test_lora_on_a_multimodal_base_leaves_the_tower_alone(flags, train, world, tmp_path):
    """Leaf names would match the tower's q, k and v here, because it is there before LoRA is applied."""
    train("base", max_steps=1, save_strategy="no")
    _, model, _ = built(flags(model_name_or_path=tmp_path / "base", lora_enable=True, lora_r=2))
    assert any("vision_tower" in name for name, _ in model.named_parameters())
    assert not any("vision_tower" in name for name, _ in model.named_parameters() if "lora_" in name)


def test_find_all_linear_names_matches_llava():
    from llava.train.train import find_all_linear_names

    model = nn.ModuleDict(
        {
            "layers": nn.ModuleDict({"q_proj": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}),
            "mm_projector": nn.Linear(2, 2),
            "vision_tower": nn.ModuleDict({"fc1": nn.Linear(2, 2)}),
            "lm_head": nn.Linear(2, 2),
        }
    )
    assert find_all_linear_names(model) == ["q_proj"]


def test_tower_is_the_same_after_training(train, world, tmp_path):
    from safetensors.torch import load_file
    from transformers import CLIPVisionModel

    train(max_steps=2, save_strategy="no")
    stock = CLIPVisionModel.from_pretrained(world.tower).state_dict()
    saved = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.vision_tower.vision_tower.vision_model."
    tower = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
    assert set(tower) == set(stock)
    assert all(torch.equal(tower[key], value) for key, value in stock.items())


def test_a_changed_tower_is_noticed(flags):
    from llava.train.callbacks import FrozenCallback

    _, model, _ = built(flags())
    callback = FrozenCallback(model)
    callback.on_train_begin(None, None, None)
    callback.on_train_end(None, None, None)
    before = frozen_digest(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "vision_tower" in name).view(-1)[0] += 1e-6
    assert frozen_digest(model) != before
    with pytest.raises(RuntimeError, match="frozen weights of the vision tower changed"):
        callback.on_train_end(None, None, None)


def test_an_unfrozen_tower_learns(train, world, tmp_path):
    from safetensors.torch import load_file

    train(max_steps=1, save_strategy="no", unfreeze_mm_vision_tower=True, mm_vision_tower_lr=1e-2)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    stock = load_file(world.tower / "model.safetensors")
    key = next(key for key in saved if key.endswith("layers.0.mlp.fc1.weight"))
    original = next(value for name, value in stock.items() if name.endswith("layers.0.mlp.fc1.weight"))
    assert not torch.equal(saved[key], original)
