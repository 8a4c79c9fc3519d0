"""The model `duet_llava` for lmms-eval: this package's models with every reduction setting as a model argument.

python -m lmms_eval --model duet_llava --model_args pretrained=MODEL,duet_tokens=192 --tasks pope --batch_size 8

lmms-eval finds it through the entry point in pyproject.toml. It is an optional dependency, so it is imported only when
one of the names below is asked for; see docs/lmms_eval.md.
"""

from __future__ import annotations

import argparse
import functools
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.eval.generate import Answerer, mark_images, pack, preprocess, template_for
from llava.eval.run_llava import generation_options, move_pixels
from llava.eval.video import read_frames
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pictures import ORIENTATIONS, read_picture
from llava.reduction import ReductionArguments

MODEL = "duet_llava"
MAX_NEW_TOKENS = 1024  # where a task sets none; lmms-eval's own `llava` has the same
_MISSING = "lmms-eval is not installed; pip install -e '.[lmms]'"


def manifest() -> Any:
    """What the entry point gives to lmms-eval: the model's name and where its class is.

    Raises:
        ImportError: lmms-eval is not installed.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"{_MISSING} ({error})") from error
    return ModelManifest(model_id=MODEL, simple_class_path=f"{__name__}.DuetLlava")


def __getattr__(name: str) -> Any:
    """Make `DuetLlava` when it is asked for: its base class belongs to the optional package."""
    if name == "DuetLlava":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _model_class() -> type:
    try:
        from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"{_MISSING} ({error})") from error
    return type("DuetLlava", (LmmsModel, lmms), {"__module__": __name__, "__doc__": LmmsModel.__doc__})


def parse_reduction(arguments: dict[str, Any]) -> ReductionArguments:
    """Read the reduction flags among the model arguments; they have the command line's names.

    Raises:
        ValueError: an argument is unknown or cannot be read; names it.
    """
    parser = argparse.ArgumentParser(prog=MODEL, add_help=False, allow_abbrev=False, exit_on_error=False)
    ReductionArguments.add_arguments(parser)
    try:
        namespace, unknown = parser.parse_known_args([f"--{name}={value}" for name, value in arguments.items()])
    except argparse.ArgumentError as error:
        raise ValueError(f"{MODEL}: --model_args: {error}") from error
    if unknown:
        known = ", ".join(vars(ReductionArguments()))
        raise ValueError(f"{MODEL}: unknown in --model_args: {', '.join(unknown)}; the reduction's names are {known}")
    return ReductionArguments.from_namespace(namespace)


def decoding(wanted: dict[str, Any]) -> dict[str, Any]:
    """A task's generation settings as arguments of `generate`.

    As in lmms-eval's `llava`, a temperature of 0 is greedy, and `until` and `image_aspect_ratio` are not looked at: an
    answer ends where the model ends it, and pictures are prepared as the checkpoint says.
    """
    return generation_options(
        wanted.get("temperature") or 0,
        wanted.get("top_p"),
        wanted.get("num_beams") or 1,
        int(wanted.get("max_new_tokens") or MAX_NEW_TOKENS),
    )


def pictures_of(visuals: Any, task: str, orientation: str = "exif") -> list[Image.Image]:
    """The pictures of one document, RGB; none for None. A path is read as a video, of which 8 frames are taken.

    Args:
        visuals: what the task's `doc_to_visual` gave; a picture may be undecoded, as `datasets` keeps it.
        task: its name.
        orientation: see `llava.pictures.ORIENTATIONS`.

    Raises:
        ValueError: one of them is neither a picture nor a path.
    """
    pictures: list[Image.Image] = []
    for visual in visuals or ():
        if isinstance(visual, Image.Image):
            pictures.append(read_picture(visual, orientation))
        elif isinstance(visual, str | Path):
            pictures += read_frames(visual)
        elif isinstance(visual, dict) and any(visual.get(key) is not None for key in ("bytes", "path")):
            data = visual.get("bytes")
            pictures.append(read_picture(visual["path"] if data is None else data, orientation))
        else:
            raise ValueError(
                f"{MODEL}: doc_to_visual of task {task!r} gave a {type(visual).__name__}; expected pictures, or paths "
                "of videos"
            )
    return pictures


class LmmsModel:
    """A LLaVA model of this package, with or without DUET; stands in front of lmms-eval's base class.

    Args:
        pretrained: checkpoint folder or hub name.
        model_base: language model below a LoRA or projector folder.
        model_name: name, where the files do not say which backbone it is.
        conv_template: conversation template; the default is the evaluation's own.
        batch_size: samples at once; the answers do not depend on it.
        max_batch_size: not used; lmms-eval may pass it.
        device: such as "cpu" or "cuda:0"; with several processes each takes its own.
        device_map: "auto" spreads one model over all accelerators.
        dtype: such as "bfloat16"; the default is the loader's.
        attn_implementation: the decoder's attention.
        load_4bit: quantise to 4 bits.
        load_8bit: quantise to 8 bits.
        image_orientation: how pictures are turned, see `llava.pictures.ORIENTATIONS`.
        **reduction: the flags of `llava.reduction`; none given keeps what the checkpoint says.

    Raises:
        ValueError: an argument is unknown or cannot be read, or the model cannot take pictures.
    """

    rank: int
    task_dict: dict[str, Any]
    is_simple = True

    def __init__(
        self,
        pretrained: str,
        model_base: str | None = None,
        model_name: str | None = None,
        conv_template: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str | None = None,
        attn_implementation: str = "sdpa",
        load_4bit: bool = False,
        load_8bit: bool = False,
        image_orientation: str = "exif",
        **reduction: Any,
    ):
        super().__init__()
        flags = parse_reduction(reduction)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"{MODEL}: batch_size={batch_size} must be a whole number; 'auto' is not supported")
        if image_orientation not in ORIENTATIONS:
            raise ValueError(
                f"{MODEL}: image_orientation={image_orientation!r} must be one of {', '.join(ORIENTATIONS)}"
            )
        self.batch_size, self.orientation = int(batch_size), image_orientation
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = self._world_size == 1
        self.device = torch.device(device if device and alone else self.accelerator.device)
        place: dict[str, Any] = {"device_map": device_map} if device_map and alone else {"device": str(self.device)}
        name = model_name or get_model_name_from_path(str(pretrained))
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            str(pretrained),
            model_base,
            name,
            load_4bit=load_4bit,
            load_8bit=load_8bit,
            attn_implementation=attn_implementation,
            dtype=dtype,
            duet_config=flags,
            **place,
        )
        self.template = template_for(name, self.model.config, conv_template)
        self._answerer()

    def _answerer(self) -> Answerer:
        """Made anew each time: lmms-eval frees the memory of models that it finds as attributes."""
        return Answerer(self.model, self.tokenizer, self.image_processor, self.template)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer lmms-eval's requests, in their order; a batch may mix tasks that decode alike."""
        options = [decoding(request.args[1]) for request in requests]
        kinds = [repr(sorted(option.items())) for option in options]
        # Long questions first: if memory does not suffice, that shows at once.
        order = sorted(range(len(requests)), key=lambda i: (kinds[i], -len(requests[i].args[0])))
        answerer, answers = self._answerer(), [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc=MODEL) as progress:
            for _, group in groupby(order, key=kinds.__getitem__):
                places = list(group)
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    turns = [self._turn(*requests[i].args) for i in batch]
                    for i, text in zip(batch, answerer.answer(turns, **options[batch[0]]), strict=True):
                        answers[i] = text
                    progress.update(len(batch))
        return answers

    def _turn(self, context: str, _: Any, doc_to_visual: Any, doc_id: int, task: str, split: str):
        return context, pictures_of(doc_to_visual(self.task_dict[task][split][doc_id]), task, self.orientation)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Mean loss of each continuation, of which lmms-eval takes the smallest, and whether it is the greedy one."""
        return [self._likelihood(*request.args) for request in tqdm(requests, disable=self.rank != 0, desc=MODEL)]

    @torch.inference_mode()
    def _likelihood(
        self, context: str, continuation: Any, doc_to_visual: Any, doc_id: int, task: str, split: str
    ) -> tuple[float, bool]:
        doc = self.task_dict[task][split][doc_id]
        pictures = pictures_of(doc_to_visual(doc), task, self.orientation)
        conversation = conv_templates[self.template].copy()
        conversation.append_message(conversation.roles[0], mark_images(context, len(pictures), self.model.config))
        conversation.append_message(
            conversation.roles[1], continuation if isinstance(continuation, str) else continuation(doc)
        )
        asked = len(self._answerer().prompt_ids(context, len(pictures)))
        ids = tokenizer_image_token(conversation.get_prompt(), self.tokenizer, return_tensors="pt")
        ids = ids.unsqueeze(0).to(self.model.device)
        labels = ids.clone()
        labels[:, :asked] = IGNORE_INDEX
        pixels = pack(preprocess(pictures, self.image_processor, self.model.config))
        out = self.model(
            input_ids=ids,
            labels=labels,
            images=None if pixels is None else move_pixels(pixels, self.model),
            image_sizes=[picture.size for picture in pictures],
            use_cache=False,
        )
        # From the end: pictures and the reduction change the length of what lies in front.
        new = ids.shape[1] - asked
        greedy = out.logits[:, -new - 1 : -1].argmax(-1).eq(ids[:, -new:]).all()
        return float(out.loss), bool(greedy)

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not available.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{MODEL} answers single turns; a task with several rounds cannot be run")
