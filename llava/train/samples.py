"""Samples that carry their names, so that an error in the middle of a run can say which records it came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from llava.train.llava_trainer import SAMPLE_IDS
from llava.train.records import record_id

_NAME = "sample_name"


class NamedSamples(Dataset):
    """A dataset whose samples also say which record they are."""

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], _NAME: f"{record_id(self.dataset.list_data_dict[index])} (record {index})"}

    @property
    def lengths(self) -> list[int]:
        """See the wrapped dataset."""
        return self.dataset.lengths

    @property
    def modality_lengths(self) -> list[int]:
        """See the wrapped dataset."""
        return self.dataset.modality_lengths


class NamedCollator:
    """Collates samples and keeps their names beside the tensors."""

    def __init__(self, collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the collator's batch with the names added."""
        names = [instance[_NAME] for instance in instances if _NAME in instance]
        plain = [{key: value for key, value in instance.items() if key != _NAME} for instance in instances]
        return {**self.collator(plain), SAMPLE_IDS: names}
