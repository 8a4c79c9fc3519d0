"""DivPrune is the greedy max-min subset of projected tokens."""

import small
import torch
from dense import TOKENS, parts, reduced


def test_divprune_is_the_greedy_max_min_subset():
    out = reduced("divprune", parts()["pixels"])
    for row in range(3):
        unit = torch.nn.functional.normalize(parts()["projected"][row], dim=-1)
        distance = (1 - unit @ unit.T).tolist()
        others = lambda i: [distance[i][j] for j in range(small.PATCHES) if j != i]  # noqa: B023, E731
        picks = [max(range(small.PATCHES), key=lambda i: (min(others(i)), -i))]
        while len(picks) < TOKENS:
            free = [i for i in range(small.PATCHES) if i not in picks]
            picks.append(max(free, key=lambda i: (min(distance[p][i] for p in picks), -i)))
        assert out.source[row].tolist() == sorted(picks)


def test_divprune_survives_equal_tokens():
    out = reduced("divprune", torch.zeros(1, 3, 24, 24))
    assert len(set(out.source[0].tolist())) == TOKENS
