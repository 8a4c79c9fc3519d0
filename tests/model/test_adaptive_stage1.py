"""Stage 1 that differs from picture to picture: ragged counts, questions and tiles on their way through the splice."""

import types

import pytest
import torch
from model_helpers import IMAGE, golden_model, pad_batch, pixels, prompt

import duet
from duet import DuetConfig
from llava.eval.__main__ import default_name
from llava.serve.cli import describe_reduction
from llava.train.plan_text import budget_line

ADAPTIVE = DuetConfig(stage1="prumerge_adaptive", schedule={4: 0.5})
ASKED = DuetConfig(stage1="cdpruner", dominant=40, contextual=0, schedule={4: 0.5})


def batch():
    """One picture, text only (with a placeholder picture), and two pictures."""
    rows = [prompt([5, 6], IMAGE, [7, 8, 9, 10]), prompt([11, 12, 13]), prompt(IMAGE, [14], IMAGE, [15, 16])]
    ids, mask = pad_batch(rows, "right")
    pictures = [pixels("coffee"), torch.zeros(3, 336, 336), pixels("astronaut"), pixels("coffee").flip(2)]
    return {"input_ids": ids, "attention_mask": mask, "images": torch.stack(pictures)}


def singles():
    whole = batch()
    pictures, spans = whole["images"], [slice(0, 1), slice(1, 2), slice(2, 4)]
    rows = [ids[mask.bool()][None] for ids, mask in zip(whole["input_ids"], whole["attention_mask"], strict=True)]
    return [{"input_ids": ids, "images": pictures[span]} for ids, span in zip(rows, spans, strict=True)]


@pytest.fixture(scope="module")
def model():
    return golden_model().eval()


@pytest.mark.parametrize("config", [ADAPTIVE, ASKED], ids=["adaptive", "asked"])
@torch.no_grad()
def test_a_batch_equals_its_samples(model, config):
    model.set_reduction(config)
    with duet.trace() as seen:
        together = model(**batch()).logits
    counts = [len(image.source) for image in seen.images]
    entering = [counts[0], 0, counts[2] + counts[3]]
    assert [layer.visual for layer in seen.passes[0]] == [entering, [n // 2 for n in entering]]
    assert len(set(counts)) > 1 if config.adaptive else counts == [40] * 4
    for row, single in enumerate(singles()):
        alone = model(**single).logits[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_pictures_come_as_a_list_where_they_differ(model):
    model.set_reduction(ADAPTIVE)
    pictures = batch()["images"]
    features = model.encode_images(pictures)
    assert isinstance(features, list) and len({len(one) for one in features}) > 1
    for picture, one in zip(pictures, features, strict=True):
        (alone,) = model.encode_images(picture[None])
        torch.testing.assert_close(one, alone, atol=1e-5, rtol=0)
    tower = model.get_vision_tower()
    listed = tower([pictures[0], pictures[2]], reduction=ADAPTIVE)
    assert [tuple(one.shape[:2]) for one in listed] == [(1, len(features[0])), (1, len(features[2]))]


def test_what_is_printed_names_no_number(model):
    model.set_reduction(ADAPTIVE)
    assert "576 patches -> as many visual tokens per picture as it needs (prumerge_adaptive)" in describe_reduction(
        model
    )
    assert default_name("m", model) == "m-duet-prumerge_adaptive"
    line = budget_line(ADAPTIVE, types.SimpleNamespace(patches=576, layers=8))
    assert line == "576 patches -> as many enter as a picture needs (prumerge_adaptive); kept: 0.5 after layer 4"
    model.set_reduction(None)
    with duet.attach(model, ADAPTIVE) as handle:
        assert "as many visual tokens per image as it needs" in repr(handle) and "average" not in repr(handle)


@torch.no_grad()
def test_generation_after_a_ragged_prompt(model):
    model.set_reduction(ADAPTIVE)
    whole = batch()
    options = {"max_new_tokens": 3, "do_sample": False}
    together = model.generate(whole["input_ids"], whole["images"], attention_mask=whole["attention_mask"], **options)
    for row, single in enumerate(singles()):
        assert torch.equal(model.generate(single["input_ids"], single["images"], **options)[0], together[row])


def test_training_on_a_ragged_batch():
    model = golden_model()
    model.set_reduction(ADAPTIVE)
    model.train()
    whole = batch()
    labels = whole["input_ids"].masked_fill((whole["attention_mask"] == 0) | (whole["input_ids"] == IMAGE), -100)
    labels[:, :3] = -100
    model(**whole, labels=labels).loss.backward()
    gradient = model.get_model().mm_projector[0].weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def sources(model, **inputs):
    with duet.trace() as seen, torch.no_grad():
        model(**inputs)
    return [image.source for image in seen.images]


def test_a_shared_picture_is_encoded_once_per_question(model):
    model.set_reduction(ASKED)
    picture = pixels("coffee")
    ids = torch.tensor([prompt([5], IMAGE, [7, 8]), prompt([5], IMAGE, [90, 91]), prompt([6], IMAGE, [7, 8])])
    ids = torch.cat([ids, ids[:1]])
    shared = sources(model, input_ids=ids, images=[picture] * 4)
    assert len(shared) == 4, "every row asks for itself"
    assert shared[0] == shared[2] == shared[3] != shared[1]
    twice = torch.tensor([prompt(IMAGE, [7], IMAGE, [8])])
    assert len(sources(model, input_ids=twice, images=[picture] * 2)) == 1
    model.set_reduction(DuetConfig(stage1="divprune", dominant=40, contextual=0, schedule={}))
    assert len(sources(model, input_ids=ids, images=[picture] * 4)) == 1


def test_answers_and_padding_do_not_ask(model):
    model.set_reduction(ASKED)
    ids = torch.tensor([prompt([5], IMAGE, [7, 8, 9, 10])])
    labels = ids.clone()
    labels[:, :-2] = -100
    picture = pixels("coffee")[None]
    asked = sources(model, input_ids=ids[:, :-2], images=picture)
    assert sources(model, input_ids=ids, images=picture, labels=labels) == asked
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    assert sources(model, input_ids=ids, images=picture, attention_mask=mask) == asked
    assert sources(model, input_ids=ids, images=picture) != asked


@pytest.mark.parametrize("stage1", ["divprune", "cdpruner"])
def test_a_projector_of_another_precision(stage1):
    model = golden_model().eval()
    model.get_vision_tower().to(torch.bfloat16)
    model.set_reduction(DuetConfig(stage1=stage1, dominant=20, contextual=0, schedule={}))
    with torch.no_grad():
        features = model.encode_images(pixels("coffee")[None])
    assert features.shape == (1, 20, 64) and features.isfinite().all() and features.dtype == torch.float32


class Spy:
    """A text encoder that remembers what it was asked and knows nothing."""

    def __init__(self):
        self.questions = []

    def __call__(self, questions):
        from duet.question import MeanQuestion

        self.questions.append(questions)
        return MeanQuestion(torch.zeros(len(questions), 64))


def test_an_attached_text_encoder_reads_token_ids(model):
    model.set_reduction(None)
    spy = Spy()
    with duet.attach(model, ASKED, text_encoder=spy):
        sources(model, **batch())
    assert spy.questions == [[[7, 8, 9, 10], [], [14, 15, 16]]]
    assert model.reduction is None


@pytest.fixture
def tiled(model):
    """The model with a configuration of three tower passes per picture."""
    model.config.image_grid_pinpoints = [[336, 672], [672, 336]]
    yield model
    del model.config.image_grid_pinpoints
    model.config.mm_patch_merge_type = "flat"


def test_tiles_of_one_picture_share_a_budget(tiled):
    tiled.set_reduction(DuetConfig(stage1="hired", dominant=30, contextual=0, schedule={}))
    stack = torch.stack([pixels("coffee"), pixels("coffee").flip(1), torch.zeros(3, 336, 336)])
    ids = torch.tensor([prompt([5], IMAGE, [7])])
    kept = sources(tiled, input_ids=ids, images=[stack], image_sizes=[(300, 600)])
    assert len(kept) == 3 and len(kept[0]) == 45 and sum(map(len, kept)) == 90
    alone = sources(tiled, input_ids=ids, images=[stack])  # without sizes nobody knows how the tiles lie
    assert [len(one) for one in alone] == [30, 30, 30]
    tiled.config.mm_patch_merge_type = "spatial"
    base, tiles = sources(tiled, input_ids=ids, images=[stack], image_sizes=[(300, 600)])
    assert base == kept[0] and tiles == kept[1] + [576 + patch for patch in kept[2]]


def test_tiles_hear_the_question_of_their_picture(tiled):
    tiled.set_reduction(ASKED)
    stack = torch.stack([pixels("coffee"), pixels("coffee"), pixels("coffee")])
    ids = torch.tensor([prompt([5], IMAGE, [7, 8]), prompt([5], IMAGE, [90, 91])])
    for sizes in ([(300, 600)] * 2, None):
        kept = sources(tiled, input_ids=ids, images=[stack, stack.clone()], image_sizes=sizes)
        assert kept[0] == kept[1] == kept[2] != kept[3] == kept[4] == kept[5]


def test_merging_over_time_is_refused(model):
    with pytest.raises(ValueError, match="across_frames merges the frames of a video"):
        model.set_reduction(DuetConfig(dominant=4, contextual=2, across_frames=5))
