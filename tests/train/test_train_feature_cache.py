"""--feature_cache: the tower runs once for each picture, and the losses are those without it, to the bit."""

import json

import pytest
import train_world

from llava.model.multimodal_encoder.feature_cache import FeatureCache

EPOCHS = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "no"}


@pytest.fixture
def counts(monkeypatch):
    """The caches of the runs."""
    made = []
    start = FeatureCache.__init__

    def remember(self, *args):
        start(self, *args)
        made.append(self)

    monkeypatch.setattr(FeatureCache, "__init__", remember)
    return made


@pytest.mark.parametrize("reduction", ["duet", "full"])
def test_losses_are_the_same_to_the_bit(train, tmp_path, counts, reduction):
    off = {"dominant": None, "contextual": None, "layer_list": None, "image_token_ratio_list": None}
    flags = EPOCHS | (off if reduction == "full" else {})
    train("plain", **flags)
    train("cached", **flags, feature_cache=tmp_path / "cache")
    plain, cached = train_world.losses(tmp_path, "plain"), train_world.losses(tmp_path, "cached")
    assert len(plain) == 16 and cached == plain
    assert counts[0].made == 13, "12 pictures and the blank one of text-only batches, each in the first epoch only"

    train("again", **flags, feature_cache=tmp_path / "cache")
    assert train_world.losses(tmp_path, "again") == plain
    assert counts[1].made == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"unfreeze_mm_vision_tower": True}, "the vision tower is trained"),
        ({"stage1": "divprune"}, "the projector learns"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": json.dumps([[84, 168]])}, "keeps whole pictures"),
    ],
)
def test_where_it_cannot_be_exact_it_is_refused(train, tmp_path, given, message):
    with pytest.raises(ValueError, match=f"--feature_cache .*{message}"):
        train(**given, feature_cache=tmp_path / "cache")
