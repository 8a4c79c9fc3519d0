"""Random patches are uniform and reproducible."""

import small
import torch
from dense import reduced

from duet.chance import uniform
from duet.tokens import rank_descending


def test_random_choices_are_uniform_and_reproducible():
    pixels = small.pixels(3)
    first, again = reduced("random", pixels), reduced("random", pixels.flip(0))
    assert torch.equal(first.source, again.source.flip(0))
    assert not torch.equal(first.source, reduced("random", pixels, seed=1).source)
    draws = torch.stack([uniform(torch.arange(50), 36, seed) for seed in range(40)]).flatten(0, 1)
    chosen = torch.zeros(36)
    for row in rank_descending(draws)[:, :12]:
        chosen[row] += 1
    expected = 2000 * 12 / 36
    statistic = float(((chosen - expected) ** 2 / (expected * (1 - 12 / 36))).sum())
    assert statistic < 66.6  # chi-square, 35 degrees of freedom, 0.1 %
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
