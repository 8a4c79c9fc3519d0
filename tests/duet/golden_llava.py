"""The golden tiny LLaVA as a Hugging Face model, and its cases. See tests/golden/README.md."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

GOLDEN = Path(__file__).parent.parent / "golden"
IMAGE_TOKEN = 1999
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def case(name):
    """Tensors and description of one case."""
    path = GOLDEN / "cases" / f"{name}.safetensors"
    tensors = load_file(path) if (GOLDEN / "cases" / f"{name}.json").exists() and path.exists() else {}
    return tensors, json.loads((GOLDEN / "cases" / f"{name}.json").read_text())


@lru_cache
def pixels(name):
    """Normalised pixels of one image, [3, 336, 336]."""
    array = np.array(Image.open(GOLDEN / "cases" / f"pixels_{name}.png"))
    return (torch.from_numpy(array).permute(2, 0, 1).float() / 255 - MEAN) / STD


def build():
    """A fresh ``LlavaForConditionalGeneration`` with the golden weights, fp32, sdpa."""
    text = json.loads((GOLDEN / "llava_tiny" / "config.json").read_text())
    vision = json.loads((GOLDEN / "clip_tiny" / "config.json").read_text())
    keep = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "rms_norm_eps", "max_position_embeddings", "rope_theta", "hidden_act", "bos_token_id",
        "eos_token_id",
    )  # fmt: skip
    config = LlavaConfig(
        text_config=LlamaConfig(**{key: text[key] for key in keep if key in text}, pad_token_id=0),
        vision_config=CLIPVisionConfig(
            **{k: v for k, v in vision.items() if k not in ("architectures", "torch_dtype")}
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=576,
    )
    model = LlavaForConditionalGeneration(config).eval()
    weights = load_file(GOLDEN / "llava_tiny" / "model.safetensors")
    renamed = {}
    for key, value in weights.items():
        key = key.replace("model.mm_projector.0.", "model.multi_modal_projector.linear_1.")
        key = key.replace("model.mm_projector.2.", "model.multi_modal_projector.linear_2.")
        for part in ("embed_tokens", "layers", "norm"):
            key = (
                key.replace(f"model.{part}.", f"model.language_model.{part}.")
                if key.startswith(f"model.{part}.")
                else key
            )
        renamed[key] = value
    tower = load_file(GOLDEN / "clip_tiny" / "model.safetensors")
    own = set(model.state_dict())
    for key, value in tower.items():
        short = key.removeprefix("vision_model.")
        for candidate in (f"model.vision_tower.{short}", f"model.vision_tower.vision_model.{short}"):
            if candidate in own:
                renamed[candidate] = value
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected, unexpected
    assert not [k for k in missing if "position_ids" not in k], missing
    return model


def expand(ids, labels=None, image_tokens=576):
    """Replace LLaVA's -200 by ``image_tokens`` placeholders. Shapes: ids [L] -> [L']."""
    out_ids, out_labels = [], []
    for index, token in enumerate(ids.tolist()):
        repeat = image_tokens if token == -200 else 1
        out_ids += [IMAGE_TOKEN if token == -200 else token] * repeat
        out_labels += [-100 if labels is None or token == -200 else int(labels[index])] * repeat
    return torch.tensor(out_ids), torch.tensor(out_labels)


def batch_of(tensors, image_names):
    """Right-padded Hugging Face inputs from a golden batch case; text-only rows have no pixels."""
    ids, mask = tensors["input_ids"], tensors["attention_mask"].bool()
    labels = tensors.get("labels")
    rows = [expand(ids[b][mask[b]], None if labels is None else labels[b][mask[b]]) for b in range(len(ids))]
    longest = max(len(row) for row, _ in rows)
    out = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), -100),
    }
    for b, (row, label) in enumerate(rows):
        out["input_ids"][b, : len(row)] = row
        out["attention_mask"][b, : len(row)] = 1
        out["labels"][b, : len(row)] = label
    if labels is None:
        del out["labels"]
    out["pixel_values"] = torch.stack([pixels(name) for name in image_names if name])
    return out
