"""FasterVLM, and HiRED on a single pass, keep the most attended patches."""

import pytest
import small
from dense import TOKENS, parts, reduced


@pytest.mark.parametrize("name", ["fastervlm", "hired"])
def test_class_attention_keeps_the_most_attended(name):
    out = reduced(name, parts()["pixels"])
    for row in range(3):
        best = sorted(range(small.PATCHES), key=lambda i: (-float(parts()["class"][row, i]), i))[:TOKENS]
        assert out.source[row].tolist() == sorted(best)
