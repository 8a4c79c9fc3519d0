"""No stage allocates anything of the order of N x N per head, and the watcher that says so can see one that does."""

import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from duet import DuetConfig, encode_vision, run_decoder
from duet.probe import peak_memory
from duet.signals import TowerSignals
from duet.stage1 import VISION_REDUCERS, TowerOutput
from duet.stage2 import LANGUAGE_REDUCERS

N = 2880
HEADS = 16
WIDTH = 128
# A quarter of N x N per head. Blockwise scores and comparisons of features, which have no heads, stay below a tenth of
# it; one whole map is four times above.
IN_TOWER = ("tome",)
LIMIT = HEADS * N * N // 4


class AllocationWatcher(TorchDispatchMode):
    """Remembers the operator that made the largest new storage, counted in elements."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.operator = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                if elements > self.largest:
                    self.largest, self.operator = elements, str(func)
        return out


def largest_allocation(run):
    with AllocationWatcher() as watcher, torch.no_grad():
        run()
    assert watcher.largest > 0, "the watcher saw nothing"
    return watcher.largest, watcher.operator


class Attention(nn.Module):
    """The parts of a CLIP attention block that signals read."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.num_heads = HEADS
        self.scale = (WIDTH // HEADS) ** -0.5


def tower_output(patches):
    torch.manual_seed(0)
    hidden = torch.randn(1, patches + 1, WIDTH)
    attention = Attention()
    block = types.SimpleNamespace(layer_norm1=nn.Identity(), self_attn=attention)
    grid = (40, patches // 40)
    return TowerOutput(hidden, TowerSignals(hidden, attention, True), True, grid, torch.randn(1, 3, 8, 8), block)


def tiny_decoder(layers=4):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=HEADS, vocab_size=32
    )
    return LlamaModel(config).eval()


STAGE1 = {name: {"stage1": name} for name in VISION_REDUCERS.names() if name not in IN_TOWER} | {
    "release": {"variant": "release"}
}


@pytest.mark.parametrize("name", STAGE1)
def test_stage_1(name):
    config = DuetConfig(dominant=300, contextual=40, **STAGE1[name])
    tower = tower_output(N)
    largest, operator = largest_allocation(lambda: VISION_REDUCERS.get(config.stage1)(tower, config))
    assert largest < LIMIT, (
        f"{operator} made {largest} elements, {largest / (HEADS * N * N):.2f} maps of N x N per head"
    )


@pytest.mark.parametrize("options", [{}, {"stage1": "tome", "dominant": 1500}])
def test_the_whole_tower_with_stage_1(options):
    side = 54  # 2,916 patches, the nearest square above N
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=14 * side,
        patch_size=14,
    )
    config._attn_implementation = "sdpa"
    tower = CLIPVisionModel(config).eval()
    pixels = torch.randn(1, 3, 14 * side, 14 * side)
    largest, operator = largest_allocation(lambda: encode_vision(tower, pixels, config=DuetConfig(**options)))
    assert largest < LIMIT, f"{operator} made {largest} elements"


@pytest.mark.parametrize("queries", ["last", "all", "salient"])
def test_stage_2_rows(queries):
    stage_2_allocates_no_map(queries=queries)


@pytest.mark.parametrize("name", LANGUAGE_REDUCERS.names())
def test_stage_2_methods(name):
    stage_2_allocates_no_map(stage2=name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fastv", {"rows": "every"}), ("sparsevlm", {"plus": True, "recycle": False}), ("sparsevlm", {"scale": 2.0}),
        ("text_guided", {"causal": False, "recount": True}),
    ],
)  # fmt: skip
def test_stage_2_options(name, options):
    stage_2_allocates_no_map(stage2=name, options=options, queries="all")


def stage_2_allocates_no_map(**options):
    decoder, text = tiny_decoder(), 200
    embeds = torch.randn(1, N + 2 * text, WIDTH)
    visual = torch.zeros(1, N + 2 * text, dtype=torch.bool)
    visual[:, text : text + N] = True
    config = DuetConfig(stage1="none", schedule={2: 0.5, 3: 0.0}, **options)
    run = largest_allocation(lambda: run_decoder(decoder, embeds, visual_mask=visual, config=config, use_cache=True))
    assert run[0] < LIMIT, f"{run[1]} made {run[0]} elements"


def test_an_eager_map_is_caught():
    tower = tower_output(N)
    attention = Attention()

    def eager():  # what the published implementations do in every layer
        query, key = (layer(tower.patches).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in attention.children())
        return (query @ key.transpose(-1, -2)).softmax(-1).sum(dim=(1, 2))

    largest, _ = largest_allocation(eager)
    assert largest == HEADS * N * N
    assert largest > LIMIT


def test_an_eager_decoder_is_caught():
    decoder = tiny_decoder(layers=1)
    decoder.set_attn_implementation("eager")
    largest, _ = largest_allocation(lambda: decoder(inputs_embeds=torch.randn(1, N, WIDTH)))
    assert largest > LIMIT


@pytest.mark.parametrize("name", ["local_cluster", "release", "visionzip", "fastervlm", "random"])
def test_stage_1_memory_grows_with_the_tokens_not_their_square(name):
    config = DuetConfig(dominant=300, contextual=40, **STAGE1[name])

    def peak(patches):
        tower = tower_output(patches)
        with torch.no_grad():
            return peak_memory(lambda: VISION_REDUCERS.get(config.stage1)(tower, config), torch.device("cpu")).tracked

    small, large = peak(N // 2), peak(2 * N)
    assert large < 6 * small, f"{small} bytes at {N // 2} patches, {large} at {2 * N}: a map would grow 16 times"
