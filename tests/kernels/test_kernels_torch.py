"""The PyTorch twins equal whole attention maps, and what decides between them and Triton says why."""

import logging
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duet import kernels
from duet.kernels import launch, reference
from duet.signals import rotate

quick = settings(max_examples=40, deadline=None)


def make(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator), generator


def whole_map(query, key, scale, allowed):
    """Attention [B, H, R, N] the plain way; key heads repeated."""
    key = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.float() @ key.transpose(-1, -2) * scale
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


@quick
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 30), st.booleans(), st.sampled_from([1 << 23, 7]))
def test_column_mass(seed, batch, tokens, class_token, block):
    randn, _ = make(seed)
    query, key = randn(batch, 2, tokens, 6), randn(batch, 2, tokens + class_token, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK_ELEMENTS", block)
        got = kernels.column_mass(query, key, 0.4)
    wanted = whole_map(query, key, 0.4, torch.ones(()).bool()).mean((1, 2))
    assert torch.allclose(got, wanted, atol=1e-6)


@quick
@given(st.integers(0, 99), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([1 << 23, 7]))
def test_column_mass_of_segments_equals_each_segment_alone(seed, sizes, block):
    randn, _ = make(seed)
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    query, key = randn(2, 3, sum(sizes), 6), randn(2, 3, sum(sizes), 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK_ELEMENTS", block)
        got = kernels.column_mass(query, key, 0.4, bounds)
    parts = zip(query.split(sizes, 2), key.split(sizes, 2), strict=True)
    wanted = torch.cat([kernels.column_mass(q, k, 0.4) for q, k in parts], dim=1)
    assert torch.allclose(got, wanted, atol=1e-6)


@quick
@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 20), st.booleans(), st.sampled_from([1 << 23, 7]))
def test_column_mass_without_padding_equals_the_shorter_sequence(seed, tokens, padding, left, block):
    randn, _ = make(seed)
    query, key = randn(1, 2, tokens + padding, 6), randn(1, 2, tokens + padding, 6)
    valid = torch.arange(tokens + padding)[None] < tokens
    valid = valid.flip(1) if left else valid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK_ELEMENTS", block)
        got = kernels.column_mass(query, key, 0.4, valid_BM=valid)
    wanted = kernels.column_mass(query[:, :, valid[0]], key[:, :, valid[0]], 0.4)
    assert torch.allclose(got[valid], wanted[0], atol=1e-6)
    assert not got[~valid].any()


def test_segments_and_padding_together():
    randn, _ = make(5)
    query, key = randn(2, 2, 9, 6), randn(2, 2, 9, 6)
    valid = torch.tensor([[1, 1, 1, 0, 1, 1, 0, 0, 1], [1, 0, 1, 1, 1, 1, 1, 1, 1]]).bool()
    got = kernels.column_mass(query, key, 0.4, torch.tensor([0, 4, 9]), valid)
    for part in (slice(0, 4), slice(4, 9)):
        wanted = kernels.column_mass(query[:, :, part], key[:, :, part], 0.4, valid_BM=valid[:, part])
        assert torch.allclose(got[:, part], wanted, atol=1e-6)


@quick
@given(
    st.integers(0, 99), st.sampled_from([1, 3]), st.integers(1, 20), st.integers(1, 6), st.sampled_from([0, 4, 6]),
    st.sampled_from([1 << 23, 7]),
)  # fmt: skip
def test_received(seed, group, length, rows, turned, block):
    randn, generator = make(seed)
    query, key = randn(2, 2 * group, rows, 6), randn(2, 2, length, 6)
    angle = randn(1, length, turned // 2).repeat(1, 1, 2)
    rotary = (angle.cos(), angle.sin()) if turned else None
    stop = torch.randint(1, length + 1, (2, rows), generator=generator)
    counted = torch.rand(2, rows, generator=generator) < 0.7
    valid = torch.rand(2, length, generator=generator) < 0.7
    valid[:, 0] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK_ELEMENTS", block)
        got = kernels.received(query, key, stop, counted, 0.4, valid, rotary)
    allowed = (torch.arange(length) < stop[..., None]) & valid[:, None]
    turned_key = rotate(key, *rotary) if rotary else key
    dense = whole_map(query, turned_key, 0.4, allowed[:, None]).mean(1)
    for b in range(2):
        wanted = dense[b][counted[b]].mean(0) if counted[b].any() else torch.zeros(length)
        assert torch.allclose(got[b], wanted, atol=1e-6)


def test_gather_all_takes_rows_of_everything_and_its_gradient():
    hidden = torch.randn(2, 5, 3, requires_grad=True)
    index = torch.tensor([[4, 0, 1], [2, 3, 0]])
    shared, mask = torch.arange(10.0).view(1, 5, 2), torch.rand(2, 5) > 0.5
    got = kernels.gather_all([hidden, shared, mask, torch.arange(5)[None]], index)
    for b in range(2):
        for wanted, value in zip((hidden[b], shared[0], mask[b], torch.arange(5)), got, strict=True):
            assert torch.equal(value[b], wanted[index[b]])
    got[0].sum().backward()
    assert hidden.grad[:, :, 0].tolist() == [[1, 1, 0, 0, 1], [1, 0, 1, 1, 0]]


def test_gradients_flow_through_overlapping_clusters():
    x = torch.arange(8.0).view(1, 4, 2).requires_grad_()
    out = kernels.cluster_means(x, torch.tensor([[[0, 1], [1, 3]]]))
    assert out.tolist() == [[[1, 2], [4, 5]]]
    (out * torch.tensor([[[1.0], [10.0]]])).sum().backward()
    assert x.grad[0, :, 0].tolist() == [0.5, 5.5, 0, 5]


def test_ranking_remembers_nothing_for_a_gradient():
    query, key = (torch.randn(1, 2, 4, 6, requires_grad=True) for _ in range(2))
    assert not kernels.column_mass(query, key, 1.0).requires_grad
    stop, counted = torch.full((1, 4), 4), torch.ones(1, 4, dtype=torch.bool)
    assert not kernels.received(query, key, stop, counted, 1.0).requires_grad


@pytest.mark.parametrize("mask", [{"bounds": torch.tensor([0, 5])}, {"valid_BM": torch.ones(1, 5).bool()}])
def test_masks_need_the_queries_of_all_tokens(mask):
    with pytest.raises(ValueError, match="4 queries and 5 keys; hand over the queries of all tokens"):
        kernels.column_mass(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 5, 2), 1.0, **mask)


ON_A_GPU = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)


@pytest.fixture
def a_gpu(monkeypatch):
    """A process that believes it has an H100 and a working Triton."""
    triton = types.ModuleType("triton")
    triton.__version__, triton.__spec__ = "3.5.1", types.SimpleNamespace(name="triton")
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *args, **options: torch.zeros(1, 16, 16))
    monkeypatch.setattr(launch, "column_mass", lambda *args: None)
    monkeypatch.setattr(launch, "cluster_means", lambda *args: None)
    kernels.obstacle.cache_clear()
    yield triton
    kernels.obstacle.cache_clear()


def test_kernels_run_on_a_gpu_that_has_triton(a_gpu, caplog):
    assert kernels.usable(ON_A_GPU, ON_A_GPU)
    assert not caplog.records


def test_a_cpu_and_double_precision_take_pytorch_without_a_word(a_gpu, caplog):
    assert not kernels.usable(torch.zeros(1))
    assert not kernels.usable(types.SimpleNamespace(device=ON_A_GPU.device, dtype=torch.float64))
    assert not caplog.records


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda patch, triton: patch.setitem(sys.modules, "triton", None), "Triton is not installed"),
        (lambda patch, triton: patch.setattr(triton, "__version__", "3.2.0"), "Triton 3.2.0 is older than 3.3"),
        (
            lambda patch, triton: patch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0)),
            "compute capability 7.0 is below 8.0",
        ),
        (
            lambda patch, triton: patch.setattr(launch, "column_mass", lambda *args: 1 / 0),
            "a first kernel failed with ZeroDivisionError: division by zero",
        ),
    ],
)
def test_what_is_missing_is_said_once(break_it, reason, a_gpu, caplog, monkeypatch):
    break_it(monkeypatch, a_gpu)
    with caplog.at_level(logging.WARNING):
        assert not any(kernels.usable(ON_A_GPU) for _ in range(3))
    assert [record.getMessage() for record in caplog.records] == [
        f"no Triton kernels on cuda:0, PyTorch ranks instead (same results, slower): {reason}"
    ]


def test_the_switch(a_gpu, monkeypatch):
    for word, expected in {"off": False, "0": False, "on": True, "": True}.items():
        monkeypatch.setenv("DUET_KERNELS", word)
        assert kernels.usable(ON_A_GPU) is expected
    monkeypatch.setenv("DUET_KERNELS", "maybe")
    with pytest.raises(ValueError, match="DUET_KERNELS='maybe' in the environment is neither 'on' nor 'off'"):
        kernels.usable(ON_A_GPU)


@pytest.mark.parametrize("shape", [(16, 4, 577, 32), (40, 4, 145, 16), (3, 2, 1200, 16)])
def test_the_bits_of_an_image_do_not_depend_on_its_batch(shape):
    """Cached features of a frozen tower equal computed ones only if a batch's other images change nothing."""
    query, key = torch.randn(shape), torch.randn(shape)
    together = reference.column_mass(query, key, 0.25)
    order = torch.randperm(shape[0])
    assert torch.equal(reference.column_mass(query[order], key[order], 0.25), together[order])
    for row in range(shape[0]):
        one = slice(row, row + 1)
        assert torch.equal(reference.column_mass(query[one], key[one], 0.25), together[one])
