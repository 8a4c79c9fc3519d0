"""The rows of Tables 13 and 14 per layer, for the number of passes that a picture has."""

import pytest
import torch
import transformers as hf

import duet
from duet import DuetConfig, budget
from duet.families.passes import plan


@pytest.mark.parametrize(
    ("name", "row", "patches", "passes", "average"),
    [
        ("llava-next-7b", 640, 576, 5, 640.5),
        ("llava-next-7b", 320, 576, 5, 318.75),
        ("llava-next-7b", 160, 576, 5, 159.25),
        ("llava-next-7b", 640, 576, 3, 384.25),  # fewer tiles, fewer tokens: 3 of 5 times 640.5
        ("llava-next-7b-per-picture", 640, 576, 5, 640.5),
        ("llava-next-7b-per-picture", 640, 576, 3, 640.5),
        ("llava-next-7b-per-picture", 160, 576, 4, 159.25),
        ("video-llava-7b", 960, 256, 8, 960.0),
        ("video-llava-7b", 136, 256, 8, 135.0),
        ("video-llava-7b-per-picture", 136, 256, 8, 136.25),
        ("video-llava-7b-per-picture", 960, 256, 16, 960.0),
    ],
)
def test_averages(name, row, patches, passes, average):
    config = DuetConfig.preset(name, row)
    entering = sum(kept.entering for kept in plan(config, [patches] * passes, has_class=True))
    layers = budget.tokens_per_layer(entering, config.for_depth(32).schedule, 32)
    assert sum(layers) / 32 == average
    assert layers[:16] == [entering] * 16 and layers[16:24] == [entering // 2] * 8 and layers[24:] == [0] * 8


def test_a_printed_row_may_be_shared_by_the_passes_of_a_picture():
    config = DuetConfig.preset("llava-next-7b", 640, per="picture")
    assert (config.dominant, config.contextual) == (850, 175)
    assert config == DuetConfig.preset("llava-next-7b-per-picture", 640)
    assert DuetConfig.from_dict(config.to_dict()) == config


def test_what_a_picture_has_less_of_than_the_budget_stays():
    config = DuetConfig(dominant=20, contextual=5)
    assert plan(config, [25, 26, 0, 3], has_class=False) == [None, config, None, None]
    release = DuetConfig(dominant=20, contextual=5, variant="release")  # the class token is one of the 20
    assert plan(release, [24, 25, 26], has_class=True) == [None, release, release]


def test_per_must_be_known():
    with pytest.raises(ValueError, match=r"per must be one of pass, picture, got 'tile'"):
        DuetConfig(per="tile")


def model_of(family):
    """A model as deep as the 7B one, with as many patches, and very narrow."""
    text = hf.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=32, num_attention_heads=2, vocab_size=8,
        max_position_embeddings=8192,
    )  # fmt: skip
    side = 336 if family == "llava_next" else 224
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=side, patch_size=14
    )
    torch.manual_seed(0)
    if family == "llava_next":
        config = hf.LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=7)
        return hf.LlavaNextForConditionalGeneration(config).eval()
    config = hf.VideoLlavaConfig(vision_config=vision, text_config=text, image_token_index=6, video_token_index=7)
    return hf.VideoLlavaForConditionalGeneration(config).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "rows", "inputs", "placeholders"),
    [
        ("llava-next-7b", {640: 1025, 320: 510, 160: 255}, {"image_sizes": torch.tensor([[672, 672]])}, 2928),
        ("llava-next-7b", {640: 615, 320: 306, 160: 153}, {"image_sizes": torch.tensor([[336, 672]])}, 1752),
        ("llava-next-7b-per-picture", {640: 1025, 160: 255}, {"image_sizes": torch.tensor([[336, 672]])}, 1752),
        ("video-llava-7b", {960: 1536, 136: 216}, {"pixel_values_videos": torch.randn(1, 8, 3, 224, 224)}, 2056),
    ],
)
def test_rows_as_a_model_of_that_depth_runs_them(name, rows, inputs, placeholders):
    family = "llava_next" if "next" in name else "video_llava"
    model = model_of(family)
    if family == "llava_next":
        inputs = inputs | {"pixel_values": torch.randn(1, 5, 3, 336, 336)}
    ids = torch.tensor([[1, 2, *[7] * placeholders, 3, 4]])
    for row, entering in rows.items():
        with duet.attach(model, DuetConfig.preset(name, row)), duet.trace(images=False) as record:
            model(input_ids=ids, **inputs, logits_to_keep=1)
        (segments,) = record.passes
        found = [(segment.stop, segment.visual[0]) for segment in segments]
        assert found == [(16, entering), (24, entering // 2), (32, 0)]
