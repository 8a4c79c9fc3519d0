"""Records of LLaVA's format as samples and batches of a Hugging Face model.

A batch holds every kind of picture that the data has: where one is absent, a row with a small blank one is added whose
tokens carry no label. So every rank runs the same modules in every step, which ZeRO-3 and DDP need.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX
from llava.eval.tasks.base import BadEvalData
from llava.eval.video import VIDEO_SUFFIXES, read_frames, require_reader
from llava.train.dataset import LazySupervisedDataset
from llava.train.hf_chat import Chat, messages_of
from llava.train.images import check_shape, find_image, read_image
from llava.train.records import (
    BadSampleError,
    Record,
    check_record,
    control_tokens,
    images_of,
    refuse_control_tokens,
    videos_of,
)

logger = logging.getLogger(__name__)

BLANK_SIDE = 64  # pixels of a blank picture; models that resize make it as large as any other
_ROWS = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0, "mm_token_type_ids": 0}
"""Inputs with one entry per token, and what they are padded with."""

Sample = dict[str, torch.Tensor]


class HfDataset(LazySupervisedDataset):
    """Records as inputs of a Hugging Face model; bad ones are treated as in LLaVA's own training.

    Args:
        data_path: annotation files.
        chat: the model's chat template and processor.
        data_args: `HfDataArguments`.
        videos: whether the model can be trained on videos.
    """

    max_aspect_ratio = 200.0  # Qwen's processors refuse more, and others scale the longer side without a limit

    def __init__(self, data_path: Any, chat: Chat, data_args: Any, videos: bool) -> None:
        super().__init__(data_path, chat.tokenizer, data_args)
        self.chat = chat
        self.videos = videos
        self.control_tokens = control_tokens(chat.tokenizer, [chat.skeleton()], chat.visual_texts())

    @staticmethod
    def _has_image(record: Any) -> bool:
        return isinstance(record, dict) and bool(images_of(record) or videos_of(record))

    @property
    def kinds(self) -> list[str]:
        """Which of `image` and `video` the records have."""
        found = {"image": images_of, "video": videos_of}
        return [kind for kind, names in found.items() if any(names(record) for record in self.list_data_dict)]

    def encode(self, record: Record) -> dict[str, torch.Tensor]:
        """Tokenise and label a record without its pictures; whole turns at its end are left out when it is too long.

        Raises:
            BadSampleError: it cannot be labelled, or not even the first question and answer fit.
        """
        refuse_control_tokens(record["conversations"], self.control_tokens)
        labelled = self.chat.fit(messages_of(record, self.chat.end_mark))
        ids, answers = torch.tensor(labelled.ids), torch.tensor(labelled.answers)
        return {"input_ids": ids, "labels": ids.masked_fill(~answers, IGNORE_INDEX)}

    def check_fit(self, record: Record) -> None:
        """Refuse a record with control tokens or unreadable videos; whether it fits is seen when it is labelled."""
        refuse_control_tokens(record["conversations"], self.control_tokens)
        for name in videos_of(record) if self.data_args.scan_images != "none" else []:
            path = self._find_video(name)
            if self.data_args.scan_images == "decode":
                _read_video(path, self.data_args.num_frames)

    def build(self, record: Record) -> dict[str, Any]:
        """Turn a record into a sample: one row of inputs under `inputs`, and the record's name."""
        check_record(record, videos=self.videos)
        refuse_control_tokens(record["conversations"], self.control_tokens)
        labelled = self.chat.fit(messages_of(record, self.chat.end_mark))
        # Turns that were left out because of the length take their pictures with them.
        names = images_of(record)[: labelled.pictures["image"]]
        images = [self._read_image(name) for name in names]
        clips = videos_of(record)[: labelled.pictures["video"]]
        videos = [_read_video(self._find_video(name), self.data_args.num_frames) for name in clips]
        return {"inputs": self.chat.sample(labelled, images, videos)}

    def _read_image(self, name: str) -> Image.Image:
        path = find_image(self.data_args.image_folder, name)
        picture = read_image(path, self.data_args.image_orientation)
        check_shape(path, picture.size, self.max_aspect_ratio)
        return picture

    def _find_video(self, name: str) -> str:
        try:
            path = find_image(self.data_args.videos, name, VIDEO_SUFFIXES)
        except BadSampleError as error:
            raise BadSampleError(f"video {name!r}: {error.reason}", "missing video") from error
        if Path(path).suffix.lower() not in VIDEO_SUFFIXES:
            raise BadSampleError(
                f"video {name!r} has none of the suffixes {', '.join(VIDEO_SUFFIXES)}", "corrupt video"
            )
        return path


def _read_video(path: str, count: int) -> list[Image.Image]:
    """Read frames; a video with fewer than asked gives some of them more than once."""
    try:
        return read_frames(path, count)
    except BadEvalData as error:
        raise BadSampleError(str(error), "corrupt video") from error


def check_videos(dataset: HfDataset) -> None:
    """Check once that the videos of a data set can be read at all.

    Raises:
        ImportError: some are no GIFs, and PyAV is not installed.
    """
    if any(not name.lower().endswith(".gif") for record in dataset.list_data_dict for name in videos_of(record)):
        require_reader()


class HfCollator:
    """Samples to a batch.

    Args:
        chat: makes the blank rows.
        kinds: kinds of picture that every batch has to hold.
        num_frames: of a blank video.
    """

    def __init__(self, chat: Chat, kinds: Sequence[str], num_frames: int) -> None:
        self.pad = dict(_ROWS, input_ids=chat.tokenizer.pad_token_id or 0)
        self.blanks = {kind: blank_row(chat, kind, num_frames) for kind in kinds}

    def __call__(self, instances: Sequence[dict[str, Any]]) -> Sample:
        """Return the model's inputs; rows are padded on the right."""
        rows: list[Sample] = [instance["inputs"] for instance in instances]
        for blank in self.blanks.values():
            if not any(set(blank) <= set(row) for row in rows):
                rows.append(blank)
        return collate(rows, self.pad)


def blank_row(chat: Chat, kind: str, num_frames: int) -> Sample:
    """A row with one blank picture and no labels."""
    content = [{"type": kind}, {"type": "text", "text": "."}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "."}]}
    labelled = chat.label([{"role": "user", "content": content}, answer])
    picture = Image.new("RGB", (BLANK_SIDE, BLANK_SIDE))
    images, videos = ([picture], []) if kind == "image" else ([], [[picture] * num_frames])
    row = chat.sample(labelled, images, videos)
    return row | {"labels": torch.full_like(row["labels"], IGNORE_INDEX)}


def collate(rows: Sequence[Sample], pad: dict[str, int]) -> Sample:
    """Put rows together: tokens side by side with padding, pixels and sizes of all pictures one after the other."""
    batch: Sample = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name in pad:
            values = [row.get(name, torch.zeros_like(row["input_ids"]))[0] for row in rows]
            batch[name] = pad_sequence(values, batch_first=True, padding_value=pad[name])
        else:
            batch[name] = _stack_pictures([row[name] for row in rows if name in row])
    return batch


def _stack_pictures(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join along the first dimension; pictures with fewer tiles are filled up with zeros, as processors do."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        sides = zip(value.shape[:0:-1], shape[::-1], strict=True)
        room = [amount for have, want in sides for amount in (0, want - have)]
        padded.append(torch.nn.functional.pad(value, room))
    return torch.cat(padded)
