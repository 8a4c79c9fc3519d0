"""The probe's sections add up, name the right part, and the peak-memory reading counts bytes."""

import time

import pytest
import torch
from torch import nn

from duet.probe import Parts, Probe, peak_memory

CPU = torch.device("cpu")


class Sleep(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


class Model(nn.Module):
    """Tower 2 x 20 ms, stage 1 30 ms, projector 10 ms, decoder 2 x 20 ms, stage 2 40 ms, head 10 ms, 10 ms of other."""

    def __init__(self):
        super().__init__()
        self.tower = nn.ModuleList([Sleep(0.02), Sleep(0.02)])
        self.projector, self.head = Sleep(0.01), Sleep(0.01)
        self.decoder = nn.ModuleList([Sleep(0.02), Sleep(0.02)])

    def forward(self, x):
        for layer in self.tower:
            x = layer(x)
        time.sleep(0.03)
        x = self.projector(x)
        time.sleep(0.01)
        x = self.decoder[0](x)
        time.sleep(0.04)
        return self.head(self.decoder[1](x))


def parts(model):
    return Parts(list(model.tower), [model.projector], list(model.decoder), [model.head])


def test_sections():
    model = Model()
    probe = Probe(parts(model), CPU)
    with probe:
        model(torch.zeros(1))
    seconds = probe.seconds()
    expected = {"tower": 0.04, "stage1": 0.03, "projector": 0.01, "decoder": 0.04, "stage2": 0.04, "head": 0.01}
    for name, value in expected.items():
        assert value * 0.9 < seconds[name] < value + 1.0, (name, seconds)  # a busy machine oversleeps
    assert sum(v for k, v in seconds.items() if k != "total") == pytest.approx(seconds["total"])


def test_hooks_are_gone_afterwards():
    model = Model()
    with Probe(parts(model), CPU):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_pass_without_the_decoder_is_an_error():
    probe = Probe(parts(Model()), CPU)
    with probe:
        pass
    with pytest.raises(RuntimeError, match="no decoder layer"):
        probe.seconds()


def test_peak_memory_counts_what_lives_together():
    size = 4 * 1024 * 1024

    def one_after_the_other():
        for _ in range(3):
            torch.zeros(size, dtype=torch.uint8)

    def together():
        return [torch.zeros(size, dtype=torch.uint8) for _ in range(3)]

    assert peak_memory(one_after_the_other, CPU).tracked == pytest.approx(size, rel=0.01)
    assert peak_memory(together, CPU).tracked == pytest.approx(3 * size, rel=0.01)


def test_resident_cross_check():
    size = 256 * 1024 * 1024
    memory = peak_memory(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    if memory.resident is not None:
        assert memory.resident > 0.9 * size
