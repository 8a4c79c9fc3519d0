"""Evaluation of a model with tiles: answers do not depend on the batch, and the ledger counts what its layers saw."""

import pytest
import torch
from v16_world import LAYERS, SIDE, SIZES, picture, write_original, write_tower

import duet
from duet import DuetConfig
from llava.eval.generate import Answerer, pack, preprocess
from llava.eval.ledger import ModelShape, costs, sample_metadata, summarise, tiled_tokens
from llava.eval.pictures import PictureBatches
from llava.model.builder import load_pretrained_model

REDUCED = DuetConfig(dominant=9, contextual=3, cluster_width=2, schedule={1: 0.5, 3: 0.0})


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    root = tmp_path_factory.mktemp("answers")
    folder = write_original(root / "m", write_tower(root / "tower"))
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), None, "llava-v1.6-tiny", device="cpu")
    return Answerer(model, tokenizer, processor, "vicuna_v1")


@pytest.mark.parametrize("config", [None, REDUCED], ids=["whole", "reduced"])
def test_answers_do_not_depend_on_the_batch(answerer, config):
    answerer.model.set_reduction(config)
    batch = [(f"What is {number}?", [picture(size)]) for number, size in enumerate(SIZES)]
    batch += [("Say something.", []), ("Both?", [picture(SIZES[0]), picture(SIZES[2])])]
    batch += [("And this?", batch[0][1])]  # one picture that two questions share
    together = answerer.answer(batch, 4)
    assert together == [answerer.answer([one], 4)[0] for one in batch]
    assert len(set(together)) > 3


@torch.no_grad()
@pytest.mark.parametrize("config", [None, REDUCED, DuetConfig(stage1="none", schedule={2: 0.5})], ids=str)
def test_ledger(answerer, config, tmp_path):
    """Three passes of a wide picture, five of a square one, and both; then text only."""
    answerer.model.set_reduction(config)
    samples = [[SIZES[0]], [SIZES[2]], [SIZES[0], SIZES[2]], []]
    files = []
    for sample in samples:
        files.append([tmp_path / f"{width}x{height}.png" for width, height in sample])
        for file, size in zip(files[-1], sample, strict=True):
            picture(size).save(file)
    pictures = PictureBatches([files], lambda path: [_open(path)], answerer.image_processor, answerer.model.config)
    loaded = pictures[0]
    assert loaded.passes == [3, 5, 8, 0] and loaded.sizes == [size for sample in samples for size in sample]
    ids = [answerer.prompt_ids("What?", count) for count in loaded.counts]
    with duet.trace(images=False) as trace:
        answerer.generate(ids, loaded.images(), loaded.sizes, 1)
    unreduced = tiled_tokens(answerer.model, loaded.sizes, loaded.counts)
    assert unreduced is not None
    wide, square = unreduced[:2]
    assert unreduced == [wide, square, wide + square, 0] and square == 36 + 12 * 13
    facts = sample_metadata(trace, [count * SIDE**2 for count in loaded.passes], None, unreduced)
    first = [row["visual"][0][0] for row in facts]
    assert first == ([12 * count for count in loaded.passes] if config is REDUCED else unreduced)
    found = summarise(facts, config, LAYERS)
    assert found["samples"] == 3
    if config is not None:
        assert found["untouched"].get("stage 1", 0) == 0
    tower = ModelShape.of(answerer.model).tower_flops(config)
    assert costs(facts, config, ModelShape.of(answerer.model))["tower_flops"] == pytest.approx(tower * 16 / 3)


def test_a_budget_above_the_picture_is_counted_as_untouched(answerer):
    config = DuetConfig(dominant=120, contextual=40, schedule={}, per="picture")
    answerer.model.set_reduction(config)
    sizes = [SIZES[3], SIZES[2]]  # 36 + 36 patches, and 180 of them
    batch = [("What?", [picture(size)]) for size in sizes]
    with duet.trace(images=False) as trace:
        answerer.answer(batch, 1)
    facts = sample_metadata(trace, [4 * 36, 5 * 36], None, tiled_tokens(answerer.model, sizes, [1, 1]))
    assert facts[0]["visual"][0][0] == facts[0]["unreduced"] and facts[1]["visual"][0][0] == 160
    assert summarise(facts, config, LAYERS)["untouched"] == {"stage 1": 1}


def test_equal_shapes_are_one_tensor(answerer):
    pixels = preprocess([picture(SIZES[0]), picture(SIZES[1])], answerer.image_processor, answerer.model.config)
    packed = pack(pixels)
    assert isinstance(packed, torch.Tensor) and packed.shape == (2, 3, 3, 24, 24)


def _open(path):
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")
