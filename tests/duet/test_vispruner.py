"""VisPruner: half by attention, half by thinning the rest by parity."""

import pytest
import small
import torch
from dense import TOKENS, parts, reduced, vision_config


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


def test_the_share_of_important_patches():
    by_attention = reduced("vispruner", parts()["pixels"], options={"important": 1.0})
    assert torch.equal(by_attention.source, parts()["class"].topk(TOKENS, dim=1).indices.sort(dim=1).values)
    diverse = reduced("vispruner", parts()["pixels"], options={"important": 0.0})
    assert not torch.equal(diverse.source, by_attention.source)
    with pytest.raises(ValueError, match="important must lie between 0 and 1"):
        vision_config("vispruner", options={"important": 1.5})
