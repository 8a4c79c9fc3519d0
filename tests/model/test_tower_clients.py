"""What LLaVA's clients do to the vision tower: hooks, replaced forwards, `feature_select`, parts by their old names."""

import copy

import pytest
import torch
from model_helpers import IMAGE, golden_model, pixels, prompt
from transformers import CLIPVisionModel as StockModel

import duet
from duet import DuetConfig
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

IDS = torch.tensor([prompt([5, 6], IMAGE, [7, 8])])
LANGUAGE_ONLY = DuetConfig(stage1="none", dominant=0, contextual=0, schedule={4: 0.5, 6: 0.0})
BOTH = DuetConfig(dominant=60, contextual=5, schedule={4: 0.5})


@pytest.fixture(scope="module")
def model():
    return golden_model().eval()


def look(model):
    with torch.no_grad():
        return model(input_ids=IDS, images=pixels("coffee")[None]).logits


@pytest.fixture
def calm(model):
    """The model without a reduction, whatever a test did to it."""
    yield model
    model.set_reduction(None)
    tower = model.get_vision_tower()
    for module in (tower, tower.vision_tower):
        vars(module).pop("forward", None)


@pytest.mark.parametrize("config", [None, LANGUAGE_ONLY], ids=["plain", "language only"])
def test_hooks_and_replaced_forwards_of_the_tower_act_where_it_is_not_reduced(calm, config):
    calm.set_reduction(config)
    inner = calm.get_vision_tower().vision_tower
    before, seen = look(calm), []
    handles = [
        inner.register_forward_hook(lambda module, args, output: seen.append(len(output.hidden_states))),
        inner.encoder.layers[-1].register_forward_hook(lambda *_: seen.append("last layer")),
    ]
    assert torch.equal(look(calm), before) and seen == ["last layer", 25]
    for handle in handles:
        handle.remove()
    own = inner.forward
    inner.forward = lambda *args, **kwargs: own(torch.zeros_like(args[0]), *args[1:], **kwargs)
    assert not torch.equal(look(calm), before)


def test_a_forward_replaced_on_the_class_acts(calm, monkeypatch):
    before, calls, own = look(calm), [], StockModel.forward
    monkeypatch.setattr(StockModel, "forward", lambda self, *a, **k: calls.append(1) or own(self, *a, **k))
    assert torch.equal(look(calm), before) and calls


def test_all_tokens_are_those_of_the_reduced_path_to_the_bit(calm):
    tower = calm.get_vision_tower()
    image = pixels("coffee")[None]
    expected = duet.encode_vision(tower.vision_tower, image, select_layer=tower.select_layer).tokens
    with torch.no_grad(), duet.trace() as seen:
        assert torch.equal(tower(image), expected)
    assert len(seen.images) == 1


def test_feature_select_of_a_project_chooses(calm, monkeypatch):
    tower = calm.get_vision_tower()
    outs = tower.vision_tower(pixels("coffee")[None], output_hidden_states=True)
    assert torch.equal(tower.feature_select(outs), outs.hidden_states[-2][:, 1:])
    monkeypatch.setattr(CLIPVisionTower, "feature_select", lambda self, outs: outs.hidden_states[-2][:, 1:9])
    assert look(calm).shape[1] == 5 + 8
    with pytest.raises(ValueError, match="mm_vision_select_layer is -30, but the tower has 24 blocks"):
        tower.select_layer = -30
        monkeypatch.undo()
        look(calm)
    tower.select_layer = -2


def test_parts_are_found_by_their_old_names_and_nothing_is_stored_twice(calm):
    tower = calm.get_vision_tower()
    assert tower.vision_tower.vision_model.encoder.layers[-2] is tower.vision_tower.encoder.layers[-2]
    assert isinstance(tower.vision_tower, StockModel)
    assert not [key for key in calm.state_dict() if "vision_model" in key]
    twin = copy.deepcopy(tower.vision_tower)
    assert twin.vision_model is twin


def test_old_towers_load_and_save_as_before(tmp_path):
    from types import SimpleNamespace

    from model_helpers import CLIP

    args = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")
    tower = CLIPVisionTower(str(CLIP), args)
    tower.vision_tower.save_pretrained(tmp_path)
    again = CLIPVisionTower(str(tmp_path), args)
    stock = StockModel.from_pretrained(tmp_path).state_dict()
    for key, value in tower.vision_tower.state_dict().items():
        assert torch.equal(value, again.vision_tower.state_dict()[key]) and torch.equal(value, stock[key])


def replace_forward(tower, kind):
    own = tower.vision_tower

    def plain(images):
        return own(images, output_hidden_states=True).hidden_states[-2][:, 1:]

    tower.forward = plain if kind == "images" else lambda images, **_: plain(images)


@pytest.mark.parametrize("kind", ["images", "images and what comes"])
def test_a_forward_of_another_project_works_or_is_refused_where_stage_1_would_be_lost(calm, kind):
    before = look(calm)
    replace_forward(calm.get_vision_tower(), kind)
    assert torch.equal(look(calm), before)
    calm.set_reduction(LANGUAGE_ONLY)
    assert look(calm).shape[1] == 5
    calm.set_reduction(BOTH)
    with pytest.raises(ValueError, match=r"CLIPVisionTower.forward \(of test_tower_clients\).*stage1='none'"):
        look(calm)


def test_a_subclass_with_the_old_signature_is_refused_the_same_way(calm):
    class Fork(CLIPVisionTower):
        def forward(self, images):
            return super().forward(images)

    calm.set_reduction(BOTH)
    tower = calm.get_vision_tower()
    try:
        tower.__class__ = Fork
        with pytest.raises(ValueError, match=r"Fork.forward \(of test_tower_clients\) takes no 'project'"):
            look(calm)
    finally:
        tower.__class__ = CLIPVisionTower
