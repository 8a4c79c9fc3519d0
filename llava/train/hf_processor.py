"""The processor of a Hugging Face model, with and without torchvision, and the frames of a video.

The video part of transformers' processors needs torchvision. Pictures do not, and neither does Video-LLaVA, whose
frames are prepared like pictures: resized, cropped and normalised one by one, never flipped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.hub import PushToHubMixin, cached_file

logger = logging.getLogger(__name__)

FRAMES_LIKE_PICTURES = ("video_llava",)
"""Model types whose videos can be trained on."""
_PROCESSOR_FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")


class FrameProcessor(PushToHubMixin):
    """Prepares videos with the model's image processor, in the place of a video processor that needs torchvision.

    Args:
        image_processor: the model's own.
        settings: what the checkpoint says of its video processor; written back when the processor is saved.
        supported: False for models whose videos are not prepared like pictures.
    """

    _auto_class = None
    model_input_names = ("pixel_values_videos",)

    def __init__(self, image_processor: Any, settings: dict[str, Any], supported: bool) -> None:
        self.image_processor = image_processor
        self.settings = settings
        self.supported = supported

    def __call__(self, videos: Sequence[Sequence[Image.Image]], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return `pixel_values_videos` [V, T, 3, H, W].

        Raises:
            ImportError: this model's videos need torchvision.
        """
        del kwargs
        if not self.supported:
            raise ImportError("the videos of this model need its own video processor: install torchvision")
        clips = []
        for frames in videos:
            out = self.image_processor(list(frames), return_tensors="pt")
            clips.append(next(value for name, value in out.items() if name.startswith("pixel_values")))
        return {"pixel_values_videos": torch.stack(clips)}

    def to_dict(self) -> dict[str, Any]:
        """What a saved processor says of its video part."""
        return dict(self.settings)


def load_processor(path: str, config: Any, cache_dir: str | None = None, chat_template: str | None = None) -> Any:
    """Load a model's processor.

    Args:
        path: folder or hub name.
        config: the model's configuration.
        cache_dir: hub cache.
        chat_template: file with a chat template to use instead of the checkpoint's own.

    Raises:
        ValueError: there is no processor, no chat template, or no such template file.
    """
    host: Any = PROCESSOR_MAPPING.get(type(config), None)
    if host is not None and "video_processor" in host.get_attributes() and _without_video_part(config):
        processor = _load_without_video_part(host, path, config, cache_dir)
    else:
        processor = AutoProcessor.from_pretrained(path, config=config, cache_dir=cache_dir)
    if not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{path} has no processor (processor_config.json or preprocessor_config.json) beside its model"
        )
    if chat_template is not None:
        file = Path(chat_template)
        if not file.is_file():
            raise ValueError(f"--chat_template {chat_template}: there is no such file")
        processor.chat_template = file.read_text(encoding="utf-8")
    if not isinstance(processor.chat_template or getattr(processor.tokenizer, "chat_template", None), str):
        raise ValueError(f"{path} has no chat template; give a Jinja file with --chat_template")
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    return processor


def _without_video_part(config: Any) -> bool:
    import importlib.util

    return config.model_type in FRAMES_LIKE_PICTURES or importlib.util.find_spec("torchvision") is None


def _load_without_video_part(host: Any, path: str, config: Any, cache_dir: str | None) -> Any:
    """Load a processor whose video part is a `FrameProcessor`."""
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, cache_dir=cache_dir)
    image_processor: Any = AutoImageProcessor.from_pretrained(path, cache_dir=cache_dir)
    stored = _stored(path, cache_dir)
    supported = config.model_type in FRAMES_LIKE_PICTURES
    parts: dict[str, Any] = {
        "image_processor": image_processor,
        "tokenizer": tokenizer,
        "video_processor": FrameProcessor(image_processor, _video_settings(stored, image_processor), supported),
    }
    own = [name for name in _init_names(host) if name not in parts and name in stored]
    options = {name: stored[name] for name in own if name != "chat_template"}
    template = _stored_template(path, cache_dir) or getattr(tokenizer, "chat_template", None)
    return picture_processor(host)(**parts, **options, chat_template=template)


def picture_processor(host: Any) -> Any:
    """Return a subclass of a processor class that accepts a `FrameProcessor`; saved files name the host."""

    def check_argument_for_proper_class(self: Any, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor" and isinstance(argument, FrameProcessor):
            return FrameProcessor
        return host.check_argument_for_proper_class(self, argument_name, argument)

    return type(host.__name__, (host,), {check_argument_for_proper_class.__name__: check_argument_for_proper_class})


def _init_names(host: Any) -> list[str]:
    import inspect

    return list(inspect.signature(host.__init__).parameters)[1:]


def _stored(path: str, cache_dir: str | None) -> dict[str, Any]:
    """Everything that the checkpoint's processor files say, the most specific file first."""
    merged: dict[str, Any] = {}
    for name in _PROCESSOR_FILES:
        file = cached_file(
            path, name, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if file is None:
            continue
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        if name.startswith("video_"):
            values = {"video_processor": values}
        merged = values | merged
    return merged


def _video_settings(stored: dict[str, Any], image_processor: Any) -> dict[str, Any]:
    """What is known of the video processor; where the checkpoint says nothing, its frames are its pictures."""
    if isinstance(stored.get("video_processor"), dict):
        return stored["video_processor"]
    settings = image_processor.to_dict()
    kind = str(settings.pop("image_processor_type", type(image_processor).__name__))
    return settings | {"video_processor_type": kind.replace("ImageProcessor", "VideoProcessor")}


def _stored_template(path: str, cache_dir: str | None) -> str | None:
    for name in ("chat_template.jinja", "chat_template.json"):
        file = cached_file(
            path, name, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if file is not None:
            text = Path(file).read_text(encoding="utf-8")
            return json.loads(text)["chat_template"] if name.endswith(".json") else text
    return None
