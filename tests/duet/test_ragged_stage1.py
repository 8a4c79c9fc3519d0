"""Images with different numbers of tokens: what stage 1 hands on, what the decoder sees, and what a trace says."""

import pytest
import small
import torch
from dense import model

import duet
from duet import DuetConfig, attach, trace
from duet.stage1 import TowerOutput, VisionReduction, keep_marked, keep_patches
from duet.tracing import ImageRecord, Trace

CONFIG = DuetConfig(stage1="prumerge_adaptive", options={"fence": 0.8}, schedule={2: 0.5, 4: 0.0})


def tower_output():
    features = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    return TowerOutput(features, None, False, (2, 4), torch.zeros(3, 3, 2, 2))  # type: ignore[arg-type]


def test_marked_patches_come_in_raster_order_with_padding_behind():
    marks = torch.zeros(3, 8, dtype=torch.bool)
    marks[0, [1, 5, 6]] = marks[2, [7]] = True
    output = tower_output()
    out = keep_marked(output, marks)
    assert out.counts.tolist() == [3, 0, 1] and out.tokens.shape == (3, 3, 4)
    assert [row.tolist() for row in out.per_image(out.source)] == [[1, 5, 6], [], [7]]
    assert torch.equal(out.per_image(out.tokens)[0], output.features[0, [1, 5, 6]])
    assert not out.tokens[1].any() and not out.tokens[2, 1:].any() and (out.source[2, 1:] == -1).all()


def test_without_counts_every_token_is_real():
    out = keep_patches(tower_output(), torch.tensor([[3, 1]] * 3))
    assert out.counts is None
    assert [row.tolist() for row in out.per_image(out.source)] == [[1, 3]] * 3


@pytest.fixture(scope="module")
def counts():
    with torch.no_grad():
        out = duet.encode_vision(model().model.vision_tower, small.pixels(3), config=CONFIG)
    assert isinstance(out, VisionReduction) and len(set(out.counts.tolist())) > 1, "all alike would test nothing"
    return out.counts.tolist()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixed_batch_equals_its_samples(counts, side):
    with attach(model(), CONFIG):
        with trace() as seen:
            together = model()(**small.mixed_batch(side)).logits
        for row, single in enumerate(small.mixed_singles()):
            alone = model()(**single).logits[0]
            got = together[row, -len(alone) :] if side == "left" else together[row, : len(alone)]
            assert torch.allclose(got, alone, atol=1e-5)
    entering = [counts[0], 0, counts[1] + counts[2]]
    assert [layer.visual for layer in seen.passes[0]] == [entering, [n // 2 for n in entering], [0, 0, 0]]
    assert [len(image.source) for image in seen.images] == counts
    mean = sum((n * 2 + (n // 2) * 2) / small.LAYERS for n in entering if n) / 2
    assert seen.average_tokens() == pytest.approx(mean)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_goes_on_after_a_ragged_prompt(counts, beams):
    del counts
    batch = small.mixed_batch("left")
    with attach(model(), CONFIG):
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        together = model().generate(**batch, **options)[:, -4:]
        for row, single in enumerate(small.mixed_singles()):
            assert torch.equal(model().generate(**single, **options)[0, -4:], together[row])


def test_labels_and_gradients_of_a_ragged_batch(counts):
    del counts
    training = small.build().train()
    batch = small.mixed_batch("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-6] = -100
    labels[labels == small.IMAGE_TOKEN] = -100
    with attach(training, CONFIG):
        loss = training(**batch, labels=labels).loss
        loss.backward()
        singles, supervised = [], []
        for row, single in enumerate(small.mixed_singles()):
            own = labels[row : row + 1, : single["input_ids"].shape[1]]
            supervised.append(int((own[:, 1:] != -100).sum()))
            if supervised[-1]:
                singles.append(training(**single, labels=own).loss.item() * supervised[-1])
    assert loss.item() == pytest.approx(sum(singles) / sum(supervised), abs=1e-5)
    assert training.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def record(tokens):
    return ImageRecord((2, 4), list(range(tokens)), ["dominant"] * tokens, [])


def visual(*counts):
    mask = torch.zeros(len(counts), 12, dtype=torch.bool)
    for row, count in enumerate(counts):
        mask[row, 1 : 1 + count] = True
    return mask


def test_a_trace_deals_images_out_by_their_own_lengths():
    def dealt(lengths, *rows):
        images = [record(n) for n in lengths]
        return [(images.index(image), start) for image, start in Trace(True, images).claim(visual(*rows))]

    assert dealt([3, 5, 2], 3, 7) == [(0, 0), (1, 3), (2, 8)]
    assert dealt([3, 5, 2], 3, 0, 2) == [(0, 0), (2, 3)]  # the text-only row brings a placeholder of its own length
    assert dealt([3, 0, 2], 3, 2) == [(0, 0), (2, 3)]  # a tile without tokens has no position
    assert dealt([3, 5], 4, 4) == []  # the rows do not hold whole images, so nothing can be said
    assert dealt([3, 5], 3, 9) == []
