"""Training with tiles of LLaVA-1.6: batches, what learns, what is saved, resuming, and flags that do not fit."""

from __future__ import annotations

import json
import shutil
from statistics import fmean

import numpy as np
import pytest
import torch
import train_world
from PIL import Image
from safetensors.torch import load_file

from llava.convert import convert
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.train.arguments import parse_arguments
from llava.train.build import build
from llava.train.plan import resolve
from llava.train.train import load_data

PINPOINTS = "[(84, 168), (168, 84), (168, 168), (252, 84), (84, 252)]"
TILES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
SIZES = [(150, 60), (60, 150), (170, 160), (30, 40), (300, 70), (80, 80)]
"""(width, height) of the pictures: 3, 3, 5, 3, 4 and 3 passes of 36 patches."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One record for each size, and two with text only."""
    folder = tmp_path_factory.mktemp("tiles")
    rng, records = np.random.default_rng(0), []
    for index, size in enumerate(SIZES):
        colours = rng.integers(0, 255, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(colours).resize(size).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": f"<image>\nwhat is {index}?"}, {"from": "gpt", "value": f"thing {index}"}]
        records.append({"id": f"r{index}", "image": f"{index}.png", "conversations": turns})
    for index in range(2):
        turns = [{"from": "human", "value": "say something"}, {"from": "gpt", "value": f"a word {index}"}]
        records.append({"id": f"t{index}", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return {"data_path": folder / "data.json", "image_folder": folder}


def parsed(flags, data, **overrides):
    return parse_arguments(flags(**TILES | data | overrides))


@pytest.fixture
def made(flags, data):
    """Model, tokenizer and data of a run."""

    def make(**overrides):
        args = parsed(flags, data, **overrides)
        model, tokenizer = build(args, "sdpa")
        return args, model, load_data(args, tokenizer)

    return make


def batch_of(module, places):
    return module["data_collator"]([module["train_dataset"][place] for place in places])


def test_a_ragged_batch_flows_to_projector_and_newline(made):
    _, model, module = made(dominant=None, contextual=None, layer_list=None, image_token_ratio_list=None)
    batch = batch_of(module, [0, 2, 6, 4])
    assert [len(pixels) for pixels in batch["images"]] == [3, 5, 1, 4]
    assert batch["image_sizes"] == [SIZES[0], SIZES[2], (84, 84), SIZES[4]]
    batch.pop("sample_ids")
    model.train()
    model(**batch).loss.backward()
    inner = model.get_model()
    for parameter in (inner.image_newline, inner.mm_projector[0].weight, inner.layers[0].self_attn.q_proj.weight):
        assert parameter.requires_grad and parameter.grad.isfinite().all() and parameter.grad.any()
    assert model.config.image_grid_pinpoints == PINPOINTS and model.config.image_aspect_ratio == "anyres"


def test_the_loss_of_a_batch_is_that_of_its_samples(made):
    """Per token, with DUET: tiles of one sample do not disturb another."""
    _, model, module = made()
    model.eval()
    with torch.no_grad():
        sums = []
        for places in ([0, 2, 6, 4], [0], [2], [6], [4]):
            batch = batch_of(module, places)
            batch.pop("sample_ids")
            tokens = int((batch["labels"] != -100).sum())
            sums.append(model(**batch).loss * tokens)
    assert float(sums[0]) == pytest.approx(float(sum(sums[1:])), abs=1e-4)


@pytest.mark.parametrize("reduced", [True, False], ids=["duet", "baseline"])
def test_a_short_run_learns(train, flags, data, tmp_path, reduced):
    off = {} if reduced else dict.fromkeys(("dominant", "contextual", "layer_list", "image_token_ratio_list"))
    train(**TILES | data | off, max_steps=14, save_strategy="no", learning_rate=4e-3)
    losses = list(train_world.losses(tmp_path).values())
    assert fmean(losses[-4:]) < 0.9 * fmean(losses[:4])
    entering = [r["visual_tokens_entering"] for r in train_world.figures(tmp_path) if "visual_tokens_entering" in r]
    most = 13 * 5 if reduced else 36 + 12 * 13
    assert entering and all(13 < count <= most for count in entering)
    tokenizer, model, image_processor, _ = load_pretrained_model(str(tmp_path / "out"), None, "out", device="cpu")
    assert model.config.mm_patch_merge_type == "spatial_unpad" and (model.reduction is not None) is reduced
    with Image.open(data["image_folder"] / "0.png") as picture:
        pixels = process_images([picture.convert("RGB")], image_processor, model.config)
    ids = torch.tensor([[1, -200, *tokenizer("what").input_ids[1:]]])
    new = model.generate(ids, images=pixels, image_sizes=[SIZES[0]], max_new_tokens=2, do_sample=False)
    assert new.shape[1] <= 2


@pytest.mark.parametrize("merge", ["spatial_unpad", "flat"])
def test_pictures_of_the_log_show_whole_pictures(train, data, tmp_path, merge):
    flags = TILES | data | {"mm_patch_merge_type": merge, "max_steps": 3, "save_strategy": "no"}
    train(**flags, image_log_steps=1, per_device_train_batch_size=4)
    assert len(list((tmp_path / "out" / "overlays").glob("*.png"))) == 6


@pytest.mark.parametrize("kind", [{}, {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0}], ids=["full", "lora"])
def test_a_run_goes_on_where_it_stopped(train, data, tmp_path, kind):
    values = TILES | data | kind | {"max_steps": 6, "save_steps": 4}
    train(**values)
    whole, folder = train_world.losses(tmp_path), tmp_path / "out"
    for path in folder.iterdir():
        if path.is_dir() and path.name != "checkpoint-4":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    train(**values)
    resumed = train_world.losses(tmp_path)
    assert sorted(resumed) == [5, 6] and all(abs(resumed[step] - whole[step]) < 1e-5 for step in resumed)
    if kind:
        rest = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        assert "base_model.model.model.image_newline" in rest
    else:
        assert "model.image_newline" in load_file(folder / "model.safetensors")


def test_lora_on_llava_hf_keeps_what_the_run_changed(train, flags, data, tmp_path):
    """The base is LLaVA-1.5 in llava-hf's layout: the adapter's folder brings tiles, newline and reduction."""
    flat = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat", "image_grid_pinpoints": None}
    model, tokenizer = build(parsed(flags, data, **flat), "sdpa")
    model.set_reduction(None)
    model.save_pretrained(tmp_path / "v15")
    tokenizer.save_pretrained(tmp_path / "v15")
    convert(str(tmp_path / "v15"), "hf", str(tmp_path / "hf"))
    lora = {"lora_enable": True, "lora_r": 4, "max_steps": 2, "save_strategy": "no"}
    train("lora", **TILES | data | lora, model_name_or_path=tmp_path / "hf")
    _, model, _, _ = load_pretrained_model(str(tmp_path / "lora"), None, "lora", device="cpu")
    stored = torch.load(tmp_path / "lora" / "non_lora_trainables.bin", weights_only=True)
    assert torch.equal(model.get_model().image_newline, stored["base_model.model.model.image_newline"])
    assert model.config.mm_patch_merge_type == "spatial_unpad" and model.config.image_grid_pinpoints == PINPOINTS
    assert model.reduction is not None and model.reduction.dominant == 10


def test_stage_one_hands_its_newline_to_stage_two(train, flags, data, tmp_path, caplog):
    off = dict.fromkeys(("dominant", "contextual", "layer_list", "image_token_ratio_list"))
    short = {"per_device_train_batch_size": 1, "max_steps": 2, "on_bad_sample": "skip"}
    train("first", captions=True, **TILES | data | off | short)
    stored = load_file(tmp_path / "first" / "mm_projector.safetensors")
    assert set(stored) == {f"model.mm_projector.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")} | {
        "model.image_newline"
    }
    args = parsed(flags, data, pretrain_mm_mlp_adapter=tmp_path / "first" / "mm_projector.bin", **off)
    model, _ = build(args, "sdpa")
    assert torch.equal(model.get_model().image_newline, stored["model.image_newline"])
    del stored["model.image_newline"]
    torch.save(stored, tmp_path / "v15.bin")  # LLaVA-1.5's projector has none: it starts from random numbers
    model, _ = build(parsed(flags, data, pretrain_mm_mlp_adapter=tmp_path / "v15.bin", **off), "sdpa")
    assert model.get_model().image_newline.abs().sum() > 0


def test_models_change_between_tiles_and_whole_pictures(flags, data, tmp_path, caplog):
    """A LLaVA-1.5 checkpoint gets a newline when it is trained with tiles, and loses it when trained without."""
    flat = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat", "image_grid_pinpoints": None}
    model, tokenizer = build(parsed(flags, data, **flat), "sdpa")
    assert not hasattr(model.get_model(), "image_newline")
    model.save_pretrained(tmp_path / "v15")
    tokenizer.save_pretrained(tmp_path / "v15")
    model, tokenizer = build(parsed(flags, data, model_name_or_path=tmp_path / "v15"), "sdpa")
    assert model.get_model().image_newline.requires_grad
    assert "has image_aspect_ratio 'pad' and is now trained with 'anyres'" in caplog.text
    model.save_pretrained(tmp_path / "v16")
    tokenizer.save_pretrained(tmp_path / "v16")
    again = parsed(flags, data, model_name_or_path=tmp_path / "v16", image_grid_pinpoints=None)
    assert build(again, "sdpa")[0].config.image_grid_pinpoints == again.data.image_grid_pinpoints == PINPOINTS
    back, _ = build(parsed(flags, data, model_name_or_path=tmp_path / "v16", **flat), "sdpa")
    assert not hasattr(back.get_model(), "image_newline") and "model.image_newline" not in back.state_dict()
    back.save_pretrained(tmp_path / "back")
    assert "model.image_newline" not in load_file(tmp_path / "back" / "model.safetensors")


def test_a_record_is_as_long_as_its_own_picture_makes_it(made):
    """150 x 60 pixels: 36 + 4 * 13 tokens, two rows being border; the largest picture would have 36 + 12 * 13."""
    off = dict.fromkeys(("dominant", "contextual", "layer_list", "image_token_ratio_list"))
    args, _, module = made(**off)
    dataset = module["train_dataset"].dataset
    assert args.data.visual_tokens_per_image == 36 + 12 * 13
    assert (
        args.data.count_visual_tokens(SIZES[0]) == 36 + 4 * 13
        and args.data.count_visual_tokens(SIZES[4]) == 36 + 4 * 19
    )
    text = len(dataset.encode(dataset.list_data_dict[0])["input_ids"]) - 1
    dataset.tokenizer.model_max_length = text + 36 + 4 * 13
    assert len(dataset[0]["input_ids"]) == text + 1, "it fits to the token"
    dataset.tokenizer.model_max_length -= 1
    report = dataset.preflight()
    assert "r0" in [bad.id for bad in report.bad] and report.counts["too long"] >= 2
    reduced = made()[0].data
    assert reduced.visual_tokens_per_image == 5 * 13 and reduced.count_visual_tokens(SIZES[0]) == 3 * 13


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_grid_pinpoints": None}, r"--image_aspect_ratio anyres: image_grid_pinpoints must be a list.*got None"),
        ({"image_grid_pinpoints": "[(84, 168"}, "--image_aspect_ratio anyres: .* cannot be read"),
        ({"image_grid_pinpoints": "[(336, 672)]"}, None),
        ({"image_grid_pinpoints": "[(100, 168)]"}, "100 x 168, which tiles of 84 x 84 pixels .* do not fill"),
        (
            {"image_aspect_ratio": "pad"},
            "--mm_patch_merge_type spatial_unpad lays out .* needs --image_aspect_ratio anyres",
        ),
        ({"image_aspect_ratio": "anyres_max_9"}, "--image_aspect_ratio anyres_max_9: expected square, pad or anyres"),
        ({"mm_patch_merge_type": "unpad"}, "--mm_patch_merge_type unpad: expected flat, spatial, spatial_unpad"),
    ],
)
def test_flags_that_do_not_fit(flags, data, overrides, message):
    if message is None:  # multiples of the tile fit, however many tiles they make
        assert build(parsed(flags, data, **overrides), "sdpa")[0] is not None
        return
    with pytest.raises(ValueError, match=message):
        build(parsed(flags, data, **overrides), "sdpa")


def test_scripts_take_the_flags():
    line = [
        "--image_aspect_ratio",
        "anyres",
        "--mm_patch_merge_type",
        "spatial_unpad",
        "--image_grid_pinpoints",
        PINPOINTS,
    ]
    stage = resolve("finetune_duet", env={}, overrides=line, accelerators=8).stages[-1]
    args = parse_arguments([*stage.arguments(), "--bf16", "False", "--deepspeed", ""])
    assert args.data.image_grid_pinpoints == PINPOINTS and args.model.mm_patch_merge_type == "spatial_unpad"
