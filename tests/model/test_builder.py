"""`load_pretrained_model`: what is in the folder decides; every bad checkpoint is a clear error."""

import json
import subprocess
import sys

import pytest
import torch
from model_helpers import CLIP, LLAVA, copy_golden, edit_config, edit_weights, golden_model
from transformers import LlamaForCausalLM

from duet import DuetConfig
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM, LlavaMptConfig, LlavaMptForCausalLM
from llava.model.builder import load_pretrained_model, model_class
from llava.model.checkpoints import load_projector_weights
from llava.reduction import ReductionArguments

DUET = DuetConfig(dominant=60, contextual=4, schedule={4: 0.5})


def load(path, base=None, name="anything", **kwargs):
    return load_pretrained_model(str(path), base, name, **kwargs)


def test_the_arguments_of_lmms_eval(caplog):
    tokenizer, model, image_processor, context_len = load_pretrained_model(
        str(LLAVA), None, "llava_tiny", device_map="cpu", multimodal=True, attn_implementation="sdpa",
        customized_config=None,
    )  # fmt: skip
    assert type(model) is LlavaLlamaForCausalLM and not model.training
    assert image_processor.crop_size["height"] == 336 and context_len == 2048
    assert model.dtype == (torch.float16 if torch.cuda.is_available() else torch.float32)
    assert "image_aspect_ratio" in model.config.__dict__
    model.config.image_aspect_ratio = "original"
    model.tie_weights()
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert tokenizer("hello").input_ids[0] == 1


def test_imports_need_no_optional_package():
    """Acceptance 1: lmms-eval's import lines, with every optional package made unavailable."""
    code = """
import sys
for name in ("flash_attn", "bitsandbytes", "deepspeed", "torchvision", "peft", "wandb", "datasets", "gradio"):
    sys.modules[name] = None
import llava
from llava import LlavaLlamaForCausalLM
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model import LlavaConfig, LlavaMistralForCausalLM, LlavaMistralConfig, LlavaMptForCausalLM, LlavaMptConfig
from llava.model.llava_arch import LlavaMetaModel, LlavaMetaForCausalLM, unpad_image
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaModel, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralModel
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, CLIPVisionTowerS2
from llava.model.multimodal_projector.builder import build_vision_projector, IdentityMap, SimpleResBlock
from llava.eval.run_llava import eval_model, load_image, load_images, image_parser
import llava.serve.cli, llava.convert
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dtype_and_config_overrides(tmp_path):
    model = load(LLAVA, torch_dtype="bfloat16", overwrite_config={"mm_vision_select_layer": -3})[1]
    assert model.dtype == torch.bfloat16 and model.get_vision_tower().dtype == torch.bfloat16
    assert model.get_vision_tower().select_layer == -3
    assert load(LLAVA, dtype=torch.float16)[1].get_model().mm_projector[0].weight.dtype == torch.float16


def test_the_name_does_not_decide(tmp_path):
    for name in ("vicuna", "mpt-lora", "mistral"):
        assert type(load(LLAVA, name=name)[1]) is LlavaLlamaForCausalLM


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        ({"model_type": "llava_llama"}, "mistral", LlavaLlamaForCausalLM),
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "x", LlavaLlamaForCausalLM),
        ({"model_type": "llava"}, "x", LlavaLlamaForCausalLM),
        ({"model_type": "llava_mistral"}, "llama", LlavaMistralForCausalLM),
        ({"model_type": "llava", "architectures": ["LlavaMistralForCausalLM"]}, "x", LlavaMistralForCausalLM),
        ({"model_type": "llava_mpt"}, "x", LlavaMptForCausalLM),
        ({}, "llava-mistral-7b", LlavaMistralForCausalLM),
    ],
)
def test_backbone_by_content(config, name, expected):
    assert model_class(config, name) is expected


def test_unknown_backbones_and_mpt(tmp_path):
    with pytest.raises(ValueError, match="no supported LLaVA backbone"):
        model_class({"model_type": "gemma"}, "x")
    with pytest.raises(ValueError, match="'llava_onevision' is not supported"):
        model_class({"model_type": "llava_onevision", "text_config": {}, "vision_config": {}})
    folder = copy_golden(tmp_path / "mpt", model_type="llava_mpt", architectures=["LlavaMptForCausalLM"])
    with pytest.raises(NotImplementedError, match="MPT"):
        load(folder)
    with pytest.raises(NotImplementedError, match="MPT"):
        LlavaMptForCausalLM(LlavaMptConfig())


def test_old_hub_config_with_transformers_own_model_type(tmp_path):
    folder = copy_golden(tmp_path / "old", model_type="llava")
    assert type(load(folder)[1]) is LlavaLlamaForCausalLM


def test_a_plain_language_model(tmp_path):
    folder = copy_golden(tmp_path / "m")
    edit_weights(folder, lambda state: {k: v for k, v in state.items() if "mm_projector" not in k})
    raw = json.loads((folder / "config.json").read_text())
    edit_config(folder, drop=tuple(k for k in raw if k.startswith("mm_")), model_type="llama", architectures=None)
    _, model, image_processor, _ = load(folder)
    assert type(model) is LlamaForCausalLM and image_processor is None


def bad_checkpoint(folder, change):
    copy_golden(folder)
    edit_weights(folder, change)
    return folder


def test_missing_and_unexpected_weights_are_named(tmp_path):
    lost = "model.layers.3.mlp.up_proj.weight"
    folder = bad_checkpoint(tmp_path / "missing", lambda s: {k: v for k, v in s.items() if k != lost})
    with pytest.raises(ValueError, match=rf"missing.*1 missing key.*{lost}"):
        load(folder)
    folder = bad_checkpoint(tmp_path / "extra", lambda s: s | {"model.layers.99.q.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"1 unexpected key.*model\.layers\.99\.q\.weight"):
        load(folder)
    folder = bad_checkpoint(tmp_path / "proj", lambda s: {k: v for k, v in s.items() if "mm_projector.2" not in k})
    with pytest.raises(ValueError, match=r"model\.mm_projector\.2\.bias"):
        load(folder)
    folder = bad_checkpoint(
        tmp_path / "buffer", lambda s: s | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    )
    load(folder)  # old files have it, and it means nothing


def test_an_incomplete_tower_is_an_error(tmp_path):
    from model_helpers import tower_state

    tower = tower_state(old_layout=True)
    tower.pop("model.vision_tower.vision_tower.vision_model.encoder.layers.5.mlp.fc1.weight")
    folder = bad_checkpoint(tmp_path / "m", lambda state: state | tower)
    with pytest.raises(ValueError, match=r"encoder\.layers\.5\.mlp\.fc1\.weight"):
        load(folder)


def test_wrong_shapes_and_damaged_files(tmp_path):
    folder = bad_checkpoint(tmp_path / "shape", lambda s: s | {"model.norm.weight": torch.ones(3)})
    with pytest.raises(RuntimeError, match="mismatch"):
        load(folder)
    folder = copy_golden(tmp_path / "cut")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|header|deserializ"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load(folder)


def test_paths_that_do_not_exist(tmp_path):
    for path in (str(tmp_path / "nope"), "./nope", "a/b/c", "nope"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no model weights"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "mm_projector.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(tmp_path / "empty")


def test_projector_files_that_do_not_fit(tmp_path):
    model = golden_model()
    torch.save({"something.else": torch.ones(1)}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"no key contains 'mm_projector\.'"):
        load_projector_weights(model, str(tmp_path / "a.bin"))
    state = {f"model.mm_projector.{k}": v for k, v in model.get_model().mm_projector.state_dict().items()}
    torch.save(state | {"model.mm_projector.0.weight": torch.ones(4, 4)}, tmp_path / "b.bin")
    with pytest.raises(ValueError, match=r"0\.weight has shape \(4, 4\), the model needs \(64, 64\)"):
        load_projector_weights(model, str(tmp_path / "b.bin"))
    state.pop("model.mm_projector.2.bias")
    torch.save(state, tmp_path / "c.bin")
    with pytest.raises(ValueError, match=r"1 missing key\(s\): 2\.bias"):
        load_projector_weights(model, str(tmp_path / "c.bin"))
    (tmp_path / "d.bin").write_bytes(b"not a checkpoint")
    (tmp_path / "e.safetensors").write_bytes(b"not a checkpoint")
    for name in ("d.bin", "e.safetensors"):
        with pytest.raises(ValueError, match=f"{name}: not a readable checkpoint file"):
            load_projector_weights(model, str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_projector_weights(model, str(tmp_path / "nope.bin"))


def test_quantisation_options(tmp_path):
    with pytest.raises(ValueError, match="exclude each other"):
        load(LLAVA, load_8bit=True, load_4bit=True)


def test_four_bits_spare_projector_tower_and_head(tmp_path):
    pytest.importorskip("bitsandbytes")
    from model_helpers import pixels

    config = golden_model().config
    config.intermediate_size = 192  # bitsandbytes' CPU kernels want multiples of 32
    config.mm_vision_tower = str(CLIP)
    LlavaLlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((LLAVA / "tokenizer.model").read_bytes())
    model = load(tmp_path, load_4bit=True)[1]
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["model.layers.0.self_attn.q_proj"] == "Linear4bit"
    assert kinds["model.mm_projector.0"] == kinds["lm_head"] == "Linear"
    assert kinds["model.vision_tower.vision_tower.encoder.layers.0.self_attn.q_proj"] == "Linear"
    out = model.generate(torch.tensor([[1, 5, -200, 6]]), images=pixels("coffee")[None], max_new_tokens=2)
    assert out.shape[1] <= 2


def test_the_reduction_of_the_checkpoint_and_of_the_flags(tmp_path):
    folder = copy_golden(tmp_path / "m", duet=DUET.to_dict())
    assert load(folder)[1].reduction == DUET
    assert load(folder, duet_config="none")[1].reduction is None
    other = DuetConfig(dominant=10, contextual=1, schedule={})
    assert load(folder, duet_config=other)[1].reduction == other
    assert load(folder, duet_config=ReductionArguments())[1].reduction == DUET
    assert load(folder, duet_config=ReductionArguments(dominant=50))[1].reduction == DuetConfig(
        dominant=50, contextual=4, schedule={4: 0.5}
    )
    assert load(folder, dominant=50)[1].reduction.dominant == 50
    assert load(LLAVA, duet_tokens=192)[1].reduction.average_tokens(576, 8) == 191.75
    with pytest.raises(ValueError, match="pass a DuetConfig"):
        load(folder, duet_config="off")
    with pytest.raises(ValueError, match=r"beyond|depth|layers"):
        load(LLAVA, duet_config=DuetConfig(schedule={9: 0.5}))
    with pytest.raises(ValueError, match="576 tokens per image"):
        load(LLAVA, duet_config=DuetConfig(dominant=576, contextual=1, schedule={}))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ([], "maps names of fields to values"),
        ({"dominant": -3}, "dominant must be an integer"),
        ({"stage1": "of_mine"}, "unknown vision reducer 'of_mine'"),
        ({"schedule": {"40": 0.5}}, "layer 40 is beyond the model"),
        ({"dominant": 700, "schedule": {}}, "576 tokens per image"),
    ],
)
def test_a_broken_reduction_is_refused_when_it_is_loaded(tmp_path, entry, reason):
    folder = copy_golden(tmp_path / "m", duet=entry)
    for flags in (None, ReductionArguments()):
        with pytest.raises(ValueError, match=reason):
            load(folder, duet_config=flags)
    if "576" not in reason:  # how many patches there are is known when the tower is
        with pytest.raises(ValueError, match=reason):
            LlavaLlamaForCausalLM.from_pretrained(folder)
    assert load(folder, duet_config="none")[1].reduction is None
    assert load(folder, duet_config=DUET)[1].reduction == DUET


def test_towers_and_projectors_that_are_not_there(tmp_path):
    from types import SimpleNamespace

    from llava.model.multimodal_encoder.builder import build_vision_tower
    from llava.model.multimodal_projector.builder import IdentityMap, build_vision_projector

    with pytest.raises(ValueError, match="unknown vision tower 'nope'"):
        build_vision_tower(SimpleNamespace(mm_vision_tower="nope", mm_vision_select_layer=-2))
    with pytest.raises(NotImplementedError, match="S2"):
        build_vision_tower(SimpleNamespace(mm_vision_tower=str(CLIP), mm_vision_select_layer=-2, s2=True))
    with pytest.raises(ValueError, match="mm_vision_select_feature"):
        build_vision_tower(
            SimpleNamespace(mm_vision_tower=str(CLIP), mm_vision_select_layer=-2, mm_vision_select_feature="all")
        )
    sizes = {"mm_hidden_size": 4, "hidden_size": 6}
    with pytest.raises(ValueError, match="unknown mm_projector_type 'conv'"):
        build_vision_projector(SimpleNamespace(mm_projector_type="conv", **sizes))
    mlp = build_vision_projector(SimpleNamespace(mm_projector_type="mlp3x_gelu", **sizes))
    assert [name for name, _ in mlp.named_parameters()] == [f"{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")]
    assert build_vision_projector(SimpleNamespace(mm_projector_type="linear", **sizes)).weight.shape == (6, 4)
    identity = build_vision_projector(SimpleNamespace(mm_projector_type="identity", **sizes))
    assert isinstance(identity, IdentityMap) and identity.config == {"mm_projector_type": "identity"}


def test_tower_attributes_and_class_token():
    from types import SimpleNamespace

    from model_helpers import pixels

    from llava.model.multimodal_encoder.builder import build_vision_tower

    args = {"vision_tower": str(CLIP), "mm_vision_select_layer": -2}
    tower = build_vision_tower(SimpleNamespace(**args))
    assert (tower.is_loaded, tower.hidden_size, tower.num_patches_per_side, tower.num_patches) == (True, 64, 24, 576)
    assert (tower.vision_tower_name, tower.select_layer, tower.select_feature) == (str(CLIP), -2, "patch")
    assert tower.dummy_feature.shape == (1, 64) and not any(p.requires_grad for p in tower.parameters())
    image = pixels("coffee")
    patches = tower(image[None])
    both = build_vision_tower(SimpleNamespace(**args, mm_vision_select_feature="cls_patch"))(image[None])
    assert both.shape == (1, 577, 64) and torch.equal(both[:, 1:], patches)
    assert torch.equal(tower([image])[0], patches)
    reference = tower.vision_tower(image[None], output_hidden_states=True).hidden_states[-2]
    assert torch.equal(both, reference)
    delayed = build_vision_tower(SimpleNamespace(**args), delay_load=True)
    assert not delayed.is_loaded
    delayed.load_model()
    assert torch.equal(delayed(image[None]), patches)
