"""Tiny random Qwen models in their real architectures, and inputs for them.

Shapes: P patches of all pictures of a batch.
"""

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
IMAGE, VIDEO, START, END = 100, 101, 102, 103
VOCABULARY, LAYERS, PATCH, MERGE = 110, 4, 4, 2

IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
TOWER = {
    "depth": 4, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2,
    "initializer_range": 0.3,
}  # fmt: skip


def _rope(**more):
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **more}


def _config(family):
    if family == "qwen2_5_vl":
        vision = TOWER | {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16,
            "fullatt_block_indexes": [1, 3],
        }  # fmt: skip
        return Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": _rope()}, vision_config=vision, **IDS)
    if family == "qwen2_vl":
        vision = TOWER | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        return Qwen2VLConfig(text_config=TEXT | {"rope_parameters": _rope()}, vision_config=vision, **IDS)
    vision = TOWER | {
        "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
    }  # fmt: skip
    text = TEXT | {"head_dim": 8, "rope_parameters": _rope(mrope_interleaved=True)}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **IDS)


CLASSES = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}


def build(family, seed=0, attention="sdpa", **vision):
    """Return a model in evaluation mode. ``vision`` changes fields of its vision configuration."""
    torch.manual_seed(seed)
    config = _config(family)
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    config._attn_implementation = attention
    model = CLASSES[family](config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE, VIDEO, START, END]
    return model


def pixels(grids, seed=0):
    """Patches of pictures with the given (frames, rows, columns), as the processor packs them. Shapes: [P, 96]."""
    made = [
        torch.randn(t * h * w, 3 * 2 * PATCH * PATCH, generator=torch.Generator().manual_seed(seed + 7 * t + h * w))
        for t, h, w in grids
    ]
    return torch.cat(made)


def units(grid):
    """Placeholders of a picture."""
    return grid[0] * grid[1] * grid[2] // MERGE**2


def prompt(family, before, pictures, after, seed):
    """Ids of one sample: words, pictures with a word between them, words."""
    g = torch.Generator().manual_seed(seed)
    words = lambda n: torch.randint(3, 90, (n,), generator=g).tolist()  # noqa: E731
    ids = [1, *words(before)]
    for kind, grid in pictures:
        if kind == "video" and family == "qwen3_vl":  # every frame has its own time stamp
            for _ in range(grid[0]):
                ids += [*words(2), START, *[VIDEO] * (units(grid) // grid[0]), END]
        else:
            ids += [START, *[IMAGE if kind == "image" else VIDEO] * units(grid), END]
        ids += words(1)
    return ids + words(after)


ONE, SMALL, TALL = (1, 8, 12), (1, 4, 6), (1, 10, 6)  # 24, 6 and 15 units
CLIP = (3, 6, 8)  # 3 frames of 12 units
SAMPLES = {
    "one image": (4, [("image", ONE)], 7),
    "text only": (3, [], 12),
    "two images": (2, [("image", SMALL), ("image", TALL)], 5),
    "video": (5, [("video", CLIP)], 4),
    "image and video": (1, [("video", CLIP), ("image", TALL)], 6),
}


def make_inputs(family, samples, side="left"):
    """Inputs of a batch of samples (words before, pictures, words after)."""
    rows = [prompt(family, *sample, seed=sum(sample[::2])) for sample in samples]
    longest = max(map(len, rows))
    pad = lambda row: [0] * (longest - len(row))  # noqa: E731
    ids = torch.tensor([pad(row) + row if side == "left" else row + pad(row) for row in rows])
    mask = torch.tensor([pad(row) + [1] * len(row) if side == "left" else [1] * len(row) + pad(row) for row in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": ((ids == IMAGE).int() + 2 * (ids == VIDEO).int()) * mask,
    }
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grids = [grid for _, pictures, _ in samples for found, grid in pictures if found == kind]
        if grids:
            inputs[name] = pixels(grids)
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids)
    if family == "qwen2_5_vl" and "video_grid_thw" in inputs:
        inputs["second_per_grid_ts"] = torch.full((len(inputs["video_grid_thw"]),), 1.5)
    return inputs


def mixed_batch(family, side="left"):
    """All samples together."""
    return make_inputs(family, list(SAMPLES.values()), side)


def mixed_singles(family):
    """The same samples, one by one, without padding."""
    return [make_inputs(family, [sample]) for sample in SAMPLES.values()]
