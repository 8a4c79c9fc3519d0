"""Every Triton kernel equals its PyTorch twin, in Triton's interpreter (or on a GPU where there is one)."""

import importlib.util

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from duet.kernels import launch, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed, so its interpreter cannot run the kernels", allow_module_level=True)
if DEVICE == "cpu" and not launch.interpreted():
    pytest.skip("Triton was imported without TRITON_INTERPRET=1 by another test", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
few = settings(
    max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)  # a failing example is not made smaller, which takes minutes here


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)


def random_mask(seed, *shape):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.7).to(DEVICE)


def close(got, wanted, dtype=torch.float32):
    """Sums in another order: fp32 rounding relative to the largest; else one rounding of the type."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    step = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[dtype]
    got, wanted = got.detach().float(), wanted.detach().float()
    difference = (got - wanted).abs().max()
    assert difference <= step * max(1e-3, float(wanted.abs().max())), f"differs by {float(difference)}"


shapes = st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 3]), st.integers(1, 90), st.sampled_from([5, 8, 16, 40]))


@few
@given(shapes, st.sampled_from(DTYPES), st.booleans(), st.integers(0, 99))
def test_column_mass(shape, dtype, class_token, seed):
    batch, heads, tokens, width = shape
    make = tensors(seed)
    # heads are split off the last dimension, as signals hand them over: rows are not contiguous
    query = make(batch, tokens, heads, width).to(dtype).transpose(1, 2)
    key = make(batch, tokens + class_token, heads, width).to(dtype).transpose(1, 2)
    close(launch.column_mass(query, key, width**-0.5), reference.column_mass(query, key, width**-0.5))


@few
@given(shapes, st.sampled_from(DTYPES), st.lists(st.integers(1, 40), max_size=3), st.booleans(), st.integers(0, 99))
def test_column_mass_of_segments_and_padding(shape, dtype, segments, padded, seed):
    batch, heads, tokens, width = shape
    make = tensors(seed)
    tokens = max(tokens, sum(segments) + 1)
    query, key = (make(batch, heads, tokens, width).to(dtype) for _ in range(2))
    bounds = torch.tensor([0, *torch.tensor(segments).cumsum(0).tolist(), tokens], device=DEVICE) if segments else None
    valid = random_mask(seed, batch, tokens) if padded else None
    close(launch.column_mass(query, key, 0.3, bounds, valid), reference.column_mass(query, key, 0.3, bounds, valid))


@few
@given(
    st.tuples(*(st.sampled_from(sizes) for sizes in ([1, 2], [1, 2], [1, 3], range(2, 90), range(1, 20)))),
    st.sampled_from([(8, 8), (16, 12), (40, 40), (12, 0)]), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_received(shape, widths, dtype, padded, seed):
    batch, key_heads, group, length, rows = shape
    width, turned = widths
    make = tensors(seed)
    query = make(batch, rows, key_heads * group, width).to(dtype).transpose(1, 2)
    key = make(batch, length, key_heads, width).to(dtype).transpose(1, 2)
    angle = make(1 + seed % 2 * (batch - 1), length, turned // 2).repeat(1, 1, 2)
    rotary = (angle.cos().to(dtype), angle.sin().to(dtype)) if turned else None
    stop = torch.randint(1, length + 1, (batch, rows), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    counted = random_mask(seed + 1, batch, rows)
    valid = random_mask(seed + 2, batch, length) if padded else None
    arguments = (query, key, stop, counted, width**-0.5, valid, rotary)
    # The interpreter cuts fp32 to bf16 off where PyTorch and GPUs round, so rotated keys differ by their last bit.
    rounding = dtype if rotary is not None and DEVICE == "cpu" else torch.float32
    close(launch.received(*arguments), reference.received(*arguments), rounding)


def test_a_row_that_may_see_nothing_is_uniform_in_both():
    query, key = tensors(1)(1, 2, 3, 8), tensors(2)(1, 2, 20, 8)
    valid = torch.arange(20, device=DEVICE)[None] >= 4
    stop, counted = torch.tensor([[3, 9, 20]], device=DEVICE), torch.tensor([[True, True, False]], device=DEVICE)
    got = launch.received(query, key, stop, counted, 0.3, valid)
    close(got, reference.received(query, key, stop, counted, 0.3, valid))
    assert float(got[0, 15]) == pytest.approx(1 / 40, rel=1e-4), "half of a uniform row over 20 positions"


def test_rotary_tables_of_another_type_than_the_keys():
    make = tensors(3)
    query, key = make(1, 2, 2, 8).bfloat16(), make(1, 1, 20, 8).bfloat16()
    angle = make(1, 20, 4).repeat(1, 1, 2)
    stop, counted = torch.tensor([[7, 20]], device=DEVICE), torch.ones(1, 2, dtype=torch.bool, device=DEVICE)
    arguments = (query, key, stop, counted, 0.3, None, (angle.cos(), angle.sin()))
    close(launch.received(*arguments), reference.received(*arguments))


@few
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 99))
def test_gather_all(batch, tokens, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])[:, : 1 + seed % tokens]
    index, make = index.to(DEVICE), tensors(seed)
    state = [
        make(batch, tokens, width).to(dtype),
        make(1, tokens, 2 * width),  # a rotary table that all samples share
        make(batch, 2 * tokens, width)[:, ::2],
        random_mask(seed, batch, 2 * tokens)[:, ::2],
        torch.arange(tokens, device=DEVICE)[None],
        torch.arange(tokens, device=DEVICE).expand(batch, -1) - 100,
    ]
    for got, wanted in zip(launch.gather_all(state, index), reference.gather_all(state, index), strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    (alone,) = launch.gather_all(state[3:4], index)
    assert torch.equal(alone, state[3].gather(1, index))


def test_gather_all_backward():
    index = torch.tensor([[3, 0, 4], [1, 2, 2]], device=DEVICE)
    grads = []
    for how in (launch, reference):
        shared, own = (x.requires_grad_() for x in (tensors(1)(1, 5, 4), tensors(2)(2, 5, 6)))
        mask = random_mask(0, 2, 5)
        first, kept, second = how.gather_all([shared, mask, own], index)
        assert not kept.requires_grad
        (first.square().sum() + (second * torch.arange(6, device=DEVICE)).sum()).backward()
        grads.append((shared.grad, own.grad))
    for got, wanted in zip(*grads, strict=True):
        close(got, wanted)


@few
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 40), st.integers(1, 5), st.integers(1, 80)),
    st.sampled_from(DTYPES), st.integers(0, 99),
)  # fmt: skip
def test_cluster_means_and_their_gradient(shape, dtype, seed):
    batch, tokens, clusters, width, size = shape
    make = tensors(seed)
    members = torch.randint(tokens, (batch, clusters, width), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    values, weights = make(batch, tokens, size), make(batch, clusters, size)
    results = []
    for how in (launch, reference):
        x = values.to(dtype).requires_grad_()
        out = how.cluster_means(x, members)
        # the twin's gradient is rounded once per member, the kernel's once
        exact = x if how is launch else values.to(dtype).float().requires_grad_()
        wanted = out if how is launch else reference.cluster_means(exact, members)
        wanted.backward(weights.to(dtype).to(wanted.dtype))
        results.append((out, exact.grad.to(dtype)))
    for got, wanted in zip(*results, strict=True):
        close(got, wanted, dtype)
