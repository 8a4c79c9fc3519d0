"""`positions="patch"`: tokens are counted as if nothing had been taken out of the pictures."""

import pytest
import torch
from model_helpers import IMAGE, golden_model, pad_batch, pixels, prompt

import duet
import llava.model.language_model.decoder as decoder
from duet import DuetConfig

CONFIG = DuetConfig(dominant=60, contextual=5, schedule={4: 0.5}, positions="patch")
PATCHES = 576


class Entered(Exception):
    """Carries what entered the decoder."""

    def __init__(self, values):
        super().__init__()
        self.values = values


def entering(monkeypatch, run):
    """Arguments of `run_decoder`."""

    def stop(*args, **kwargs):
        raise Entered(kwargs)

    with monkeypatch.context() as patched, pytest.raises(Entered) as caught:
        patched.setattr(decoder, "run_decoder", stop)
        run()
    return caught.value.values


def test_text_and_patches_keep_the_numbers_of_the_whole_prompt(monkeypatch):
    model = golden_model().eval()
    model.set_reduction(CONFIG)
    ids, mask = pad_batch([prompt([5, 9], IMAGE, [13, 17], IMAGE, [19, 4, 6]), prompt([21, 22, 23])], "right")
    images = torch.stack([pixels("coffee"), pixels("flower_tall")])
    with duet.trace() as trace:
        sent = entering(monkeypatch, lambda: model(ids, attention_mask=mask, images=images))
    positions, visual = sent["position_ids"][0], sent["visual_mask"][0]
    before = int(visual.int().argmax())
    first, second = (torch.tensor(image.source) for image in trace.images)
    assert torch.equal(positions[visual][:65], before + first)
    assert torch.equal(positions[visual][65:], before + PATCHES + 2 + second)
    text = positions[~visual]
    assert text[:before].tolist() == list(range(before))
    assert text[before : before + 2].tolist() == [before + PATCHES, before + PATCHES + 1]
    assert int(sent["next_position"][0]) == int(text.max()) + 1 == len(text) + 2 * PATCHES
    length = int(sent["attention_mask"][1].sum())
    assert sent["position_ids"][1][:length].tolist() == list(range(length))
    assert int(sent["next_position"][1]) == length


def test_without_a_stage_1_nothing_changes_to_kept_positions():
    model = golden_model().eval()
    ids, images = torch.tensor([prompt([5, 9], IMAGE, [13])]), pixels("coffee")[None]
    logits = []
    for positions in ("original", "patch"):
        model.set_reduction(DuetConfig(stage1="none", schedule={4: 0.25}, positions=positions))
        with torch.no_grad():
            logits.append(model(ids, images=images).logits)
    assert torch.equal(*logits)


def test_a_prompt_that_ends_with_a_picture_goes_on_behind_it():
    model = golden_model().eval()
    model.set_reduction(CONFIG)
    settings = {"images": pixels("coffee")[None], "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    ids = torch.tensor([prompt([5, 9], IMAGE)])
    cached = model.generate(ids, pad_token_id=0, **settings)
    assert torch.equal(cached, model.generate(ids, pad_token_id=0, use_cache=False, **settings))


def test_labels_train():
    model = golden_model().train()
    model.set_reduction(CONFIG)
    ids, mask = pad_batch([prompt([5, 9], IMAGE, [13, 17]), prompt(IMAGE, [21, 22, 23])], "right")
    images = torch.stack([pixels("coffee"), pixels("flower_tall")])
    labels = ids.masked_fill(mask == 0, -100).masked_fill(ids == IMAGE, -100)
    loss = model(ids, attention_mask=mask, images=images, labels=labels).loss
    loss.backward()
    assert loss.isfinite() and model.get_model().mm_projector[0].weight.grad.abs().sum() > 0


def test_what_cannot_work_is_refused(tmp_path):
    model = golden_model().eval()
    ids, images = torch.tensor([prompt([5, 9], IMAGE, [13])]), pixels("coffee")[None]
    model.set_reduction(DuetConfig(stage1="downsample", dominant=64, contextual=0, schedule={}, positions="patch"))
    with pytest.raises(ValueError, match="positions='auto'"):
        model(ids, images=images)
    model.set_reduction(CONFIG)
    with pytest.raises(ValueError, match="have tiles"):
        model(ids, images=[images.expand(3, -1, -1, -1)])
    with pytest.raises(ValueError, match=r"feature_cache .* which patches were kept"):
        model.get_vision_tower().keep_features(str(tmp_path), CONFIG)
    model.config.image_aspect_ratio = "anyres"
    with pytest.raises(ValueError, match="anyres"):
        model.set_reduction(CONFIG)
