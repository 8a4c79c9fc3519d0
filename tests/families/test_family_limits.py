"""What a family does at the edges: other towers, pictures of very many tiles, new pictures for a reduced cache."""

import pytest
import torch
import transformers as hf
from models import CASES, IMAGE, TOWER, _build, _llama, _siglip

import duet
from duet import DuetConfig
from duet.families.anyres import Layout

CONFIG = DuetConfig(dominant=8, contextual=2, schedule={2: 0.5})


@torch.no_grad()
def test_llava_with_a_siglip_tower():
    config = hf.LlavaConfig(
        vision_config=_siglip(), text_config=_llama(), image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    model = _build(hf.LlavaForConditionalGeneration, config, 0, "sdpa")
    inputs = CASES["llava"].batch(model, "right")
    plain = model(**inputs).logits
    with duet.attach(model, DuetConfig.none()):
        assert torch.equal(
            model(**inputs).logits[inputs["attention_mask"].bool()], plain[inputs["attention_mask"].bool()]
        )
    with duet.attach(model, CONFIG) as handle, duet.trace() as record:
        model(**inputs)
    assert not handle.facts.class_token and record.passes[0][0].visual == [10, 20, 0]


def test_llava_with_a_tower_that_is_not_known():
    text, vision = _llama(), hf.PixtralVisionConfig(**TOWER | {"head_dim": 8})
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text))
    with pytest.raises(ValueError, match=r"PixtralVisionModel is not supported; CLIPVisionModel.*add-a-family"):
        duet.attach(model, CONFIG)


@torch.no_grad()
def test_a_picture_that_the_model_shrinks_below_the_budget_stays_as_it_makes_it():
    case = CASES["llava_onevision"]
    model = case.build()
    model.config.vision_aspect_ratio = "anyres_max_1"  # from four tiles to about one
    layout = Layout.of((48, 48), model.config.image_grid_pinpoints, 24, 6, 1)
    inputs = case.inputs(model, [(2, [("image", (48, 48))], 4)])
    assert layout.placeholders < 5 * 20
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    plain = model(**inputs).logits
    with duet.attach(model, DuetConfig(dominant=16, contextual=4, schedule={})), duet.trace() as record:
        assert torch.equal(model(**inputs).logits, plain)
    assert record.passes[0][0].visual == [layout.placeholders]


@torch.no_grad()
@pytest.mark.parametrize("family", list(CASES))
def test_a_reduced_cache_takes_no_new_pictures(family):
    case = CASES[family]
    model = case.build()
    inputs = case.inputs(model, [next(iter(case.samples.values()))])
    with duet.attach(model, case.config):
        cache = model(**inputs, use_cache=True).past_key_values
        again = torch.tensor([[5, 6]])
        assert model(input_ids=again, past_key_values=cache).logits.shape[1] == 2
        with pytest.raises(ValueError, match="a reduced cache cannot take new pictures"):
            model(**inputs, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("family", list(CASES))
def test_embeddings_in_place_of_ids(family):
    case = CASES[family]
    model = case.build()
    inputs = case.batch(model)
    with duet.attach(model, case.config):
        wanted = model(**inputs).logits
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        assert torch.equal(model(**inputs).logits, wanted)
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize("family", list(CASES))
def test_placeholders_that_do_not_fit_the_pictures(family):
    case = CASES[family]
    model = case.build()
    inputs = case.inputs(model, [next(iter(case.samples.values()))])
    missing = inputs["input_ids"].clone()
    missing[missing == IMAGE] = torch.where(torch.arange(int((missing == IMAGE).sum())) == 0, 5, IMAGE)
    with (
        duet.attach(model, case.config),
        pytest.raises(ValueError, match=r"image\(s\) were given, but the samples hold"),
    ):
        model(**inputs | {"input_ids": missing})


@pytest.mark.parametrize("family", list(CASES))
def test_a_mask_that_hides_placeholders(family):
    case = CASES[family]
    model = case.build()
    inputs = case.inputs(model, [next(iter(case.samples.values()))])
    mask = inputs["attention_mask"].clone()
    mask[0, int((inputs["input_ids"][0] == IMAGE).nonzero()[0])] = 0
    with duet.attach(model, case.config), pytest.raises(ValueError, match=r"attention_mask is 0 at \[1\] image"):
        model(**inputs | {"attention_mask": mask})
