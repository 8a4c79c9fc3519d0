"""The trace says of every patch what became of it."""

import pytest
import small
import torch

import duet
from duet import DuetConfig

CONFIG = DuetConfig(dominant=10, contextual=3, cluster_width=3, schedule={2: 0.5, 4: 0.0})


@torch.no_grad()
def test_every_patch_of_every_image_has_a_fate():
    model = small.build()
    with duet.attach(model, CONFIG), duet.trace(model) as record:
        model(**small.mixed_batch("left"))
    assert len(record.images) == 3
    joint = [image for image in record.images[1:]]  # the last two images share a sample and are ranked together
    assert [len(record.images[0].kept_after[2]), sum(len(i.kept_after[2]) for i in joint)] == [6, 13]
    for image in record.images:
        assert image.grid == (6, 6) and len(image.source) == 13 and image.kept_after[4] == []
        fate = image.fate()
        assert len(fate) == 36
        kept = [p for p, text in enumerate(fate) if text.startswith("kept as token")]
        merged = {p for p, text in enumerate(fate) if "merged into token" in text}
        assert kept == sorted(image.source[:10])
        assert merged == {p for group in image.members for p in group}
        assert sum(text == "dropped in stage 1" for text in fate) == 36 - 10 - len(merged)
        for token, patch in enumerate(image.source[:10]):
            note = "dropped after layer 4" if token in image.kept_after[2] else "dropped after layer 2"
            assert fate[patch].endswith(note)


@torch.no_grad()
def test_counts_per_layer_are_measured():
    model = small.build()
    with duet.attach(model, CONFIG), duet.trace(images=False) as record:
        model(**small.mixed_batch("left"))
    assert not record.images
    assert [(s.start, s.stop, s.visual) for s in record.passes[0]] == [
        (0, 2, [13, 0, 26]), (2, 4, [6, 0, 13]), (4, 6, [0, 0, 0]),
    ]  # fmt: skip
    one, two = CONFIG.average_tokens(36, 6), (26 * 2 + 13 * 2) / 6
    assert record.average_tokens() == pytest.approx((one + two) / 2)


@torch.no_grad()
def test_a_run_without_reduction_is_counted_too():
    model = small.build()
    with duet.attach(model, DuetConfig.none()), duet.trace() as record:
        model(**small.mixed_singles()[0])
    assert record.average_tokens() == 36


@torch.no_grad()
def test_nothing_is_recorded_outside_or_without_images():
    model = small.build()
    with duet.attach(model, CONFIG):
        with duet.trace() as record:
            pass
        model(**small.mixed_singles()[0])
        with duet.trace() as text_only:
            model(**small.mixed_singles()[1])
    assert not record.images and not record.passes
    with pytest.raises(ValueError, match="no sample with an image"):
        text_only.average_tokens()


@torch.no_grad()
def test_placeholder_images_of_text_only_samples_are_skipped():
    model = small.build()
    tower, decoder = model.model.vision_tower, model.model.language_model
    visual = torch.zeros(3, 20, dtype=torch.bool)
    visual[0, 2:15] = visual[2, 4:17] = True  # the middle sample is text only and brings a placeholder image
    with duet.trace() as record:
        duet.encode_vision(tower, small.pixels(3), config=CONFIG)
        duet.run_decoder(decoder, torch.randn(3, 20, 32), visual_mask=visual, config=CONFIG)
    assert [len(image.kept_after.get(2, [])) for image in record.images] == [6, 0, 6]
    assert record.images[1].kept_after == {}
