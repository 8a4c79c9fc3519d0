"""Annotation records to training samples, one at a time when they are asked for."""

from __future__ import annotations

import bisect
import logging
import os
import re
import tempfile
import uuid
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from llava import conversation as conversation_lib
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, SeparatorStyle
from llava.mm_utils import process_images
from llava.train.collator import DataCollatorForSupervisedDataset
from llava.train.images import find_image, image_size, read_image
from llava.train.labels import check_caption, preprocess, preprocess_multimodal
from llava.train.preflight import Report, scan
from llava.train.records import (
    BadRecord,
    BadSampleError,
    BadSampleLog,
    Origin,
    Record,
    as_bad_sample,
    check_record,
    control_tokens,
    images_of,
    load_records,
    refuse_control_tokens,
    split_system,
)
from llava.utils import process_rank

logger = logging.getLogger(__name__)

_IMAGE_WORDS = 128  # what LLaVA counts for an image when it estimates a record's length
_NO_LIMIT = 10**9  # tokenizers without a limit report an absurdly large one
_MAX_REPLACEMENTS = 100


class LazySupervisedDataset(Dataset):
    """Records of LLaVA's JSON format as tokenised, labelled samples with their pictures.

    Fields of ``data_args``: ``image_folder``, ``image_aspect_ratio``, ``image_grid_pinpoints``, ``is_multimodal``,
    ``image_processor``, ``mm_use_im_start_end``, and optionally ``on_bad_sample`` ("error" or "skip": a bad record
    that is met during training is replaced by the next good one of its modality), ``bad_sample_file`` (where such
    records are listed), ``visual_tokens_per_image`` (counted into a sample's length; 1 when absent) and, where that
    depends on a picture's size, ``count_visual_tokens`` ((width, height) to visual tokens, none of them more).

    Attributes:
        list_data_dict: The records.
        videos: Whether records may have videos.
        max_aspect_ratio: Longer to shorter side of a picture from which on it is refused; None for no limit.
    """

    videos = False
    max_aspect_ratio: float | None = None

    def __init__(self, data_path: Any, tokenizer: Any, data_args: Any):
        super().__init__()
        self.tokenizer = tokenizer
        self.data_args = data_args
        self.list_data_dict, self.origins = load_records(data_path)
        if not self.list_data_dict:
            raise ValueError(f"{data_path}: no records; check --data_path")
        # Settled here because worker processes do not see a default that was set after they imported the module, and
        # must share one list.
        self.conversation, self.bad_samples = self.conversation, self.bad_samples
        self.control_tokens = self.control_tokens
        if not self.multimodal and any(self._has_image(record) for record in self.list_data_dict):
            logger.warning("records have images but the run has no vision tower: %s stays text", DEFAULT_IMAGE_TOKEN)

    # Projects that bring records of their own set `tokenizer`, `data_args` and `list_data_dict` by hand and skip the
    # constructor: the rest follows from these.

    @cached_property
    def conversation(self) -> Conversation:
        """The template of prompts."""
        return conversation_lib.default_conversation.copy()

    @cached_property
    def control_tokens(self) -> re.Pattern[str] | None:
        """Finds texts that no turn may hold; see ``llava.train.records.control_tokens``."""
        return control_tokens(self.tokenizer, _written(self.conversation))

    @cached_property
    def origins(self) -> list[Origin]:
        """For every record the file and index that it was read from."""
        return [Origin("records", index) for index in range(len(self.list_data_dict))]

    @cached_property
    def multimodal(self) -> bool:
        """Whether the run has a vision tower."""
        return bool(getattr(self.data_args, "is_multimodal", False))

    @cached_property
    def skip_bad(self) -> bool:
        """Whether a bad record is replaced, not an error."""
        return getattr(self.data_args, "on_bad_sample", "error") == "skip"

    @cached_property
    def bad_samples(self) -> BadSampleLog:
        """List of the records that turned out bad, shared with data-loader workers."""
        default = os.path.join(tempfile.gettempdir(), f"llava_bad_samples_{uuid.uuid4().hex}.jsonl")
        return BadSampleLog(getattr(self.data_args, "bad_sample_file", None) or default)

    def __len__(self) -> int:
        return len(self.list_data_dict)

    @staticmethod
    def _has_image(record: Any) -> bool:
        return isinstance(record, dict) and bool(images_of(record))

    @staticmethod
    def _words(record: Any) -> int:
        """Words in all turns; 0 for records that the pre-flight scan has yet to refuse."""
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list):
            return 0
        return sum(len(str(turn.get("value", "")).split()) for turn in turns if isinstance(turn, dict))

    @property
    def lengths(self) -> list[int]:
        """Estimated length of every record, in words."""
        return [self._words(record) + _IMAGE_WORDS * self._has_image(record) for record in self.list_data_dict]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of every record: positive with images, negative without, never 0."""
        return [max(1, self._words(record)) * (1 if self._has_image(record) else -1) for record in self.list_data_dict]

    def preflight(self, images: bool = True, decode: bool = False, workers: int = 8) -> Report:
        """Look at every record before training starts; see ``llava.train.preflight.scan``."""
        return scan(
            self.list_data_dict,
            getattr(self.data_args, "image_folder", None) if self.multimodal else None,
            origins=self.origins,
            multimodal=self.multimodal,
            images=images,
            decode=decode,
            workers=workers,
            extra_check=self.check_fit,
            videos=self.videos,
            max_aspect_ratio=self.max_aspect_ratio,
        )

    def drop(self, report: Report) -> None:
        """Leave out the records that a scan found bad, and list them with the other bad ones."""
        bad = set(report.positions)
        keep = [index for index in range(len(self)) if index not in bad]
        if not keep:
            raise ValueError(f"all {len(self)} records are bad; {report.summary()}")
        self.list_data_dict = [self.list_data_dict[index] for index in keep]
        self.origins = [self.origins[index] for index in keep]
        if process_rank() == 0:
            for record in report.bad:
                self.bad_samples.add(record)

    def bad_sample_report(self) -> list[BadRecord]:
        """Every bad record that was left out or replaced so far, by any worker."""
        return self.bad_samples.read()

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return one sample.

        Returns:
            ``input_ids`` and ``labels`` [L]; in multimodal runs also ``image`` ([3, H, W], or a list of them for
            several images; anyres [T, 3, H, W]; zeros for a text-only record) and ``image_size`` ((width, height) or
            a list of them).

        Raises:
            BadSampleError: If the record is bad and the policy is "error"; the message names file, index and id.
        """
        try:
            return self.build(self.list_data_dict[i])
        except Exception as error:
            reason = as_bad_sample(error)
            bad = reason.at(self.origins[i], self.list_data_dict[i])
            if not self.skip_bad:
                raise BadSampleError(
                    f"{bad}. Use --on_bad_sample skip to leave such records out", reason.kind
                ) from error
            self.bad_samples.add(bad)
            logger.warning("replaced a bad sample: %s", bad)
        return self._next_good(i)

    def _next_good(self, i: int) -> dict[str, Any]:
        """The next record of the same modality that works; the same one in every run."""
        wanted = self._has_image(self.list_data_dict[i])
        tries = 0
        for step in range(1, len(self)):
            index = (i + step) % len(self)
            if self._has_image(self.list_data_dict[index]) != wanted:
                continue
            try:
                return self.build(self.list_data_dict[index])
            except Exception as error:
                self.bad_samples.add(as_bad_sample(error).at(self.origins[index], self.list_data_dict[index]))
            tries += 1
            if tries >= _MAX_REPLACEMENTS:
                break
        raise BadSampleError(
            f"no good record in place of {self.origins[i]}: {tries} others are bad too; see {self.bad_samples.path}",
            "too many bad records",
        )

    def build(self, record: Record) -> dict[str, Any]:
        """Turn a record into a sample; see ``__getitem__``."""
        check_record(record, self.multimodal)
        names = images_of(record) if self.multimodal else []
        sample: dict[str, Any] = self.encode(record)
        if names:
            # Turns that were left out because of the length take their images with them.
            kept = names[: int((sample["input_ids"] == IMAGE_TOKEN_INDEX).sum())]
            folder = getattr(self.data_args, "image_folder", None)
            pictures = [read_image(find_image(folder, name), self._orientation()) for name in kept]
            pixels = [self._pixels(picture) for picture in pictures]
            sizes = [picture.size for picture in pictures]
            sample["image"], sample["image_size"] = (pixels[0], sizes[0]) if len(names) == 1 else (pixels, sizes)
        elif self.multimodal:
            sample["image"], sample["image_size"] = self._dummy_image()
        return sample

    def encode(self, record: Record) -> dict[str, torch.Tensor]:
        """Tokenise and label a record; whole turns at its end are left out when it is too long.

        Returns:
            ``input_ids`` and ``labels``, both [L].

        Raises:
            BadSampleError: If not even the first question and answer fit.
        """
        turns = record["conversations"]
        refuse_control_tokens(turns, self.control_tokens)
        names = images_of(record) if self.multimodal else []
        turns = preprocess_multimodal([turns], self.data_args, max(1, len(names)), self.conversation)[0]
        encoded = self._encode_turns(turns, bool(names))
        limit = self._limit()
        if self._expanded_length(encoded["input_ids"], [self._most_visual_tokens()] * len(names)) <= limit:
            return encoded
        visual = self._visual_tokens(names)
        if self._expanded_length(encoded["input_ids"], visual) <= limit:
            return encoded
        system, said = split_system(turns)
        head = turns[:1] if system is not None else []

        def shortened(rounds: int) -> dict[str, torch.Tensor]:
            return self._encode_turns(head + said[: 2 * rounds], bool(names))

        rounds = range(1, (len(said) + 1) // 2)
        fitting = bisect.bisect_right(
            rounds, limit, key=lambda count: self._expanded_length(shortened(count)["input_ids"], visual)
        )
        if fitting == 0:
            first = self._expanded_length(shortened(1)["input_ids"], visual)
            raise BadSampleError(
                f"the first question and answer take {first} tokens with their images, the context holds {limit}; "
                "shorten the record or raise --model_max_length",
                "too long",
            )
        return shortened(rounds[fitting - 1])

    def _encode_turns(self, turns: list[dict[str, str]], has_image: bool) -> dict[str, torch.Tensor]:
        batch = preprocess([turns], self.tokenizer, has_image=has_image, conversation=self.conversation)
        return {key: batch[key][0] for key in ("input_ids", "labels")}

    def _limit(self) -> int:
        limit = self.tokenizer.model_max_length
        return int(limit) if limit < _NO_LIMIT else _NO_LIMIT

    def _most_visual_tokens(self) -> int:
        """The most that a picture may have."""
        return getattr(self.data_args, "visual_tokens_per_image", None) or 1

    def _visual_tokens(self, names: list[str]) -> list[int]:
        """Visual tokens of every picture; its header is read where they depend on its size."""
        count = getattr(self.data_args, "count_visual_tokens", None)
        if count is None:
            return [self._most_visual_tokens()] * len(names)
        folder = getattr(self.data_args, "image_folder", None)
        return [count(image_size(find_image(folder, name), self._orientation())) for name in names]

    def _orientation(self) -> str:
        return getattr(self.data_args, "image_orientation", "exif")

    @staticmethod
    def _expanded_length(input_ids: torch.Tensor, visual: list[int]) -> int:
        """Length after every image slot became as many tokens as its picture has."""
        slots = int((input_ids == IMAGE_TOKEN_INDEX).sum())
        return len(input_ids) - slots + sum(visual[:slots])

    def check_fit(self, record: Record) -> None:
        """Refuse a good record that does not suit the template or tokenizer, or whose first turns exceed the context.

        Records that are short for sure are not tokenised.
        """
        if self.conversation.sep_style is SeparatorStyle.PLAIN:
            check_caption(record["conversations"])
        refuse_control_tokens(record["conversations"], self.control_tokens)
        text = sum(len(turn["value"].encode("utf-8")) for turn in record["conversations"][:3])
        # A token stands for at least one byte; 64 pays for roles, separators and word-start marks.
        bound = text + len(self.conversation.system.encode("utf-8")) + 64
        bound += self._most_visual_tokens() * len(images_of(record))
        if bound > self._limit():
            self.encode(record)

    def _pixels(self, picture: Image.Image) -> torch.Tensor:
        """[3, H, W], or [T, 3, H, W] for anyres."""
        return process_images([picture], self.data_args.image_processor, self.data_args)[0]

    def _dummy_image(self) -> tuple[torch.Tensor, tuple[int, int]]:
        """A zero image: it keeps tower and projector at work on every rank when a batch has text only."""
        processor = self.data_args.image_processor
        crop = getattr(processor, "crop_size", None) or processor.size
        height, width = int(crop["height"]), int(crop["width"])
        shape = (3, height, width)
        if getattr(self.data_args, "image_aspect_ratio", None) == "anyres":
            shape = (1, *shape)
        return torch.zeros(shape), (width, height)


def _written(template: Conversation) -> list[str]:
    """What a template writes around turns, and the words that training adds to a picture's mark."""
    texts = [*template.roles, template.system, template.sep, template.sep2 or ""]
    return [*texts, DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN]


def make_supervised_data_module(tokenizer: Any, data_args: Any) -> dict[str, Any]:
    """Build what the trainer needs: ``train_dataset``, ``eval_dataset`` (None without ``eval_data_path``), collator."""
    eval_path = getattr(data_args, "eval_data_path", None)
    return {
        "train_dataset": LazySupervisedDataset(data_args.data_path, tokenizer, data_args),
        "eval_dataset": LazySupervisedDataset(eval_path, tokenizer, data_args) if eval_path else None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer=tokenizer),
    }
