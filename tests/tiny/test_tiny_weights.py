"""The committed backbones: they load without a missing key, are small, and do what they were trained for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel, LlamaForCausalLM

from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from playground.tiny import questions
from playground.tiny.llm import VISUAL, Writer
from playground.tiny.scenes import make_scene
from playground.tiny.tokenizer import SYSTEM_PROMPT, build_tokenizer

WEIGHTS = Path(__file__).parents[2] / "playground" / "tiny" / "weights"
LIMIT = 16 * 2**20


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS / "llm")


def test_together_they_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*.safetensors")) <= LIMIT


@pytest.mark.parametrize(("name", "cls"), [("clip", CLIPVisionModel), ("llm", LlamaForCausalLM)])
def test_weights_load_with_every_key(name, cls):
    model, report = cls.from_pretrained(WEIGHTS / name, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_geometry_is_llavas():
    clip, llm = (AutoConfig.from_pretrained(WEIGHTS / name) for name in ("clip", "llm"))
    vision = getattr(clip, "vision_config", clip)
    assert (vision.image_size, vision.patch_size) == (336, 14)
    assert llm.num_hidden_layers >= 12
    assert (llm.bos_token_id, llm.eos_token_id) == (1, 2)
    with safe_open(WEIGHTS / "llm" / "model.safetensors", "pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape()[0] == llm.vocab_size


def test_processor_gives_clip_pixels():
    processor = CLIPImageProcessorPil.from_pretrained(WEIGHTS / "clip")
    scene = make_scene("heldout", 0, 0)
    pixels = processor(images=Image.fromarray(scene.pixels), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 336, 336)
    expected = (scene.pixels / 255.0 - processor.image_mean) / processor.image_std
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_the_features_attend_to_digits():
    from playground.tiny.tower import NONE_CLASS, SELECT_LAYER, digit_attention, normalise, patch_targets

    tower = CLIPVisionModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32).eval()
    scenes = [make_scene("heldout", 9, index) for index in range(4)]
    pixels = normalise(torch.from_numpy(np.stack([s.pixels for s in scenes])))
    on_digit = torch.from_numpy(np.stack([patch_targets(s.digits)[0] != NONE_CLASS for s in scenes]))
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        mass = digit_attention(tower, states[SELECT_LAYER - 1], on_digit, torch.tensor([0]))
    assert (mass[:, 0] > 2 * on_digit.float().mean(1)).all()


def test_the_committed_tokenizer_is_what_the_script_builds(tokenizer):
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert 400 <= len(tokenizer) <= 1000


@pytest.mark.parametrize(
    "text", ["Is there an 8?", "3 digits: 7 at 1 2.", "äöü 漢字 \t x", f"{SYSTEM_PROMPT} USER: Sort the digits 3 1 2."]
)
def test_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_digits_are_single_tokens_and_prompts_are_short(tokenizer):
    for digit in range(10):
        assert len(tokenizer(f" {digit}", add_special_tokens=False).input_ids) <= 2
    assert not [token for token in tokenizer.get_vocab() if sum(c.isdigit() for c in token) > 1 and token[0] != "<"]
    assert len(tokenizer(f"{SYSTEM_PROMPT} USER: ").input_ids) <= 5


def test_the_training_text_equals_llavas_prompt(tokenizer):
    writer = Writer(tokenizer)
    rng = np.random.default_rng(0)
    for index in range(5):
        for kind in questions.KINDS:
            turn = questions.ask(kind, make_scene("train", 0, index).digits, rng)
            if turn is None:
                continue
            conversation = conv_templates["vicuna_v1"].copy()
            conversation.append_message(conversation.roles[0], f"<image>\n{turn[0]}")
            conversation.append_message(conversation.roles[1], None)
            ours = [*writer.prefix, VISUAL, *writer.ids(f"\n{turn[0]} ASSISTANT:")]
            assert tokenizer_image_token(conversation.get_prompt(), tokenizer) == ours


def test_the_record_of_the_training_is_kept():
    for name in ("clip", "llm"):
        record = json.loads((WEIGHTS / name / "training.json").read_text())
        assert record["steps"] > 0 and record["seconds"] > 0 and record["heldout"]
