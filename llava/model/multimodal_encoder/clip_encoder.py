"""The CLIP vision tower: pixels to patch features, reduced on the way out when a reduction is given."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig

from duet import DuetConfig, tracing
from duet.families.anyres import reduce_pictures
from duet.stage1 import VisionReduction
from duet.vision import encode_vision
from llava.model.checkpoints import is_partitioned
from llava.model.multimodal_encoder.feature_cache import FeatureCache, why_not
from llava.model.paths import resolve_path

# Geometry of the two towers that LLaVA checkpoints name, so that a checkpoint which brings its own tower weights can
# be opened without the hub. Source: the configurations published with the CLIP weights.
_CLIP_L14: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
KNOWN_GEOMETRY = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_L14, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_L14, "image_size": 224},
}
# Prefix of the level that CLIP lost in transformers 5; every older checkpoint has it.
OLD_LEVEL = "vision_model."


def tower_geometry(name: str, args) -> CLIPVisionConfig:
    """Find the tower's configuration: in the model config, in the tower's folder, in the table, on the hub.

    Raises:
        OSError: Nothing local describes the tower and the hub cannot be reached.
    """
    stored = getattr(args, "mm_vision_config", None)
    if stored is not None:
        return CLIPVisionConfig.from_dict(dict(stored))
    path = resolve_path(name, args)
    if path is None and name in KNOWN_GEOMETRY:
        return CLIPVisionConfig(**KNOWN_GEOMETRY[name])
    return CLIPVisionConfig.from_pretrained(path or name)


def default_image_processor(image_size: int) -> CLIPImageProcessorPil:
    """CLIP's preprocessing for square pictures of `image_size` pixels (PIL backend, for parity with LLaVA)."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )


class CLIPVisionModel(transformers.CLIPVisionModel):
    """CLIP's vision model, whose parts are found under `vision_model`, too, where they were before transformers 5."""

    @property
    def vision_model(self) -> CLIPVisionModel:
        """The model itself."""
        return self

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no: checkpoints are converted by this class's name, as for the class that it stands for."""
        return False


class CLIPVisionTower(nn.Module):
    """A CLIP vision model and the features that are taken of it.

    Without a reduction the model runs as it is: hooks and replaced forwards act, and `feature_select` chooses. With one
    only the layers run that the features need.

    The modules are built from the configuration, so that a checkpoint can fill them; `load_model` fetches the stock
    weights when no checkpoint did.

    Args:
        vision_tower: Folder or hub name of the stock weights.
        args: Model config or training arguments; read for `mm_vision_select_layer`, `mm_vision_select_feature`
            (`patch` or `cls_patch`), `mm_vision_config`, `unfreeze_mm_vision_tower`.
        delay_load: Build the modules with random weights and leave loading to the caller.
    """

    def __init__(self, vision_tower: str, args, delay_load: bool = False):
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", None) or "patch"
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(
                f"mm_vision_select_feature is {self.select_feature!r}; use 'patch' (no class token) or 'cls_patch'"
            )
        self.tunable = bool(getattr(args, "unfreeze_mm_vision_tower", False))
        self._path = resolve_path(vision_tower, args)
        self._checkpoint = getattr(args, "_name_or_path", "") or ""
        self._image_processor = None
        self.feature_cache: FeatureCache | None = None
        self.register_load_state_dict_pre_hook(_drop_old_level)
        self.vision_tower: Any = None
        if delay_load:
            self.cfg_only = tower_geometry(vision_tower, args)
            self.vision_tower = CLIPVisionModel(self.cfg_only)
            self.freeze()
        else:
            self.load_model()

    def load_model(self, device_map=None) -> None:
        """Load the stock weights, unless weights are already there.

        Raises:
            OSError: Neither a local folder nor the hub has the tower.
        """
        if self.is_loaded:
            return
        built = self.vision_tower
        dtype = torch.float32 if built is None else built.dtype
        try:
            stock: Any = CLIPVisionModel.from_pretrained(
                self._path or self.vision_tower_name, dtype=dtype, device_map=device_map
            )
        except OSError as error:
            raise OSError(
                f"the vision tower {self.vision_tower_name!r} could not be loaded: put a CLIP vision model there, "
                "set mm_vision_tower in the checkpoint's config.json to where it is, or make the hub reachable "
                f"({error})"
            ) from error
        if built is not None and device_map is None and built.device.type != "meta":
            stock.to(device=built.device)
        self.vision_tower = stock
        self.mark_loaded()

    def mark_loaded(self) -> None:
        """Note that the weights are in place (a checkpoint brought them, or `load_model` did)."""
        self.is_loaded = True
        self.freeze()

    def freeze(self) -> None:
        """Freeze the weights, or free them when the config asks for a trainable tower."""
        if self.vision_tower is not None:
            self.vision_tower.requires_grad_(self.tunable)

    @property
    def image_processor(self):
        """The preprocessing that belongs to this tower, from its folder, the checkpoint's, or CLIP's defaults."""
        if self._image_processor is None:
            for folder in (self._path, self._checkpoint):
                if folder and os.path.isfile(os.path.join(folder, "preprocessor_config.json")):
                    self._image_processor = CLIPImageProcessorPil.from_pretrained(folder)
                    break
            else:
                self._image_processor = default_image_processor(self.config.image_size)
        return self._image_processor

    @image_processor.setter
    def image_processor(self, processor) -> None:
        self._image_processor = processor

    def forward(
        self,
        images: Tensor | list[Tensor],
        reduction=None,
        project=None,
        question=None,
        tiles=None,
        layouts=None,
        places: list[Tensor] | None = None,
    ) -> Tensor | list[Tensor]:
        """Encode pictures.

        Args:
            images: [B, 3, H, W], or a list of [3, H, W] (then the result is a list of [1, K, D]).
            reduction: `duet.DuetConfig` whose stage 1 acts here, or None for all patches.
            project: the projector that follows, for reducers that compare projected tokens.
            question: what is asked about each picture, for reducers that listen (see `duet.encode_vision`).
            tiles: which of `images` are tiles of one picture (see `duet.encode_vision`).
            layouts: how the tiles of each picture lie and which of their patches are no border
                (`duet.families.anyres.Layout`); with a reduction only.
            places: is given [K] per picture, the place that each token had among the unreduced ones.

        Returns:
            [B, K, D] in the dtype of `images`; without a reduction K is every patch (and the class token). Where the
            reduction finds the number of tokens picture by picture, a list of [K_i, D]. With `layouts` one [K_i, D] for
            each picture, or all [passes, N, D] of one that the reduction leaves whole.
        """
        trainable = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
            if isinstance(images, list):
                encoded = [self._encode(image.unsqueeze(0), config=reduction, project=project) for image in images]
                return [one if isinstance(one, Tensor) else one[0].unsqueeze(0) for one in encoded]
            if self.feature_cache is not None and tiles is None and layouts is None and not tracing.wants_images():
                return self.feature_cache.encode(
                    images, reduction, partial(self._encode, config=reduction), together=is_partitioned(self)
                )
            if layouts is not None:
                return self._encode_tiled(images, reduction, project, question, layouts)
            return self._encode(images, places, config=reduction, project=project, question=question, tiles=tiles)

    def feature_select(self, image_forward_outs) -> Tensor:
        """Choose the features that go on.

        Args:
            image_forward_outs: What the CLIP model returned with `output_hidden_states=True`.

        Returns:
            [B, N, D], or [B, 1 + N, D] with the class token in front where `select_feature` is `cls_patch`.

        Raises:
            ValueError: `select_layer` names a layer that the model does not have.
        """
        states = image_forward_outs.hidden_states
        layers = [self.select_layer] if isinstance(self.select_layer, int) else list(self.select_layer)
        if not all(-len(states) <= layer < len(states) for layer in layers):
            raise ValueError(
                f"mm_vision_select_layer is {self.select_layer}, but the tower has {len(states) - 1} blocks: use "
                f"-{len(states)} to {len(states) - 1}"
            )
        features = states[layers[0]] if len(layers) == 1 else torch.cat([states[layer] for layer in layers], dim=-1)
        return features if self.select_feature == "cls_patch" else features[:, 1:]

    def _encode(
        self, images: Tensor, places: list[Tensor] | None = None, config: DuetConfig | None = None, **stage1
    ) -> Tensor | list[Tensor]:
        pixels = images.to(device=self.device, dtype=self.dtype)
        if config is None or config.stage1 == "none":
            encoded = self._encode_whole(pixels)
        else:
            encoded = encode_vision(
                self.vision_tower,
                pixels,
                select_layer=self.select_layer,
                class_token=self.select_feature == "cls_patch",
                config=config,
                **stage1,
            )
        if places is not None:
            places += encoded.places(self.num_patches, self.select_feature == "cls_patch")
        tokens = encoded.tokens.to(images.dtype)
        return tokens if encoded.counts is None else encoded.per_image(tokens)

    def _encode_whole(self, pixels: Tensor) -> VisionReduction:
        """All tokens, by the model's own forward."""
        features = self.feature_select(self.vision_tower(pixels, output_hidden_states=True))
        grid = (pixels.shape[-2] // self.config.patch_size, pixels.shape[-1] // self.config.patch_size)
        encoded = VisionReduction.identity(features, self.select_feature == "cls_patch", grid)
        tracing.record_vision(encoded)
        return encoded

    def _encode_tiled(self, images: Tensor, reduction, project, question, layouts) -> list[Tensor]:
        pixels = images.to(device=self.device, dtype=self.dtype)
        reduced = reduce_pictures(
            self.vision_tower, pixels, self.select_layer, layouts, reduction,
            drop_class=self.select_feature == "patch", project=project, question=question,
        )  # fmt: skip
        return [tokens.to(images.dtype) for tokens in reduced.all_tokens([layout.passes for layout in layouts])]

    def keep_features(self, folder: str, reduction: DuetConfig | None) -> None:
        """Keep what the tower makes of a picture on disk, and read it from there the next time.

        Args:
            folder: where the features lie.
            reduction: the reduction that will be in force.

        Raises:
            ValueError: the features depend on more than the picture; the message says on what.
        """
        reason = why_not(self, reduction)
        if reason is not None:
            raise ValueError(f"--feature_cache {folder} cannot be used: {reason}")
        further = {"layer": self.select_layer, "feature": self.select_feature, "device": self.device.type}
        self.feature_cache = FeatureCache(folder, self.vision_tower, further)

    @property
    def dummy_feature(self) -> Tensor:
        """A row of zeros [1, D]."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.vision_tower.device

    @property
    def config(self) -> Any:
        """Configuration of the CLIP model."""
        return self.vision_tower.config

    @property
    def hidden_size(self) -> int:
        """Width D of the features."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the picture."""
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches N of one picture."""
        return self.num_patches_per_side**2


class CLIPVisionTowerS2(CLIPVisionTower):
    """LLaVA's multi-scale tower. Not available yet: asking for it is an error that says so."""

    def __init__(self, vision_tower: str, args, delay_load: bool = False):
        raise NotImplementedError(
            f"config.s2 is set for {vision_tower!r}: the multi-scale (S2) vision tower is not supported yet; "
            "use a LLaVA-1.5 checkpoint or remove s2 from its config.json"
        )


def _drop_old_level(module, state_dict, prefix, *_) -> None:
    """Rename keys of the old CLIP layout in place, so that a bare `load_state_dict` reads both layouts."""
    old = f"{prefix}vision_tower.{OLD_LEVEL}"
    for key in [key for key in state_dict if key.startswith(old)]:
        state_dict[f"{prefix}vision_tower.{key[len(old) :]}"] = state_dict.pop(key)
