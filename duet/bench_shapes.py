"""The models that ``duet.bench`` builds, by name: LLaVA-1.5 and Qwen2.5-VL by their sizes, with random weights.

Nothing is downloaded: cost does not depend on what a weight is. Widths are in elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from duet.bench_roofline import Work, attention, product
from duet.budget import DecoderShape
from duet.probe import Parts

if TYPE_CHECKING:
    from duet.bench_run import Case

PATCH = 14
IMAGE = 336
PATCHES = (IMAGE // PATCH) ** 2
BEFORE_IMAGE = 35  # text tokens of LLaVA-1.5's template in front of the image
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A LLaVA by its sizes."""

    name: str
    tower_width: int
    tower_heads: int
    tower_layers: int
    width: int
    heads: int
    layers: int
    mlp_width: int
    vocabulary: int
    image: int = IMAGE

    @property
    def patches(self) -> int:
        """Visual tokens of a picture."""
        return (self.image // PATCH) ** 2

    @property
    def tower_patches(self) -> int:
        """Positions of the tower, the class token left out."""
        return self.patches

    def with_tokens(self, tokens: int) -> Shape:
        """Return the same model for pictures of so many visual tokens.

        Raises:
            ValueError: they make no square.
        """
        side = math.isqrt(tokens)
        if side * side != tokens or side < 1:
            raise ValueError(
                f"shape {self.name} sees square pictures, so --visual_tokens must be a square, for example "
                f"{max(1, side) ** 2} or {(side + 1) ** 2}, not {tokens}"
            )
        return replace(self, image=side * PATCH)

    def decoder(self) -> DecoderShape:
        """Return the sizes of the language model."""
        return DecoderShape(
            layers=self.layers,
            width=self.width,
            mlp_width=self.mlp_width,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.width // self.heads,
            vocabulary=self.vocabulary,
        )

    def tower_work(self, batch: int, untouched: bool = False) -> list[Work]:
        """Return the tower's work; the library runs one block more than its features need."""
        tokens, width = self.patches + 1, self.tower_width
        rows = batch * tokens
        block = [
            product(rows, width, 3 * width),
            attention(batch, tokens, width, width),
            product(rows, width, width),
            product(rows, width, 4 * width),
            product(rows, 4 * width, width),
        ]
        embed = product(batch * self.patches, 3 * PATCH * PATCH, width)
        return [embed, *block * (self.tower_layers - int(not untouched))]

    def projector_work(self, batch: int, entering: int) -> list[Work]:
        """Return the projector's work; it sees what stage 1 leaves."""
        return [
            product(batch * entering, self.tower_width, self.width),
            product(batch * entering, self.width, self.width),
        ]

    def make(self, attention: str = "sdpa") -> nn.Module:
        """Return the model on the default device in the default type, with random weights."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        vision = CLIPVisionConfig(
            hidden_size=self.tower_width,
            intermediate_size=4 * self.tower_width,
            num_hidden_layers=self.tower_layers,
            num_attention_heads=self.tower_heads,
            image_size=self.image,
            patch_size=PATCH,
        )
        text = LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(2048, 2 * self.patches),
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.vocabulary - 1,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        config._attn_implementation = attention
        return LlavaForConditionalGeneration(config)

    def build(self, device: torch.device, dtype: torch.dtype, attention: str) -> nn.Module:
        """Make the model with random weights, frozen tower, everything else trainable."""
        return _build(self, device, dtype, attention, "model.vision_tower")

    def parts(self, model: nn.Module) -> Parts:
        """Return what a probe watches."""
        return Parts.of_llava(model)

    def inputs(self, case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """System prompt, image, question; labels on the last ``supervised`` positions."""
        generator = torch.Generator().manual_seed(1)
        ids = _prompt(case, self.patches, self.vocabulary - 1, generator)
        pixels = torch.randn(case.batch, 3, self.image, self.image, generator=generator)
        return _on(device, _with_labels(case, ids) | {"pixel_values": pixels.to(dtype)})


@dataclass(frozen=True)
class QwenShape:
    """A Qwen2.5-VL by its sizes; pictures have any size, given as visual tokens (merged units of patches)."""

    name: str
    tower_width: int
    tower_heads: int
    tower_layers: int
    tower_mlp: int
    full_layers: tuple[int, ...]
    merge: int
    width: int
    heads: int
    kv_heads: int
    layers: int
    mlp_width: int
    vocabulary: int
    tokens: int = 1024
    window: int = 112

    @property
    def patches(self) -> int:
        """Visual tokens of a picture."""
        return self.tokens

    @property
    def tower_patches(self) -> int:
        """Positions of the tower."""
        return self.tokens * self.merge**2

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens, as near to a square as the number allows."""
        rows = next(side for side in range(math.isqrt(self.tokens), 0, -1) if self.tokens % side == 0)
        return rows, self.tokens // rows

    def with_tokens(self, tokens: int) -> QwenShape:
        """Return the same model for pictures of so many visual tokens.

        Raises:
            ValueError: they are too few, or make no rectangle that a picture has.
        """
        shape = replace(self, tokens=tokens)
        if tokens < 4 or shape.grid[1] > 8 * shape.grid[0]:
            raise ValueError(f"--visual_tokens {tokens} makes no picture; take a product such as 32 x 32 = 1024")
        return shape

    def decoder(self) -> DecoderShape:
        """Return the sizes of the language model."""
        return DecoderShape(
            layers=self.layers,
            width=self.width,
            mlp_width=self.mlp_width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.width // self.heads,
            vocabulary=self.vocabulary,
        )

    def tower_work(self, batch: int, untouched: bool = False) -> list[Work]:
        """Return the tower's work: blocks that see the picture, and blocks that see windows of it."""
        del untouched  # both run all blocks
        rows, width = batch * self.tower_patches, self.tower_width
        inside = (self.window // PATCH) ** 2
        windows = math.ceil(self.tower_patches / inside)
        works = [product(rows, 2 * 3 * PATCH * PATCH, width)]
        for index in range(self.tower_layers):
            full = index in self.full_layers
            works += [
                product(rows, width, 3 * width),
                attention(batch, self.tower_patches, width, width)
                if full
                else attention(batch * windows, inside, width, width),
                product(rows, width, width),
                product(rows, width, 2 * self.tower_mlp),
                product(rows, self.tower_mlp, width),
            ]
        return works

    def projector_work(self, batch: int, entering: int) -> list[Work]:
        """Return the merger's work; it sees the whole picture, because stage 1 acts on merged units."""
        del entering
        rows, joined = batch * self.tokens, self.tower_width * self.merge**2
        return [product(rows, joined, joined), product(rows, joined, self.width)]

    def make(self, attention: str = "sdpa") -> nn.Module:
        """Return the model on the default device in the default type, with random weights."""
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        half = self.width // self.heads // 2
        vision = {
            "depth": self.tower_layers,
            "hidden_size": self.tower_width,
            "intermediate_size": self.tower_mlp,
            "num_heads": self.tower_heads,
            "patch_size": PATCH,
            "spatial_merge_size": self.merge,
            "temporal_patch_size": 2,
            "window_size": self.window,
            "fullatt_block_indexes": list(self.full_layers),
            "out_hidden_size": self.width,
        }
        sections = [half // 4, half // 4 + half // 8, half - 2 * (half // 4) - half // 8]
        text = {
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": max(32768, 2 * self.tokens),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        }
        last = self.vocabulary
        config = Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=last - 1,
            video_token_id=last - 2,
            vision_start_token_id=last - 3,
            vision_end_token_id=last - 4,
        )
        config._attn_implementation = attention
        return Qwen2_5_VLForConditionalGeneration(config)

    def build(self, device: torch.device, dtype: torch.dtype, attention: str) -> nn.Module:
        """Make the model with random weights, frozen tower, everything else trainable."""
        model = _build(self, device, dtype, attention, "model.visual")
        model.get_submodule("model.visual.merger").requires_grad_(True)
        return model

    def parts(self, model: nn.Module) -> Parts:
        """Return what a probe watches."""
        return Parts.of_qwen(model)

    def inputs(self, case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """System prompt, image, question; labels on the last ``supervised`` positions."""
        generator = torch.Generator().manual_seed(1)
        ids = _prompt(case, self.tokens, self.vocabulary - 4, generator, fill=self.vocabulary - 1)
        rows, columns = self.grid
        patches = torch.randn(case.batch * self.tower_patches, 2 * 3 * PATCH * PATCH, generator=generator)
        out = _with_labels(case, ids) | {
            "pixel_values": patches.to(dtype),
            "image_grid_thw": torch.tensor([[1, rows * self.merge, columns * self.merge]] * case.batch),
            "mm_token_type_ids": (ids == self.vocabulary - 1).int(),
        }
        return _on(device, out)


AnyShape = Shape | QwenShape

SHAPES: dict[str, Any] = {
    "mid": Shape("mid", 1024, 16, 24, 1024, 16, 16, 2752, 32000),
    "quick": Shape("quick", 64, 2, 3, 64, 2, 8, 172, 512),
    "tiny": Shape("tiny", 128, 4, 6, 128, 4, 12, 344, 1024),
    "7B": Shape("7B", 1024, 16, 24, 4096, 32, 32, 11008, 32064),
    "13B": Shape("13B", 1024, 16, 24, 5120, 40, 40, 13824, 32064),
    "Qwen2.5-VL-7B": QwenShape("Qwen2.5-VL-7B", 1280, 16, 32, 3420, (7, 15, 23, 31), 2, 3584, 28, 4, 28, 18944, 152064),
    # One patch is one visual token, so that eager maps of 16,384 tokens fit into a common machine's memory.
    "qwen-long": QwenShape("qwen-long", 128, 2, 8, 344, (3, 7), 1, 128, 2, 1, 8, 344, 1024, tokens=4096),
    # Every block of the towers of Qwen2-VL and Qwen3-VL sees the whole picture.
    "qwen-long-full": QwenShape(
        "qwen-long-full", 128, 2, 8, 344, (*range(8),), 1, 128, 2, 1, 8, 344, 1024, tokens=4096
    ),
    "qwen-quick": QwenShape("qwen-quick", 64, 2, 4, 96, (1, 3), 2, 64, 2, 1, 8, 96, 512, tokens=144, window=56),
}


def _build(shape: Any, device: torch.device, dtype: torch.dtype, attention: str, tower: str) -> nn.Module:
    previous = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = shape.make(attention)
    finally:
        torch.set_default_dtype(previous)
    shape.parts(model)  # fail here, not in the middle of a run
    model.get_submodule(tower).requires_grad_(False)
    return model.eval()


def _prompt(case: Case, image: int, words: int, generator: torch.Generator, fill: int | None = None) -> Tensor:
    """Ids of text, image and text; words are below ``words``, the placeholder is ``fill``. Shapes: [B, L]."""
    before = min(BEFORE_IMAGE, case.text // 2)
    text = torch.randint(3, words, (case.batch, case.text), generator=generator)
    placeholders = torch.full((case.batch, image), words if fill is None else fill)
    return torch.cat([text[:, :before], placeholders, text[:, before:]], dim=1)


def _with_labels(case: Case, ids: Tensor) -> dict[str, Tensor]:
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case.kind == "train":
        after = case.text - min(BEFORE_IMAGE, case.text // 2)
        supervised = min(case.supervised, after)
        out["labels"] = torch.full_like(ids, -100)
        out["labels"][:, -supervised:] = ids[:, -supervised:]
    return out


def _on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}


def parameters(shape: AnyShape) -> tuple[int, int]:
    """Return how many parameters a shape has, and how many of them are trained; nothing is allocated."""
    with torch.device("meta"):
        model = shape.make()
    tower = model.get_submodule("model.vision_tower" if isinstance(shape, Shape) else "model.visual")
    every = sum(p.numel() for p in model.parameters())
    return every, every - sum(p.numel() for p in tower.parameters())


def bytes_needed(shape: AnyShape, cases: list[Case], dtype: torch.dtype, eager: bool = False) -> int:
    """Return about how much memory a run needs: weights, what training adds to them, and activations."""
    every, trained = parameters(shape)
    most = every
    for case in cases:
        tokens = case.batch * (case.text + shape.patches)
        wide = 12 * shape.width + 4 * shape.mlp_width
        tower = 12 * case.batch * shape.tower_patches * shape.tower_width
        if case.kind == "train":
            needed = every + 3 * trained + tower + tokens * (shape.layers * wide + 3 * shape.vocabulary)
        else:
            needed = every + tower + tokens * (wide + 2 * shape.layers * shape.width)
        if eager:
            needed += 3 * case.batch * shape.tower_heads * shape.tower_patches**2
        most = max(most, needed)
    return most * torch.empty(0, dtype=dtype).element_size()


def memory_free(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, or None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def check_memory(shape: AnyShape, needed: int, free: int | None, device: torch.device) -> None:
    """Leave with a message that says how much memory a run needs, if there is less."""
    if free is None or needed <= free:
        return
    raise ValueError(
        f"shape {shape.name} needs about {needed / GIB:.1f} GiB here, and {device} has "
        f"{free / GIB:.1f} GiB free; take a smaller --shape or --batch, --dtype bfloat16, or --train_batch without a "
        "number, which leaves the training step out"
    )
