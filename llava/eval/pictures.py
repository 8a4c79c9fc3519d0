"""Open and preprocess the pictures of one batch after the other, in worker processes and in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llava.context import PromptTooLong
from llava.eval.generate import Answerer, pack, preprocess
from llava.eval.tasks.base import Task

Opener = Callable[[Path], list[Image.Image]]


@dataclass
class LoadedBatch:
    """The pictures of one batch.

    Attributes:
        index: which batch it is.
        kept: places in the batch of the samples whose pictures are here.
        counts: pictures of each kept sample.
        passes: tower passes of each kept sample (tiles counted).
        order: for every picture of the kept samples its place in `pixels`.
        pixels: the distinct pictures, see `llava.eval.generate.pack`.
        sizes: (width, height) of every picture of the kept samples.
        failures: (place in the batch, reason) of samples whose pictures cannot be used or questions are too long.
    """

    index: int
    kept: list[int]
    counts: list[int]
    passes: list[int]
    order: list[int]
    pixels: Tensor | list[Tensor] | None
    sizes: list[tuple[int, int]]
    failures: list[tuple[int, str]]

    def images(self) -> Tensor | list[Tensor] | None:
        """Every picture of the kept samples; one that several of them share is one object, to be encoded once."""
        if self.pixels is None or len(self.order) == len(self.pixels):
            return self.pixels
        distinct = list(self.pixels)
        return [distinct[index] for index in self.order]

    def refuse(self, reasons: Mapping[int, str]) -> None:
        """Take samples out.

        Args:
            reasons: by their place in `kept`.
        """
        self.failures += [(self.kept[place], reason) for place, reason in reasons.items()]
        ends = list(accumulate(self.counts))
        stay = [place for place in range(len(self.kept)) if place not in reasons]
        pictures = [number for place in stay for number in range(ends[place] - self.counts[place], ends[place])]
        self.kept, self.counts, self.passes = (
            [values[place] for place in stay] for values in (self.kept, self.counts, self.passes)
        )
        self.order = [self.order[number] for number in pictures]
        self.sizes = [self.sizes[number] for number in pictures]
        self.keep_used(list(self.pixels) if self.pixels is not None else [])

    def keep_used(self, pixels: Sequence[Tensor]) -> None:
        """Keep those of the pictures that `order` names, and number them anew."""
        used = {old: new for new, old in enumerate(dict.fromkeys(self.order))}
        self.pixels = pack([pixels[old] for old in used])
        self.order = [used[old] for old in self.order]


class PictureBatches(Dataset):
    """Batches of pictures by number.

    Args:
        batches: for every batch the files of each sample.
        open_file: gives the pictures in a file (a video has several).
        image_processor: the model's image processor.
        config: the model's config.
    """

    def __init__(
        self, batches: Sequence[Sequence[Sequence[Path]]], open_file: Opener, image_processor: Any, config: Any
    ):
        self._batches, self._open = batches, open_file
        self._image_processor, self._config = image_processor, config

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> LoadedBatch:
        """Load one batch; every file is read once."""
        places: dict[Path, list[int]] = {}
        pixels: list[Tensor] = []
        sizes: list[tuple[int, int]] = []
        loaded = LoadedBatch(index, [], [], [], [], None, [], [])
        for place, files in enumerate(self._batches[index]):
            try:
                for file in files:
                    if file not in places:
                        pictures = self._open(file)
                        new = preprocess(pictures, self._image_processor, self._config)
                        places[file] = list(range(len(pixels), len(pixels) + len(new)))
                        pixels += new
                        sizes += [picture.size for picture in pictures]
            except (ValueError, OSError) as error:
                loaded.failures.append((place, str(error)))
                continue
            own = [number for file in files for number in places[file]]
            loaded.kept.append(place)
            loaded.counts.append(len(own))
            loaded.passes.append(sum(pixels[n].shape[0] if pixels[n].dim() == 4 else 1 for n in own))
            loaded.order += own
        loaded.sizes = [sizes[old] for old in loaded.order]
        loaded.keep_used(pixels)
        return loaded


def load_batches(batches: PictureBatches, workers: int) -> DataLoader:
    """Iterate over the batches in order; `workers` processes prepare the next ones meanwhile (0: none)."""
    workers = min(workers, len(batches))
    return DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None)


def refuse_long(
    loaded: LoadedBatch, ids: Sequence[Sequence[int]], answerer: Answerer, max_new_tokens: int
) -> list[Sequence[int]]:
    """Take the samples out of a batch whose questions do not fit the context; returns the prompts of the others.

    Args:
        loaded: the batch; changed in place.
        ids: the prompt of each of its kept samples.
        answerer: knows the context.
        max_new_tokens: length limit of an answer.
    """
    places, reasons = iter(loaded.sizes), {}
    for place, (prompt, count) in enumerate(zip(ids, loaded.counts, strict=True)):
        try:
            answerer.check(prompt, list(islice(places, count)), max_new_tokens)
        except PromptTooLong as error:
            reasons[place] = str(error)
    if reasons:
        loaded.refuse(reasons)
    return [prompt for place, prompt in enumerate(ids) if place not in reasons]


def open_with(task: Task, path: Path) -> list[Image.Image]:
    """Open a file as a benchmark's protocol says: one picture, or the frames of a video."""
    frames = getattr(task, "open_frames", None)
    return [task.open_visual(path)] if not task.video or frames is None else frames(path)
