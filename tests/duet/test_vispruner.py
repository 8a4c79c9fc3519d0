"""VisPruner: half by attention, half by thinning the rest by parity."""

import pytest
import small
import torch
from dense import parts, reduced


@pytest.mark.parametrize("tokens", [12, 13, 35])
def test_vispruner_thins_by_parity(tokens):
    out = reduced("vispruner", parts()["pixels"], tokens=tokens)
    for row in range(3):
        order = sorted(range(small.PATCHES), key=lambda i: (-float(parts()["class"][row, i]), i))
        unit = torch.nn.functional.normalize(parts()["features"][row], dim=-1)
        keep, rest = order[: tokens // 2], order[tokens // 2 :]
        wanted = tokens - tokens // 2
        while len(rest) > wanted:
            even, odd = rest[::2], rest[1::2]
            alike = {i: max(float(unit[i] @ unit[j]) for j in odd) for i in even}
            count = min(8, len(rest) - wanted, len(even))
            rest = sorted(even, key=lambda i: (-alike[i], even.index(i)))[count:] + odd
        assert out.source[row].tolist() == sorted(keep + rest)
