"""Features of a frozen tower on disk: the same bits, found by content, made again when anything else changes."""

import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

import duet
from duet import DuetConfig
from llava.model.multimodal_encoder import feature_cache
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.feature_cache import content_key, weights_digest

DUET = DuetConfig(dominant=6, contextual=2, schedule={2: 0.5})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tower")
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=28, patch_size=4, initializer_range=0.3)).save_pretrained(path)
    return path


@pytest.fixture
def tower(saved):
    class Arguments:
        mm_vision_select_layer = -2

    return CLIPVisionTower(str(saved), Arguments())


@pytest.fixture
def runs(tower):
    """Batch sizes of the tower's own runs."""
    seen = []
    tower.vision_tower.embeddings.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def pictures(*seeds):
    return torch.stack([torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.mark.parametrize("reduction", [None, DUET], ids=["full", "duet"])
def test_a_picture_runs_once(tower, runs, tmp_path, reduction):
    plain = tower(pictures(1, 2, 3), reduction=reduction)
    tower.keep_features(str(tmp_path), reduction)
    runs.clear()
    assert torch.equal(tower(pictures(1, 2, 3), reduction=reduction), plain)
    assert torch.equal(tower(pictures(3, 1), reduction=reduction), plain[[2, 0]])
    mixed = tower(pictures(2, 4), reduction=reduction)
    assert torch.equal(mixed[0], plain[1])
    assert runs == [3, 1]
    assert (tower.feature_cache.found, tower.feature_cache.made) == (3, 4)


def test_another_run_finds_what_is_there(saved, tower, runs, tmp_path):
    tower.keep_features(str(tmp_path), DUET)
    first = tower(pictures(1, 2), reduction=DUET)
    again = type(tower)(str(saved), type("Arguments", (), {"mm_vision_select_layer": -2}))
    again.keep_features(str(tmp_path), DUET)
    assert torch.equal(again(pictures(2, 1), reduction=DUET), first[[1, 0]])
    assert again.feature_cache.made == 0


def test_whatever_decides_the_tokens_has_entries_of_its_own(tower, runs, tmp_path):
    tower.keep_features(str(tmp_path), DUET)
    tower(pictures(1), reduction=DUET)
    later = DuetConfig(dominant=6, contextual=2, schedule={1: 0.25}, queries="all")
    tower(pictures(1), reduction=later)
    assert runs == [1], "what happens in the decoder changes nothing here"
    for other in (DuetConfig(dominant=7, contextual=2), DuetConfig(dominant=6, contextual=2, variant="release"), None):
        tower(pictures(1), reduction=other)
    assert runs == [1, 1, 1, 1]
    tower(pictures(1).bfloat16(), reduction=DUET)
    assert runs == [1, 1, 1, 1, 1], "rounded pixels are another picture"
    with torch.no_grad():
        tower.vision_tower.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    tower.keep_features(str(tmp_path), DUET)
    tower(pictures(1), reduction=DUET)
    assert len(runs) == 6, "other weights"


def test_a_damaged_entry_is_made_again(tower, runs, tmp_path):
    tower.keep_features(str(tmp_path), None)
    whole = tower(pictures(1))
    (entry,) = tmp_path.rglob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-5])
    assert torch.equal(tower(pictures(1)), whole)
    assert runs == [1, 1]
    assert load_file(entry)["tokens"].shape == whole[0].shape


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(tower, runs, tmp_path, monkeypatch, caplog):
    plain = tower(pictures(1, 2))
    tower.keep_features(str(tmp_path), None)

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(feature_cache, "save_file", full)
    assert torch.equal(tower(pictures(1, 2)), plain)
    assert torch.equal(tower(pictures(1, 2)), plain)
    assert [record.message.count("No space left") for record in caplog.records] == [1], "said once"
    assert not list(tmp_path.rglob("*.part"))


def test_a_trace_of_patches_needs_the_tower(tower, runs, tmp_path):
    tower.keep_features(str(tmp_path), DUET)
    tower(pictures(1), reduction=DUET)
    with duet.trace() as trace:
        tower(pictures(1), reduction=DUET)
    assert len(trace.images) == 1 and len(runs) == 2


@pytest.mark.parametrize(
    ("reduction", "reason"),
    [
        (DuetConfig(stage1="cdpruner", dominant=6, contextual=2), "looks at the question"),
        (DuetConfig(stage1="divprune", dominant=6, contextual=2), "projector learns"),
    ],
)
def test_methods_that_look_further_are_refused(tower, tmp_path, reduction, reason):
    with pytest.raises(ValueError, match=rf"--feature_cache .* cannot be used: .*{reason}"):
        tower.keep_features(str(tmp_path), reduction)


def test_a_tower_that_learns_is_refused(tower, tmp_path):
    tower.requires_grad_(True)
    with pytest.raises(ValueError, match="the vision tower is trained"):
        tower.keep_features(str(tmp_path), None)


def test_keys_tell_pictures_apart(tower):
    zeros = torch.zeros(3, 4, 4)
    other = zeros.clone()
    other[2, 3, 3] = -0.0
    assert content_key(zeros) == content_key(zeros.clone())
    assert len({content_key(one) for one in (zeros, other, zeros.bfloat16(), torch.zeros(3, 2, 8))}) == 4
    assert weights_digest(tower) == weights_digest(tower)
