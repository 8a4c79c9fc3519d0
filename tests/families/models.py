"""Tiny random models of every family in their real architecture, and mixed batches for them.

A sample is (words before, pictures, words after); a picture is ("image", (height, width) in pixels) or
("video", number of frames).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

from duet import DuetConfig

IMAGE, VIDEO, VOCABULARY, LAYERS = 100, 101, 110, 4
SIDE = 24  # pixels of a tower pass
SCHEDULE = {1: 0.5, 3: 0.0}


@dataclass(frozen=True)
class Case:
    """What the contract needs to know of a family.

    Attributes:
        build: a model in evaluation mode; takes ``seed`` and ``attention``.
        inputs: model, samples and padding side to inputs.
        samples: by name.
        config: what to attach.
        entering: visual tokens of each sample that enter the first layer then.
        noops: configurations that change nothing.
        projectors: parts of the names of what stands between the tower and the language model.
    """

    build: Callable[..., Any]
    inputs: Callable[..., dict[str, torch.Tensor]]
    samples: dict[str, tuple]
    config: DuetConfig
    entering: dict[str, int]
    noops: tuple[DuetConfig, ...]
    projectors: tuple[str, ...] = ("multi_modal_projector.",)

    def batch(self, model: Any, side: str = "left") -> dict[str, torch.Tensor]:
        """All samples together."""
        return self.inputs(model, list(self.samples.values()), side)

    def singles(self, model: Any) -> list[dict[str, torch.Tensor]]:
        """The same samples, one by one, without padding."""
        return [self.inputs(model, [sample], "left") for sample in self.samples.values()]


TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": 4, "initializer_range": 0.3,
}  # fmt: skip
ANYRES = {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]}


def _build(model_class: Any, config: Any, seed: int, attention: str) -> Any:
    torch.manual_seed(seed)
    config._attn_implementation = attention
    model = model_class(config).eval()
    model.generation_config.eos_token_id = None
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_token", "position_embeddings")):  # zero at the start in some towers
            torch.nn.init.normal_(parameter, std=0.3)
        elif "lambda_" in name:
            torch.nn.init.constant_(parameter, 1.0)
    return model


def _builder(model_class: Any, config_class: Any, vision: Callable[[], Any], text: Callable[[], Any], **fields: Any):
    def build(seed: int = 0, attention: str = "sdpa") -> Any:
        return _build(model_class, config_class(vision_config=vision(), text_config=text(), **fields), seed, attention)

    return build


def _clip() -> Any:
    return hf.CLIPVisionConfig(**TOWER)


def _siglip() -> Any:
    return hf.SiglipVisionConfig(**TOWER, vision_use_head=False)


def _internvit() -> Any:
    return hf.InternVLVisionConfig(**TOWER, use_qk_norm=True, norm_type="rms_norm")


def _llama() -> Any:
    return hf.LlamaConfig(**TEXT)


def _qwen2() -> Any:
    return hf.Qwen2Config(**TEXT)


def pixels(count: int, seed: int) -> torch.Tensor:
    """Normalised pixels of tower passes."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def _pictures(samples: list[tuple], kind: str) -> list[Any]:
    return [what for _, pictures, _ in samples for found, what in pictures if found == kind]


def _tiled(model: Any, samples: list[tuple]) -> dict[str, torch.Tensor]:
    """Images cut into tiles, as LLaVA-NeXT's processor hands them over: padded to the most passes."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes = _pictures(samples, "image")
    if not sizes:
        return {}
    counts = [image_size_to_num_patches(size, model.config.image_grid_pinpoints, SIDE) for size in sizes]
    values = torch.zeros(len(sizes), max(counts), 3, SIDE, SIDE)
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        values[number, :count] = pixels(count, seed=sum(size))
    return {"pixel_values": values, "image_sizes": torch.tensor(sizes)}


def _untiled(model: Any, samples: list[tuple]) -> dict[str, torch.Tensor]:
    """Images in one tower pass each."""
    sizes = _pictures(samples, "image")
    return {"pixel_values": torch.cat([pixels(1, seed=sum(size)) for size in sizes])} if sizes else {}


def _onevision(model: Any, samples: list[tuple]) -> dict[str, torch.Tensor]:
    """As ``_tiled``, but samples with several images bring each in one pass."""
    found = _tiled(model, samples)
    if found:
        found["batch_num_images"] = torch.tensor([len(_pictures([sample], "image")) for sample in samples])
    return found


def _with_videos(images: Callable) -> Callable:
    def make(model: Any, samples: list[tuple]) -> dict[str, torch.Tensor]:
        found, lengths = images(model, samples), _pictures(samples, "video")
        if lengths:
            found["pixel_values_videos"] = torch.stack([pixels(length, seed=50 + length) for length in lengths])
        return found

    return make


@torch.no_grad()
def _placeholders(model: Any, found: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """How many tokens the unreduced model makes of every picture."""
    body, counts = model.model, {}
    if "pixel_values" in found:
        extra = {name: found[name] for name in ("image_sizes", "batch_num_images") if name in found}
        counts["image"] = [len(x) for x in body.get_image_features(found["pixel_values"], **extra).pooler_output]
    if "pixel_values_videos" in found:
        videos = found["pixel_values_videos"]
        features = body.get_video_features(videos).pooler_output
        counts["video"] = [sum(x.shape[0] for x in features.flatten(0, -2).split(1)) // len(videos)] * len(videos)
    return counts


def _inputs(pictures: Callable) -> Callable:
    def make(model: Any, samples: list[tuple], side: str = "left") -> dict[str, torch.Tensor]:
        found = pictures(model, samples)
        counts = {kind: iter(numbers) for kind, numbers in _placeholders(model, found).items()}
        rows = [_prompt(sample, counts) for sample in samples]
        longest = max(map(len, rows))
        ids = [[0] * (longest - len(r)) + r if side == "left" else r + [0] * (longest - len(r)) for r in rows]
        mask = [
            [0] * (longest - len(r)) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * (longest - len(r))
            for r in rows
        ]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), **found}

    return make


def _prompt(sample: tuple, counts: dict[str, Any]) -> list[int]:
    before, pictures, after = sample
    g = torch.Generator().manual_seed(7 * before + after)
    words = lambda n: torch.randint(3, 90, (n,), generator=g).tolist()  # noqa: E731
    ids = [1, *words(before)]
    for kind, _ in pictures:
        ids += [IMAGE if kind == "image" else VIDEO] * next(counts[kind]) + words(1)
    return ids + words(after)


WIDE, TALL, PLAIN, LONG = (20, 45), (40, 22), (48, 48), (9, 60)
IMAGES = {
    "one image": (4, [("image", WIDE)], 7),
    "two images": (2, [("image", PLAIN), ("image", TALL)], 5),
    "text only": (3, [], 12),
}
VIDEOS = IMAGES | {
    "video": (5, [("video", 3)], 4),
    "video and image": (1, [("video", 3), ("image", LONG)], 6),
}
KEEP = {"dominant": 8, "contextual": 2, "cluster_width": 3}
NONE = (DuetConfig.none(), DuetConfig(stage1="none", schedule={3: 1.0}))


def _noops(patches: int) -> tuple[DuetConfig, ...]:
    return (*NONE, DuetConfig(dominant=patches, contextual=0, schedule={1: 1.0, 3: 1.0}, queries="all"))


def _entering(**counts: int) -> dict[str, int]:
    return {name.replace("_", " "): count for name, count in counts.items()}


def _config(**changes: Any) -> DuetConfig:
    return DuetConfig(**(KEEP | {"schedule": SCHEDULE} | changes))


IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
INDICES = {"image_token_index": IMAGE, "video_token_index": VIDEO}

CASES: dict[str, Case] = {
    "llava": Case(
        _builder(hf.LlavaForConditionalGeneration, hf.LlavaConfig, _clip, _llama, image_token_index=IMAGE),
        _inputs(_untiled),
        IMAGES,
        _config(),
        _entering(one_image=10, two_images=20, text_only=0),
        _noops(36),
    ),
    "llava_next": Case(
        _builder(
            hf.LlavaNextForConditionalGeneration, hf.LlavaNextConfig, _clip, _llama, image_token_index=IMAGE, **ANYRES
        ),
        _inputs(_tiled),
        IMAGES,
        _config(),
        _entering(one_image=30, two_images=80, text_only=0),  # 3 passes; 5 and 3
        _noops(36),
    ),
    "video_llava": Case(
        _builder(hf.VideoLlavaForConditionalGeneration, hf.VideoLlavaConfig, _clip, _llama, **INDICES),
        _inputs(_with_videos(_untiled)),
        VIDEOS,
        _config(variant="release"),
        _entering(one_image=10, two_images=20, text_only=0, video=30, video_and_image=40),
        NONE,
    ),
    "llava_onevision": Case(
        _builder(
            hf.LlavaOnevisionForConditionalGeneration, hf.LlavaOnevisionConfig, _siglip, _qwen2, **INDICES, **ANYRES,
            vision_aspect_ratio="anyres_max_3", vision_feature_layer=-1, vision_feature_select_strategy="full",
        ),
        _inputs(_with_videos(_onevision)),
        VIDEOS,
        _config(dominant=5),
        _entering(one_image=21, two_images=14, text_only=0, video=21, video_and_image=49),  # several images: one pass
        _noops(36),
    ),
    "llava_next_video": Case(
        _builder(
            hf.LlavaNextVideoForConditionalGeneration, hf.LlavaNextVideoConfig, _clip, _llama, **INDICES, **ANYRES
        ),
        _inputs(_with_videos(_tiled)),
        VIDEOS,
        _config(dominant=5),
        _entering(one_image=21, two_images=56, text_only=0, video=21, video_and_image=49),
        _noops(36),
    ),
    "internvl": Case(
        _builder(
            hf.InternVLForConditionalGeneration, hf.InternVLConfig, _internvit, _qwen2, image_token_id=IMAGE,
            image_seq_length=9, tie_word_embeddings=False,
        ),
        _inputs(_untiled),
        IMAGES,
        _config(dominant=5),
        _entering(one_image=7, two_images=14, text_only=0),
        _noops(9),
    ),
}  # fmt: skip
