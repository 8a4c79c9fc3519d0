"""Samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass
class DataCollatorForSupervisedDataset:
    """Pads samples on the right and lines up their images.

    ``images`` holds one entry for every ``<image>`` of the batch, in order, and exactly one (a zero image) for a
    sample without any. The attention mask comes from the samples' lengths, so a real token that happens to be the
    padding token stays visible.
    """

    tokenizer: Any

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate B samples.

        Returns:
            ``input_ids``, ``labels``, ``attention_mask`` [B, L]; in multimodal runs ``images`` ([M, 3, H, W], or
            [M, T, 3, H, W] for anyres, or a list when shapes differ) and ``image_sizes`` (M pairs (width, height)).

        Raises:
            ValueError: If a sample's context ends before an image, or its images and image slots do not match.
        """
        limit = int(min(self.tokenizer.model_max_length, 10**9))
        ids = [self._cut(instance["input_ids"], limit) for instance in instances]
        labels = [instance["labels"][:limit] for instance in instances]
        lengths = torch.tensor([len(row) for row in ids])
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": torch.arange(input_ids.shape[1])[None, :] < lengths[:, None],
        }
        if any("image" in instance for instance in instances):
            images, sizes = self._images(ids, instances)
            same_shape = len({image.shape for image in images}) == 1
            batch["images"] = torch.stack(images) if same_shape else images
            if sizes:
                batch["image_sizes"] = sizes
        return batch

    @staticmethod
    def _cut(ids: torch.Tensor, limit: int) -> torch.Tensor:
        if (ids[limit:] == IMAGE_TOKEN_INDEX).any():
            raise ValueError(
                f"a sample has an image after token {limit}, where the context ends; leave out its last turns "
                "or raise --model_max_length"
            )
        return ids[:limit]

    @staticmethod
    def _images(
        ids: Sequence[torch.Tensor], instances: Sequence[dict[str, Any]]
    ) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        images: list[torch.Tensor] = []
        sizes: list[tuple[int, int]] = []
        for position, (row, instance) in enumerate(zip(ids, instances, strict=True)):
            given = instance.get("image")
            own: list[torch.Tensor] = [] if given is None else given if isinstance(given, list) else [given]
            slots = int((row == IMAGE_TOKEN_INDEX).sum())
            if len(own) != max(1, slots):
                raise ValueError(
                    f"sample {position} of the batch has {len(own)} images for {slots} image slots; "
                    "a sample needs one image for each slot, and one zero image when it has no slot"
                )
            images += own
            size = instance.get("image_size")
            if size is not None:
                sizes += size if isinstance(size, list) else [size]
        return images, sizes
