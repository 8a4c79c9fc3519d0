"""Tiny random Hugging Face models with processors, tokenizers and chat templates on disk, and records for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_world
import transformers as hf
from PIL import Image

from llava.tokenization import load_tokenizer
from llava.train.hf_processor import FrameProcessor, picture_processor

SIDE, PATCH = 24, 4
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}{% if c['type'] != 'text' %}"
    "{{ '<' + c['type'] + '>\n' }}{% elif m['role'] == 'assistant' %}{% generation %}{{ c['text'] + ' ' }}"
    "{% endgeneration %}{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""With marks around the answers, and without an end mark after them, as llava-hf's own."""
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif c['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Without marks, as Qwen's."""
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.2,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = ("llava", "llava_next", "qwen2_5_vl")
REDUCTION = {
    "llava": ("8", "2"), "llava_next": ("8", "2"), "video_llava": ("8", "2"), "qwen2_5_vl": ("4", "2"),
}  # fmt: skip


def make_tokenizer(special: list[str], eos: str = "</s>") -> Any:
    """The golden tokenizer with a few more tokens."""
    tokenizer = load_tokenizer(str(train_world.GOLDEN / "tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": special, "pad_token": "<pad>", "eos_token": eos})
    return tokenizer


def _clip_parts(tokenizer: Any, pad: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    text = hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer), pad_token_id=pad, bos_token_id=1, eos_token_id=2)
    return hf.CLIPVisionConfig(**TOWER), text


def _square() -> dict[str, Any]:
    return {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


def _build_llava(folder: Path) -> None:
    tokenizer = make_tokenizer(["<image>"])
    vision, text = _clip_parts(tokenizer, tokenizer.pad_token_id)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, vision_feature_layer=-2)
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(**_square()), tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


def _build_llava_next(folder: Path) -> None:
    tokenizer = make_tokenizer(["<image>"])
    vision, text = _clip_parts(tokenizer, tokenizer.pad_token_id)
    image = tokenizer.convert_tokens_to_ids("<image>")
    grid = [[24, 48], [48, 24], [48, 48]]
    config = hf.LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=image, vision_feature_layer=-2,
        image_grid_pinpoints=grid,
    )  # fmt: skip
    hf.LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessorPil(**_square(), image_grid_pinpoints=grid), tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


def _build_qwen2_5_vl(folder: Path) -> None:
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = make_tokenizer(special, eos="<|im_end|>")
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 4, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "initializer_range": 0.3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32,
        "window_size": 16, "fullatt_block_indexes": [1, 3],
    }  # fmt: skip
    text = TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope, "pad_token_id": tokenizer.pad_token_id}
    config = hf.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    hf.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    pictures = hf.Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, temporal_patch_size=2, min_pixels=64 * 2, max_pixels=64 * 30
    )
    videos = FrameProcessor(pictures, {"video_processor_type": "Qwen2VLVideoProcessor"}, supported=False)
    picture_processor(hf.Qwen2_5_VLProcessor)(
        image_processor=pictures, tokenizer=tokenizer, video_processor=videos, chat_template=CHATML_TEMPLATE
    ).save_pretrained(folder)


def _build_video_llava(folder: Path) -> None:
    tokenizer = make_tokenizer(["<image>", "<video>"])
    vision, text = _clip_parts(tokenizer, tokenizer.pad_token_id)
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    config = hf.VideoLlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image, video_token_index=video, image_seq_length=36,
        video_seq_length=8 * 37, vision_feature_layer=-2,
    )  # fmt: skip
    hf.VideoLlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = hf.VideoLlavaImageProcessor(**_square())
    videos = FrameProcessor(pictures, {"video_processor_type": "VideoLlavaVideoProcessor"}, supported=True)
    picture_processor(hf.VideoLlavaProcessor)(
        image_processor=pictures, tokenizer=tokenizer, video_processor=videos, patch_size=PATCH,
        vision_feature_select_strategy="default", chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


BUILDERS = {
    "llava": _build_llava, "llava_next": _build_llava_next, "qwen2_5_vl": _build_qwen2_5_vl,
    "video_llava": _build_video_llava,
}  # fmt: skip


def build(family: str, folder: Path) -> Path:
    """Write a model with its processor; returns its folder."""
    target = folder / family
    if not target.is_dir():
        BUILDERS[family](target)
    return target


def write_records(folder: Path, count: int = 8, text_only: int = 2, several: bool = True) -> tuple[Path, Path]:
    """Write records with one picture, with two, and without; returns the annotation file and the image folder."""
    path, images = train_world.write_data(folder, count=count, text_only=text_only)
    records = json.loads(path.read_text())
    if several:
        last = records[-1]
        last["image"] = [last["image"], records[-2]["image"]]
        last["conversations"][0]["value"] = "<image>\nand <image> what are they?"
        last["conversations"] += [{"from": "human", "value": "and more?"}, {"from": "gpt", "value": "no more"}]
    path.write_text(json.dumps(records))
    return path, images


def write_clip(path: Path, frames: int, seed: int = 0) -> None:
    """Write a GIF of random frames."""
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)) for _ in range(frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)


def write_videos(folder: Path, count: int = 4, images: int = 2) -> tuple[Path, Path]:
    """Write records with a video each, and some with an image or without any; returns the file and the folder."""
    path, pictures = train_world.write_data(folder, count=images + 2, text_only=2)
    records = json.loads(path.read_text())
    for index in range(count):
        name = f"clip{index}.gif"
        write_clip(pictures / name, frames=(3, 12)[index % 2], seed=index)
        turns = [{"from": "human", "value": "<video>\nwhat moves?"}, {"from": "gpt", "value": f"thing {index}"}]
        records.append({"id": f"v{index}", "video": name, "conversations": turns})
    path.write_text(json.dumps(records))
    return path, pictures


def command_line(folder: Path, family: str, model: Path, data: tuple[Path, Path], output: str = "out", **flags: Any):
    """Flags of a short run in fp32; keyword arguments override, None removes."""
    dominant, contextual = REDUCTION[family]
    values: dict[str, Any] = {
        "model_name_or_path": model, "data_path": data[0], "image_folder": data[1], "output_dir": folder / output,
        "max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2,
        "learning_rate": 2e-3, "max_grad_norm": 1.0, "warmup_steps": 0, "logging_steps": 1, "report_to": "none",
        "disable_tqdm": True,
        "dominant": dominant, "contextual": contextual, "layer_list": "[1,3]", "image_token_ratio_list": "[0.5,0.0]",
    }  # fmt: skip
    values.update(flags)
    return [item for key, value in values.items() if value is not None for item in (f"--{key}", str(value))]
