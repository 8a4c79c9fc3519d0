"""The grouped order: a permutation, the same on all ranks, one modality per megabatch, even chunks."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from llava.train.sampler import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=120)
SIGNED = st.lists(st.integers(-500, 500).filter(bool), min_size=1, max_size=120)
SHAPE = st.tuples(st.integers(1, 4), st.integers(1, 4))


def seeded(seed=0):
    generator = torch.Generator()
    generator.manual_seed(seed)
    return generator


@given(lengths=LENGTHS, chunks=st.integers(1, 8))
def test_chunks_are_even(lengths, chunks):
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    parts = split_to_even_chunks(order, lengths, chunks)
    assert sorted(index for part in parts for index in part) == sorted(order)
    sizes = [len(part) for part in parts]
    assert len(parts) == chunks and max(sizes) - min(sizes) <= 1


def test_chunks_are_filled_by_the_least_total():
    assert split_to_even_chunks([0, 1, 2, 3], [9, 5, 4, 1], 2) == [[0, 3], [1, 2]]
    assert split_to_even_chunks([0, 1, 2], [9, 5, 4], 2) == [[0, 2], [1]]


@given(lengths=LENGTHS, shape=SHAPE, seed=st.integers(0, 99))
def test_length_grouping_is_a_permutation(lengths, shape, seed):
    order = get_length_grouped_indices(lengths, *shape, generator=seeded(seed))
    assert sorted(order) == list(range(len(lengths)))
    assert order == get_length_grouped_indices(lengths, *shape, generator=seeded(seed))


@given(lengths=SIGNED, shape=SHAPE, seed=st.integers(0, 99))
@settings(max_examples=200)
def test_modality_grouping(lengths, shape, seed):
    """A permutation in which every full megabatch but the last, mixed ones has one modality."""
    torch.manual_seed(1)
    order = get_modality_length_grouped_indices(lengths, *shape, generator=seeded(seed))
    torch.manual_seed(2)
    assert order == get_modality_length_grouped_indices(lengths, *shape, generator=seeded(seed)), "uses the global RNG"
    assert sorted(order) == list(range(len(lengths)))
    size = shape[0] * shape[1]
    with_image = sum(length > 0 for length in lengths)
    whole = with_image // size + (len(lengths) - with_image) // size
    for start in range(0, whole * size, size):
        assert len({lengths[index] > 0 for index in order[start : start + size]}) == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_one_modality_is_grouped_by_its_size(sign):
    """LLaVA sorts text-only data the wrong way round, because its lengths are negative there."""
    lengths = list(range(1, 41))
    plain = get_length_grouped_indices(lengths, 5, 2, generator=seeded())
    assert get_modality_length_grouped_indices([sign * length for length in lengths], 5, 2, seeded()) == plain


def test_a_megabatch_starts_with_its_longest_record():
    lengths = [(index * 37) % 101 + 1 for index in range(64)]
    order = get_length_grouped_indices(lengths, 4, 4, generator=seeded())
    for start in range(0, 64, 16):
        megabatch = order[start : start + 16]
        assert lengths[megabatch[0]] == max(lengths[index] for index in megabatch)
        totals = [sum(lengths[index] for index in megabatch[part : part + 4]) for part in range(0, 16, 4)]
        assert max(totals) - min(totals) <= max(lengths)


@given(lengths=SIGNED, shape=SHAPE, pool=st.integers(2, 5), seed=st.integers(0, 99))
def test_a_pool_is_a_permutation_with_one_modality_a_megabatch(lengths, shape, pool, seed):
    order = get_modality_length_grouped_indices(lengths, *shape, generator=seeded(seed), pool=pool)
    assert sorted(order) == list(range(len(lengths)))
    size = shape[0] * shape[1]
    with_image = sum(length > 0 for length in lengths)
    for start in range(0, (with_image // size + (len(lengths) - with_image) // size) * size, size):
        assert len({lengths[index] > 0 for index in order[start : start + size]}) == 1


def test_a_pool_pads_less_and_comes_in_random_order():
    lengths = [(index * 37) % 101 + 1 for index in range(256)]

    def longest(pool: int) -> list[int]:
        order = get_length_grouped_indices(lengths, 8, 2, generator=seeded(), pool=pool)
        return [max(lengths[index] for index in order[start : start + 8]) for start in range(0, 256, 8)]

    rows = {pool: longest(pool) for pool in (1, 16)}
    padded = {pool: 8 * sum(rows[pool]) / sum(lengths) for pool in rows}
    assert padded[1] > 1.5 and padded[16] < 1.1
    assert rows[16] != sorted(rows[16], reverse=True)


def test_zero_length_is_refused():
    with pytest.raises(ValueError, match="length 0"):
        get_modality_length_grouped_indices([3, 0, -2], 1, 1)


def test_epochs_differ_and_repeat():
    sampler = LengthGroupedSampler(2, 2, lengths=list(range(1, 31)), seed=5)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert first != second and list(sampler) == first
    assert len(sampler) == 30 and Counter(second) == Counter(range(30))
    resumed = LengthGroupedSampler(2, 2, lengths=list(range(1, 31)), seed=5)
    resumed.set_epoch(1)
    assert list(resumed) == second


def test_other_draws_do_not_change_the_order():
    lengths = [3, -4, 5, -6, 7, 8, -9, 10]
    sampler = LengthGroupedSampler(1, 2, lengths=lengths, group_by_modality=True)
    torch.manual_seed(0)
    first = list(sampler)
    torch.rand(7)
    assert list(sampler) == first


def test_explicit_generator_is_used():
    sampler = LengthGroupedSampler(2, 1, lengths=list(range(1, 21)), generator=seeded(3))
    assert list(sampler) == get_length_grouped_indices(list(range(1, 21)), 2, 1, generator=seeded(3))


def test_lengths_are_needed():
    with pytest.raises(ValueError, match="modality_lengths"):
        LengthGroupedSampler(1, 1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_step_sees_one_modality_over_all_ranks(accumulation):
    """Through accelerate's own sharding: rank r takes batch r of each group."""
    ranks, batch = 2, 3
    lengths = [(index % 17) + 1 if index % 3 else -(index % 11) - 1 for index in range(180)]
    shards = []
    for rank in range(ranks):
        sampler = LengthGroupedSampler(batch, ranks * accumulation, lengths=lengths, group_by_modality=True, seed=1)
        batches = BatchSampler(sampler, batch, drop_last=False)
        shards.append(list(BatchSamplerShard(batches, num_processes=ranks, process_index=rank)))
    seen = [index for shard in shards for rows in shard for index in rows]
    assert Counter(seen) == Counter(range(180))
    mixed = 0
    for start in range(0, len(shards[0]), accumulation):
        rows = [row for shard in shards for row in shard[start : start + accumulation]]
        mixed += len({lengths[index] > 0 for row in rows for index in row}) > 1
    assert mixed <= 2


def test_set_epoch_arrives_through_the_trainers_loader():
    from accelerate.data_loader import prepare_data_loader

    sampler = LengthGroupedSampler(2, 1, lengths=list(range(1, 21)), seed=4)
    loader = prepare_data_loader(DataLoader(list(range(20)), batch_size=2, sampler=sampler), num_processes=1)
    loader.set_epoch(3)
    assert sampler.epoch == 3
