"""The eager stand-in of the benchmark: full attention maps, and the same tokens as without them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duet import DuetConfig, attach, bench, handle, trace
from duet.bench_eager import MapReducer, eager_attached
from duet.bench_run import Entry, configured

CPU = torch.device("cpu")
LLAVA = bench.SHAPES["quick"].with_tokens(144)
QWEN = bench.SHAPES["qwen-quick"]
DUET = {"dominant": 40, "contextual": 6, "schedule": {2: 0.5, 5: 0.25, 7: 0.0}}
CONFIGS = {
    "duet": DUET,
    "all queries": DUET | {"queries": "all"},
    "salient": DUET | {"queries": "salient", "salient_tokens": 3},
    "release": DUET | {"variant": "release"},
    "class row": DUET | {"options": {"score": "class_row"}},
    "few readers": DUET | {"options": {"readers": 20}},
    "visionzip": {"stage1": "visionzip", "dominant": 40, "contextual": 6, "schedule": {}},
    "stage 1 alone": {"dominant": 40, "contextual": 6, "schedule": {}},
    "fastv": {"stage1": "none", "stage2": "fastv", "schedule": {2: 0.4}},
    "fitprune": {"stage1": "none", "stage2": "fitprune", "schedule": {2: 0.4}},
    "sparsevlm": {"stage1": "none", "stage2": "sparsevlm", "schedule": {2: 0.4, 4: 0.2}},
    "tome": {"stage1": "tome", "dominant": 100, "contextual": 0, "schedule": {3: 0.5}},
}
ON_QWEN = ("duet", "all queries", "salient", "few readers", "stage 1 alone", "fastv")


@pytest.fixture(scope="module")
def models():
    return {shape: shape.build(CPU, torch.float32, "sdpa") for shape in (LLAVA, QWEN)}


def prefill(model, inputs, context):
    with context, trace(images=True) as seen, torch.inference_mode():
        logits = model(**inputs, use_cache=True, logits_to_keep=1).logits
    return seen.images, logits


@pytest.mark.parametrize(
    ("shape", "name"),
    [(LLAVA, name) for name in CONFIGS] + [(QWEN, name) for name in ON_QWEN],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_stand_in_keeps_the_same_tokens(models, shape, name):
    model = models[shape]
    config = DuetConfig(**CONFIGS[name])
    inputs = bench.Case("prefill", 2, 12, 0).inputs(model, shape, CPU)
    fast, fast_logits = prefill(model, inputs, attach(model, config))
    eager, eager_logits = prefill(model, inputs, eager_attached(model, config))
    assert len(fast) == 2
    assert [vars(image) for image in fast] == [vars(image) for image in eager]
    assert torch.allclose(fast_logits, eager_logits, atol=1e-4)
    if config.schedule:
        assert len(fast[0].kept_after[min(config.schedule)]) < len(fast[0].source)


@pytest.mark.parametrize("shape", [LLAVA, QWEN], ids=lambda shape: shape.name)
def test_the_model_is_as_before_afterwards(models, shape):
    model = models[shape]
    inputs = bench.Case("prefill", 1, 12, 0).inputs(model, shape, CPU)
    with torch.inference_mode():
        before = model(**inputs).logits
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with configured(model, Entry("fastv eager", DuetConfig(**CONFIGS["fastv"]), eager=True)):
        assert model.config._attn_implementation == "eager"
        assert sum(len(module._forward_hooks) for module in model.modules()) == sum(hooks) + 1
    assert model.config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, before)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *found, 0)
        return out


@pytest.mark.parametrize("shape", [LLAVA, QWEN], ids=lambda shape: shape.name)
def test_the_stand_in_writes_whole_maps(models, shape):
    """It would be no stand-in if it did not: heads x patches x patches at once, which the library never makes."""
    model, big = models[shape], shape.with_tokens(576)
    if shape is LLAVA:
        model = big.build(CPU, torch.float32, "sdpa")
    inputs = bench.Case("prefill", 1, 12, 0).inputs(model, big, CPU)
    largest = []
    for attached in (attach, eager_attached):
        with attached(model, DuetConfig(**DUET)), LargestTensor() as watcher, torch.inference_mode():
            model(**inputs, logits_to_keep=1)
        largest.append(watcher.elements)
    whole = big.tower_heads * big.tower_patches**2
    assert largest[1] >= whole
    assert largest[0] < whole


def test_gradients_flow_through_the_stand_in(models):
    model = models[LLAVA]
    inputs = bench.Case("train", 1, 12, 6).inputs(model, LLAVA, CPU)
    model.zero_grad()
    with eager_attached(model, DuetConfig(**DUET)):
        model(**inputs, use_cache=False).loss.backward()
    projector = model.get_submodule("model.multi_modal_projector.linear_1").weight
    assert projector.grad is not None
    assert projector.grad.abs().sum() > 0
    model.zero_grad()


def test_only_causal_maps_rank(models):
    model = models[QWEN]
    inputs = bench.Case("prefill", 1, 12, 0).inputs(model, QWEN, CPU)
    config = DuetConfig(**DUET, queries="all", options={"causal": False})
    with eager_attached(model, config), pytest.raises(ValueError, match="causal maps only"), torch.inference_mode():
        model(**inputs)


def test_maps_are_let_go():
    config = DuetConfig(**CONFIGS["fastv"])
    reducer = MapReducer(config)
    model = LLAVA.build(CPU, torch.float32, "sdpa")
    inputs = bench.Case("prefill", 1, 12, 0).inputs(model, LLAVA, CPU)
    with eager_attached(model, config), torch.inference_mode():
        family = handle(model).family
        model(**inputs)
        assert not family._reducer._maps
    assert reducer._layers == [1]
