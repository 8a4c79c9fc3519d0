"""Every form a LLaVA checkpoint comes in loads to the same logits, and what we write has LLaVA's key names."""

import json
import os
import random
from functools import cache

import pytest
import torch
from model_helpers import (
    CLIP,
    GOLDEN,
    IMAGE,
    LLAVA,
    assert_same_logits,
    copy_golden,
    edit_config,
    edit_weights,
    facts,
    golden_model,
    pixels,
    tower_state,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration

from duet import DuetConfig
from llava.convert import add_hf_tokens, convert, extract_projector, main
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.checkpoints import (
    load_projector_weights,
    strip_non_lora_prefix,
    to_hf_key,
    to_hub_key,
    to_original_key,
    to_own_key,
)
from llava.tokenization import load_tokenizer


@pytest.fixture(scope="module")
def golden():
    return golden_model().eval()


def load(path, base=None, **kwargs):
    return load_pretrained_model(str(path), base and str(base), "name-that-says-nothing", device="cpu", **kwargs)


@pytest.mark.parametrize("old", [True, False])
def test_tower_weights_in_the_checkpoint_win_in_both_clip_layouts(tmp_path, golden, old):
    folder = copy_golden(tmp_path / "m")
    edit_weights(folder, lambda state: state | tower_state(old_layout=old, seed=3))
    model = load(folder)[1]
    tuned = model.get_vision_tower().vision_tower.embeddings.class_embedding
    stock = golden.get_vision_tower().vision_tower.embeddings.class_embedding
    assert not torch.equal(tuned, stock)
    key = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    assert torch.equal(tuned, tower_state(old_layout=True, seed=3)[key])
    assert model.get_vision_tower().is_loaded
    model.save_pretrained(tmp_path / "again")
    assert_same_logits(LlavaLlamaForCausalLM.from_pretrained(tmp_path / "again"), model)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load(tmp_path / "again")


def test_the_stock_tower_is_fetched_only_when_the_checkpoint_has_none(tmp_path, golden):
    folder = copy_golden(tmp_path / "m", mm_vision_tower="openai/clip-vit-large-patch14-336")
    config = json.loads((CLIP / "config.json").read_text())
    edit_config(folder, mm_vision_config=config)
    with pytest.raises(OSError, match="could not be loaded: put a CLIP vision model there"):
        load(folder)
    edit_weights(folder, lambda state: state | tower_state(old_layout=True))
    assert_same_logits(load(folder)[1], golden)


def test_relative_tower_paths_start_at_the_checkpoint(tmp_path, golden, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_same_logits(load(LLAVA)[1], golden)
    folder = copy_golden(tmp_path / "m")
    edit_config(folder, mm_vision_tower=os.path.relpath(CLIP, tmp_path))
    assert_same_logits(load(folder)[1], golden)


def test_bin_and_sharded_files(tmp_path, golden):
    folder = copy_golden(tmp_path / "bin")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same_logits(load(folder)[1], golden)
    for name, write in (
        ("model-{:05d}-of-00002.safetensors", save_file),
        ("pytorch_model-{:05d}-of-00002.bin", torch.save),
    ):
        folder = copy_golden(tmp_path / name[:5])
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map, keys = {}, sorted(state)
        for part, chunk in enumerate((keys[::2], keys[1::2]), start=1):
            write({key: state[key] for key in chunk}, str(folder / name.format(part)))
            weight_map |= dict.fromkeys(chunk, name.format(part))
        index = "model.safetensors.index.json" if "safetensors" in name else "pytorch_model.bin.index.json"
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        assert_same_logits(load(folder)[1], golden)


def test_saving_writes_the_original_layout_with_the_reduction(tmp_path, golden):
    model = golden_model()
    model.set_reduction(DuetConfig(dominant=60, contextual=4, schedule={4: 0.5}))
    model.generation_config.temperature, model.generation_config.top_p = 0.9, 0.6  # Vicuna's, with greedy decoding
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    original = set(load_file(LLAVA / "model.safetensors"))
    assert original <= set(index)
    extra = set(index) - original
    assert extra and all(key.startswith("model.vision_tower.vision_tower.vision_model.") for key in extra)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("mm_vision_tower", "mm_hidden_size", "mm_projector_type", "mm_vision_select_layer", "duet"):
        assert key in config
    assert config["model_type"] == "llava_llama" and (tmp_path / "preprocessor_config.json").is_file()
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert again.reduction == model.reduction
    again.set_reduction(None)
    assert_same_logits(again, golden)


def test_a_fresh_model_saves_the_original_layout_too(tmp_path, golden):
    fresh = LlavaLlamaForCausalLM(golden.config)
    fresh.load_state_dict(golden.state_dict())
    fresh.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert not any("vision_tower.vision_tower." in key and "vision_model" not in key for key in keys)
    bare = LlavaLlamaForCausalLM(golden.config)
    bare.load_state_dict(load_file(tmp_path / "model.safetensors"))  # reads the old names without from_pretrained
    assert_same_logits(bare.eval(), golden)


def test_llava_hf_round_trip_and_parity_with_transformers(tmp_path, golden):
    assert main(["--from", str(LLAVA), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["image_token_index"] == 2000 and config["text_config"]["vocab_size"] == 2048
    hub = set(load_file(tmp_path / "hf" / "model.safetensors"))
    assert "vision_tower.vision_model.embeddings.class_embedding" in hub and "language_model.lm_head.weight" in hub
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    with Image.open(GOLDEN / "images" / "astronaut.png") as image:
        inputs = processor(images=image.convert("RGB"), text="USER: <image>\nHi ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == 2000).sum() == 576
    own = tokenizer_image_token("USER: <image>\nHi ASSISTANT:", load(LLAVA)[0], return_tensors="pt")[None]
    with torch.no_grad():
        theirs = hf(**inputs).logits[..., :2000]
        ours = golden(input_ids=own, images=inputs["pixel_values"]).logits
    assert torch.equal(theirs, ours)
    tokenizer, model, image_processor, _ = load(tmp_path / "hf")
    assert model.config.vocab_size == 2000 and model.get_input_embeddings().num_embeddings == 2000
    assert tokenizer.pad_token_id < 2000 and image_processor is not None
    assert_same_logits(model, golden)
    assert main(["--from", str(tmp_path / "hf"), "--to", "llava", "--out", str(tmp_path / "back")]) == 0
    back, original = load_file(tmp_path / "back" / "model.safetensors"), load_file(LLAVA / "model.safetensors")
    assert all(torch.equal(back[key], value) for key, value in original.items())
    tokenizer = load(tmp_path / "back")[0]
    assert len(tokenizer) == 2000 and "<image>" not in tokenizer.get_vocab()
    text = "USER: hello there. ASSISTANT: yes</s>USER: a"
    assert tokenizer(text).input_ids == load(LLAVA)[0](text).input_ids


@pytest.mark.parametrize("kind", ["tokenizer", "tokenizer_legacy"])
def test_ids_of_an_exported_tokenizer_are_those_that_llava_trained_on(tmp_path, kind):
    tokenizer = load_tokenizer(str(GOLDEN / kind))
    add_hf_tokens(tokenizer, (2000, 2001))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    exported = AutoTokenizer.from_pretrained(tmp_path)
    golden = [case for case in facts("prompts")["cases"] if case["tokenizer"] == kind and "<image>" in case["prompt"]]
    assert len(golden) > 5
    for case in golden:
        ids = [2000 if token == IMAGE else token for token in case["input_ids"]]
        assert exported(case["prompt"]).input_ids == ids, case["name"]
    pieces, draw = ["<image>", "<image>", " ", "\n", "What", " is it?", "</s>", "USER:", "é"], random.Random(0)
    for text in ("".join(draw.choices(pieces, k=draw.randint(1, 9))) for _ in range(300)):
        ids = tokenizer_image_token(text, load_tokenizer_once(kind))
        assert exported(text).input_ids == [2000 if token == IMAGE else token for token in ids], repr(text)


@cache
def load_tokenizer_once(kind):
    """LLaVA's own tokenizer, which golden ids prove."""
    return load_tokenizer(str(GOLDEN / kind))


def test_the_reduction_survives_the_hf_layout(tmp_path):
    folder = copy_golden(tmp_path / "m", duet=DuetConfig(dominant=60, contextual=4, schedule={4: 0.5}).to_dict())
    main(["--from", str(folder), "--to", "hf", "--out", str(tmp_path / "hf")])
    assert load(tmp_path / "hf")[1].reduction == DuetConfig(dominant=60, contextual=4, schedule={4: 0.5})


@pytest.mark.parametrize("target", ["hf", "llava"])
@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.float16, "float32"), (torch.bfloat16, None), (torch.float32, "float16")]
)
def test_converting_keeps_the_dtype_of_the_weights(tmp_path, target, dtype, said):
    folder = copy_golden(tmp_path / "m", torch_dtype=said)
    edit_weights(folder, lambda state: {key: value.to(dtype) for key, value in state.items()})
    convert(str(folder), target, str(tmp_path / "out"))
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_convert_refuses_to_overwrite_and_reports_errors(tmp_path, capsys):
    assert main(["--from", str(LLAVA), "--to", "hf", "--out", str(LLAVA)]) == 1
    assert "already holds a model" in capsys.readouterr().err
    assert main(["--from", str(tmp_path / "nothing"), "--to", "llava", "--out", str(tmp_path / "o")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_projector_folder_with_a_base(tmp_path, golden):
    base, folder = base_and_projector_folder(tmp_path)
    tokenizer, model, image_processor, _ = load(folder, base)
    assert_same_logits(model, golden)
    assert tokenizer("a").input_ids and image_processor is not None
    with pytest.raises(ValueError, match="pass model_base"):
        load(folder)


def base_and_projector_folder(tmp_path):
    """A plain Llama folder with a tokenizer, and a stage-1 folder: config.json and mm_projector.bin."""
    base, folder = tmp_path / "base", tmp_path / "stage1"
    text = golden_model()
    plain = LlamaForCausalLM(LlamaForCausalLM.config_class(**plain_config()))
    plain.load_state_dict({k: v for k, v in text.state_dict().items() if "mm_projector" not in k and "vision" not in k})
    plain.save_pretrained(base)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (base / name).write_bytes((LLAVA / name).read_bytes())
    folder.mkdir()
    (folder / "config.json").write_bytes((LLAVA / "config.json").read_bytes())
    edit_config(folder, mm_vision_tower=str(CLIP))
    extract_projector(str(LLAVA), str(folder / "mm_projector.bin"))
    return base, folder


def plain_config():
    config = json.loads((LLAVA / "config.json").read_text())
    return {k: v for k, v in config.items() if not k.startswith("mm_") and k not in ("model_type", "architectures")}


def test_lora_folder_is_merged_onto_its_base(tmp_path, golden):
    from peft import LoraConfig, get_peft_model

    base, stage1 = base_and_projector_folder(tmp_path)
    folder = tmp_path / "lora"
    model = load(stage1, base)[1]
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], exclude_modules=".*vision_tower.*", task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        wrapped.base_model.model.model.mm_projector[2].bias += 0.5
    wrapped.save_pretrained(folder)
    adapter = json.loads((folder / "adapter_config.json").read_text())
    adapter |= {"exclude_modules": None, "base_model_name_or_path": str(base)}  # as upstream wrote it
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "config.json").write_bytes((stage1 / "config.json").read_bytes())
    projector = {f"base_model.model.{k}": v for k, v in model.state_dict().items() if "mm_projector" in k}
    assert next(iter(projector)).startswith("base_model.model.model.mm_projector.")
    torch.save(projector, folder / "non_lora_trainables.bin")
    merged = load(folder)[1]  # the base is named by the adapter
    assert type(merged) is LlavaLlamaForCausalLM
    expected = wrapped.merge_and_unload()
    assert_same_logits(merged, expected.eval(), exact=False)
    with pytest.raises(AssertionError):
        assert_same_logits(merged, golden, exact=False)
    stock = golden.get_vision_tower().state_dict()
    assert all(torch.equal(v, stock[k]) for k, v in merged.get_vision_tower().state_dict().items())
    assert main(["--from", str(folder), "--to", "llava", "--out", str(tmp_path / "merged")]) == 0
    assert_same_logits(load(tmp_path / "merged")[1], merged)
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(ValueError, match=r"neither non_lora_trainables\.bin nor a projector"):
        load(folder)
    adapter.pop("base_model_name_or_path")
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ValueError, match="pass model_base"):
        load(folder)


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.model.", "module.model.", ""])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_projector_files_of_every_prefix(tmp_path, golden, prefix, suffix):
    state = golden.get_model().mm_projector.state_dict()
    named = {f"{prefix}mm_projector.{key}": value.clone() for key, value in state.items()}
    path = str(tmp_path / f"mm_projector{suffix}")
    torch.save(named, path) if suffix == ".bin" else save_file(named, path)
    model = LlavaLlamaForCausalLM(golden.config)
    load_projector_weights(model, path)
    assert all(torch.equal(v, state[k]) for k, v in model.get_model().mm_projector.state_dict().items())


def test_extract_projector_from_every_layout(tmp_path, golden):
    main(["--from", str(LLAVA), "--to", "hf", "--out", str(tmp_path / "hf")])
    for source in (LLAVA, tmp_path / "hf"):
        out = str(tmp_path / "p.safetensors")
        assert extract_projector(str(source), out) == 4
        state = load_file(out)
        for key, value in golden.get_model().mm_projector.state_dict().items():
            assert torch.equal(state[f"model.mm_projector.{key}"], value)


def test_key_maps_are_inverse(golden):
    for key in golden.state_dict():
        assert to_own_key(to_original_key(key)) == key
        assert to_own_key(to_hf_key(key)) == key
        assert to_own_key(to_hub_key(to_hf_key(key))) == key
    assert strip_non_lora_prefix({"base_model.model.model.mm_projector.0.weight": torch.ones(1)}).keys() == {
        "model.mm_projector.0.weight"
    }


def test_training_starts_from_a_plain_language_model(tmp_path, golden):
    from types import SimpleNamespace

    base, stage1 = base_and_projector_folder(tmp_path)
    model = LlavaLlamaForCausalLM.from_pretrained(base, attn_implementation="sdpa", cache_dir=None, use_cache=False)
    assert model.get_vision_tower() is None and model.config.use_cache is False
    model.requires_grad_(False)
    args = SimpleNamespace(
        vision_tower=str(CLIP), mm_vision_select_layer=-2, mm_vision_select_feature="patch", mm_patch_merge_type="flat",
        mm_projector_type="mlp2x_gelu", pretrain_mm_mlp_adapter=str(stage1 / "mm_projector.bin"),
    )  # fmt: skip
    model.get_model().initialize_vision_modules(args)
    assert all(p.requires_grad for p in model.get_model().mm_projector.parameters())
    assert not any(p.requires_grad for p in model.get_vision_tower().parameters())
    assert model.config.mm_hidden_size == 64 and model.config.mm_vision_tower == str(CLIP)
    assert_same_logits(model.eval(), golden)
    model.save_pretrained(tmp_path / "saved")
    assert_same_logits(LlavaLlamaForCausalLM.from_pretrained(tmp_path / "saved"), golden)
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "saved")
    again.get_model().initialize_vision_modules(args)
    assert_same_logits(again, golden)


def test_mistral(tmp_path):
    from llava.model import LlavaMistralConfig, LlavaMistralForCausalLM

    config = LlavaMistralConfig(
        **plain_config() | {"sliding_window": None}, mm_use_im_patch_token=False, mm_vision_tower=str(CLIP),
        mm_hidden_size=64, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaMistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "m")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "m" / name).write_bytes((LLAVA / name).read_bytes())
    loaded = load(tmp_path / "m")[1]
    assert type(loaded) is LlavaMistralForCausalLM
    assert_same_logits(loaded, model)
    loaded.set_reduction(DuetConfig(dominant=20, contextual=2, schedule={4: 0.5}))
    out = loaded.generate(torch.tensor([[1, 5, -200, 6]]), images=pixels("coffee")[None], max_new_tokens=3)
    assert out.shape[1] <= 3


def test_a_tiled_checkpoint_has_its_newline_and_lays_tiles_out(tmp_path):
    """LLaVA-1.6's structure in inference: spatial_unpad with `model.image_newline` from the file."""
    grid = [[336, 672], [672, 336], [672, 672]]
    folder = copy_golden(
        tmp_path / "m", mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres", image_grid_pinpoints=grid
    )
    with pytest.raises(ValueError, match=r"1 missing key\(s\): model\.image_newline"):
        load(folder)
    newline = torch.randn(64)
    edit_weights(folder, lambda state: state | {"model.image_newline": newline} | tower_state(True, seed=1))
    _, model, image_processor, _ = load(folder)
    assert torch.equal(model.get_model().image_newline, newline)
    with Image.open(GOLDEN / "images" / "coffee.png") as image:
        tall = image.convert("RGB").resize((300, 600))
    tiles = process_images([tall], image_processor, model.config)
    assert tiles.shape == (1, 3, 3, 336, 336)
    out = model.prepare_inputs_labels_for_multimodal(
        torch.tensor([[1, -200, 5]]), None, None, None, None, tiles, image_sizes=[tall.size]
    )
    assert out[4].shape[1] == 2 + 576 + 48 * (24 + 1)
    assert torch.equal(out[4][0, 1 + 576 + 24], newline)
    with pytest.raises(ValueError, match="image_sizes"):
        model(input_ids=torch.tensor([[1, -200, 5]]), images=tiles)
    model.save_pretrained(tmp_path / "again")
    assert "model.image_newline" in load_file(tmp_path / "again" / "model.safetensors")
