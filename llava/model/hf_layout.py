"""The llava-hf layout: its config next to ours, its vocabulary padding, its tokenizer."""

from __future__ import annotations

import json
import os
from typing import Any

from transformers import CLIPVisionConfig, LlavaConfig, LlavaNextConfig
from transformers.utils import logging

from llava.mm_utils import read_pinpoints
from llava.model.multimodal_encoder.clip_encoder import KNOWN_GEOMETRY

logger = logging.get_logger(__name__)

# Backbone of a llava-hf checkpoint -> our model type.
_BACKBONES = {"llama": "llava_llama", "mistral": "llava_mistral"}
# model_type of a llava-hf checkpoint -> its config class: LLaVA-1.5, and LLaVA-1.6 with its tiles.
_KINDS: dict[str, Any] = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}
# Our keys travel inside an exported config.json, so that a round trip loses nothing; transformers ignores them.
OWN_KEYS = (
    "duet",
    "mm_vision_tower",
    "mm_patch_merge_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "tokenizer_padding_side",
    "tokenizer_model_max_length",
    "unfreeze_mm_vision_tower",
    "conv_version",
)
_VOCABULARY_MULTIPLE = 64


def is_hf_llava(raw: dict) -> bool:
    """Whether a config.json dict is llava-hf's (LLaVA's own old files say `model_type: llava`, too)."""
    return isinstance(raw.get("text_config"), dict) and isinstance(raw.get("vision_config"), dict)


def hf_model_type(raw: dict) -> str:
    """Our model type for a llava-hf config.

    Raises:
        ValueError: Another family (OneVision, video) or another backbone.
    """
    if raw.get("model_type") not in _KINDS:
        raise ValueError(
            f"model_type {raw.get('model_type')!r} is not supported here; of the llava-hf models 'llava' (LLaVA-1.5) "
            "and 'llava_next' (LLaVA-1.6) are. duet.attach takes others as they are"
        )
    backbone = raw["text_config"].get("model_type", "llama")
    if backbone not in _BACKBONES:
        raise ValueError(f"llava-hf checkpoint with a {backbone!r} language model; supported: {', '.join(_BACKBONES)}")
    return _BACKBONES[backbone]


def base_vocabulary(raw: dict) -> int:
    """Rows of the embedding that the original model had: everything before `<image>`, which llava-hf appended."""
    rows = raw["text_config"].get("vocab_size", 32000)
    image = raw.get("image_token_index", raw.get("image_token_id", 32000))
    return min(rows, image)


def config_from_hf(raw: dict, path: str, expected: str) -> dict:
    """Translate a llava-hf config dict to ours.

    Args:
        raw: config.json of the llava-hf folder.
        path: Its folder or name, for messages.
        expected: Model type of the class that is loading it.

    Returns:
        Keyword arguments for our config class, with the original vocabulary size.

    Raises:
        ValueError: Something in it has no counterpart here.
    """
    kind = hf_model_type(raw)
    if kind != expected:
        raise ValueError(f"{path} has a {kind.removeprefix('llava_')} backbone; load it with the {kind} class")
    tiled = raw["model_type"] == "llava_next"
    kept = {key: value for key, value in raw.items() if key != "quantization_config"}
    full: Any = _KINDS[raw["model_type"]].from_dict(kept)
    if full.projector_hidden_act != "gelu" or not getattr(full, "multimodal_projector_bias", True):
        raise ValueError(f"{path}: only projectors with gelu and biases are supported, as in LLaVA-1.5")
    if not isinstance(full.vision_feature_layer, int):
        raise ValueError(f"{path}: vision_feature_layer {full.vision_feature_layer} must be one layer")
    text = full.text_config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        text.pop(key, None)
    vision = full.vision_config
    rows = base_vocabulary(raw)
    for key in ("pad_token_id",):
        if text.get(key) is not None and text[key] >= rows:
            text[key] = None
    own = {
        **text,
        "vocab_size": rows,
        "tie_word_embeddings": raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        "dtype": raw.get("dtype", raw.get("torch_dtype", text.get("dtype"))),
        "mm_vision_tower": _tower_name(vision, path),
        "mm_vision_config": vision.to_diff_dict(),
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": full.vision_feature_layer,
        "mm_vision_select_feature": "patch" if full.vision_feature_select_strategy == "default" else "cls_patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad",
    }
    own |= {key: raw[key] for key in OWN_KEYS if key in raw}
    return own | (_tiling_from_hf(full, raw) if tiled else {})


def _tiling_from_hf(full: Any, raw: dict) -> dict:
    """Our keys for how a LLaVA-1.6 model of llava-hf cuts pictures into tiles."""
    return {
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[width, height] for height, width in full.image_grid_pinpoints],
        "mm_unpad_rounded": raw.get("mm_unpad_rounded", True),
    }


def _tiling_to_hf(config) -> dict:
    """llava-hf's keys for the same; empty for a model without tiles.

    Raises:
        ValueError: Tiles that llava-hf's models cannot lay out this way.
    """
    merge = getattr(config, "mm_patch_merge_type", None) or "flat"
    tiled = getattr(config, "image_aspect_ratio", None) == "anyres"
    if merge == "flat" and not tiled:
        return {}
    if merge != "spatial_unpad" or not tiled:
        raise ValueError(
            "llava-hf knows pictures in one piece (LLaVA-1.5) and image_aspect_ratio 'anyres' with mm_patch_merge_type "
            f"'spatial_unpad' (LLaVA-1.6), but this model has {getattr(config, 'image_aspect_ratio', None)!r} with "
            f"{merge!r}"
        )
    points = read_pinpoints(config.image_grid_pinpoints)
    return {
        "image_grid_pinpoints": [[height, width] for width, height in points],
        "mm_unpad_rounded": bool(getattr(config, "mm_unpad_rounded", False)),
    }


def _tower_name(vision: CLIPVisionConfig, path: str) -> str:
    for name, geometry in KNOWN_GEOMETRY.items():
        if all(getattr(vision, key) == value for key, value in geometry.items() if key != "projection_dim"):
            return name
    return path


def config_to_hf(config, image_token: int, pad_token: int, rows: int) -> Any:
    """Translate our config to llava-hf's: `LlavaConfig`, or `LlavaNextConfig` for a model with tiles.

    Args:
        config: Our config; its `mm_vision_config` must be there.
        image_token: Id of `<image>`.
        pad_token: Id of `<pad>`.
        rows: Embedding rows after padding.

    Raises:
        ValueError: The projector or the tiling has no counterpart there.
    """
    if config.mm_projector_type != "mlp2x_gelu":
        raise ValueError(f"llava-hf knows the mlp2x_gelu projector only, this model has {config.mm_projector_type!r}")
    tiling = _tiling_to_hf(config)
    text = config.to_dict()
    backbone = next(host for host, own in _BACKBONES.items() if own == config.model_type)
    dropped = (
        "model_type",
        "architectures",
        "transformers_version",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "use_mm_proj",
    )
    kind = "llava_next" if tiling else "llava"
    carried = {key: text.pop(key) for key in OWN_KEYS if key in text}
    text = {key: value for key, value in text.items() if key not in dropped and not key.startswith("mm_")}
    vision: Any = CLIPVisionConfig.from_dict(dict(config.mm_vision_config))
    side = vision.image_size // vision.patch_size
    class_token = getattr(config, "mm_vision_select_feature", None) == "cls_patch"
    values = {
        "text_config": {**text, "model_type": backbone, "vocab_size": rows, "pad_token_id": pad_token},
        "vision_config": vision.to_diff_dict(),
        "image_token_index": image_token,
        "image_seq_length": side * side + int(class_token),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": "full" if class_token else "default",
        "pad_token_id": pad_token,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    return _KINDS[kind](**(values | carried | tiling))


def padded_vocabulary(tokens: int) -> int:
    """Embedding rows of an exported model: a multiple of 64, as the published ones (32002 -> 32064)."""
    return -(-tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def drop_added_tokens(folder: str, first: int) -> list[str]:
    """Take tokens with ids from `first` on out of a saved tokenizer.

    llava-hf adds `<image>` and `<pad>` behind the vocabulary; LLaVA's embedding has no rows for them.

    Args:
        folder: Folder with tokenizer.json and tokenizer_config.json.
        first: First id to drop.

    Returns:
        The dropped tokens.
    """
    dropped: set[str] = set()
    path = os.path.join(folder, "tokenizer.json")
    if os.path.isfile(path):
        data = _read(path)
        dropped |= {token["content"] for token in data.get("added_tokens", []) if token["id"] >= first}
        data["added_tokens"] = [token for token in data.get("added_tokens", []) if token["id"] < first]
        data["padding"] = None
        _write(path, data)
    path = os.path.join(folder, "tokenizer_config.json")
    if os.path.isfile(path):
        data = _read(path)
        added = data.get("added_tokens_decoder", {})
        dropped |= {entry["content"] for index, entry in added.items() if int(index) >= first}
        data["added_tokens_decoder"] = {index: entry for index, entry in added.items() if int(index) < first}
        data = {key: value for key, value in data.items() if not _mentions(value, dropped)}
        data.pop("extra_special_tokens", None)
        data.pop("processor_class", None)
        if not data["added_tokens_decoder"]:
            del data["added_tokens_decoder"]
        _write(path, data)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            data = _read(path)
            _write(path, {k: v for k, v in data.items() if k not in dropped and not _mentions(v, dropped)})
    return sorted(dropped)


def _mentions(value, tokens: set[str]) -> bool:
    return (
        (value.get("content") if isinstance(value, dict) else value) in tokens
        if isinstance(value, str | dict)
        else False
    )


def _read(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _write(path: str, data: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
        file.write("\n")
