"""Order records so that a batch holds similar lengths and one modality.

``world_size`` is data-parallel ranks times gradient accumulation; a *megabatch* is ``world_size * batch_size`` records,
what one optimizer step sees. A *pool* is that many megabatches whose records are sorted together, so that a step's
records are of one length and little is padded; with a pool of 1 the order is LLaVA's. All shuffling uses one generator
that is the same on every rank: ranks that shuffle differently would train on some records twice and on others never.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def split_to_even_chunks(indices: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Split a megabatch into chunks of equal size and about equal total length.

    Args:
        indices: The megabatch, longest record first.
        lengths: Length of every record of the data set.
        num_chunks: Number of chunks. If it does not divide the megabatch, records are dealt out in turn.
    """
    if len(indices) % num_chunks:
        return [list(indices[start::num_chunks]) for start in range(num_chunks)]
    size = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals: list[float] = [0] * num_chunks
    for index in indices:
        lightest = totals.index(min(totals))
        chunks[lightest].append(index)
        totals[lightest] = totals[lightest] + lengths[index] if len(chunks[lightest]) < size else math.inf
    return chunks


def _megabatches(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def get_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    merge: bool = True,
    pool: int = 1,
) -> list[int]:
    """Shuffle the records, then order every megabatch so that its batches hold about the same total length.

    With a pool the megabatches are shuffled among each other; one that is not full stays the last.

    Args:
        lengths: Length of every record.
        batch_size: Records per device and step.
        world_size: Ranks times accumulation steps.
        generator: Source of randomness; None means torch's global one, which must then agree on all ranks.
        merge: Accepted for LLaVA's signature, without effect.
        pool: Megabatches whose records are sorted together.
    """
    size = world_size * batch_size
    order = torch.randperm(len(lengths), generator=generator).tolist()
    megabatches: list[list[int]] = []
    for members in _megabatches(order, pool * size):
        members.sort(key=lambda index: lengths[index], reverse=True)
        megabatches += _megabatches(members, size)
    if pool > 1:
        full = len(lengths) // size
        places = torch.randperm(full, generator=generator).tolist()
        megabatches = [megabatches[place] for place in places] + megabatches[full:]
    chunks = [chunk for megabatch in megabatches for chunk in split_to_even_chunks(megabatch, lengths, world_size)]
    return [index for chunk in chunks for index in chunk]


def get_modality_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    pool: int = 1,
) -> list[int]:
    """Like ``get_length_grouped_indices``, with one modality per megabatch.

    The records that do not fill a megabatch of their modality come last, mixed.

    Args:
        lengths: Positive for records with images, negative for text-only ones.
        batch_size: Records per device and step.
        world_size: Ranks times accumulation steps.
        generator, pool: See ``get_length_grouped_indices``.

    Raises:
        ValueError: If a length is 0.
    """
    if any(length == 0 for length in lengths):
        raise ValueError("a record has length 0, so its modality is unknown; use a positive or a negative length")
    sizes = [abs(length) for length in lengths]
    modalities = [
        [index for index, length in enumerate(lengths) if length > 0],
        [index for index, length in enumerate(lengths) if length < 0],
    ]
    if not all(modalities):
        return get_length_grouped_indices(sizes, batch_size, world_size, generator, pool=pool)
    full: list[list[int]] = []
    rest: list[int] = []
    for members in modalities:
        own = [sizes[index] for index in members]
        order = get_length_grouped_indices(own, batch_size, world_size, generator, pool=pool)
        for megabatch in _megabatches([members[position] for position in order], world_size * batch_size):
            if len(megabatch) == world_size * batch_size:
                full.append(megabatch)
            else:
                rest += megabatch
    shuffled = [full[position] for position in torch.randperm(len(full), generator=generator).tolist()]
    last = get_length_grouped_indices([sizes[index] for index in rest], batch_size, world_size, generator)
    return [index for megabatch in shuffled for index in megabatch] + [rest[position] for position in last]


class LengthGroupedSampler(Sampler[int]):
    """Sampler over the grouped order; a new order every epoch, the same one on every rank and after a resume."""

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        group_by_modality: bool = False,
        seed: int = 0,
        pool: int = 1,
    ):
        """Prepare the sampler.

        Args:
            batch_size: Records per device and step.
            world_size: Ranks times accumulation steps.
            lengths: Length of every record; with sign when ``group_by_modality``.
            generator: Source of randomness; None (recommended) makes one from ``seed`` and the epoch.
            group_by_modality: Keep records with and without images apart.
            seed: Same on all ranks.
            pool: Megabatches whose records are sorted together.
        """
        if lengths is None:
            raise ValueError("lengths must be given: the dataset's `lengths` or `modality_lengths`")
        self.batch_size = batch_size
        self.world_size = world_size
        self.lengths = lengths
        self.group_by_modality = group_by_modality
        self.seed = seed
        self.pool = pool
        self.epoch = 0
        # Not called `generator`: accelerate re-seeds an attribute of that name at random.
        self._own_generator = generator

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = self._own_generator
        if generator is None:
            generator = torch.Generator()
            generator.manual_seed(self.seed + self.epoch)
        group = get_modality_length_grouped_indices if self.group_by_modality else get_length_grouped_indices
        return iter(group(self.lengths, self.batch_size, self.world_size, generator=generator, pool=self.pool))
