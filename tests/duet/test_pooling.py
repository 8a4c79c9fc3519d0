"""Average pooling and image down-sampling."""

import pytest
import small
import torch
from dense import TOKENS, model, parts, reduced

from duet.grids import pooled_grid


def test_average_pool_equals_a_mean_over_cells():
    out = reduced("average_pool", parts()["pixels"])
    assert pooled_grid(12, (6, 6)) == (3, 4)
    for row in range(3):
        for token in range(TOKENS):
            members = [m for m in out.members[row, token].tolist() if m >= 0]
            assert torch.allclose(out.tokens[row, token], parts()["features"][row][members].mean(0), atol=1e-5)
            r, c = divmod(token, 4)
            rows, columns = range(2 * r, 2 * r + 2), range(6 * c // 4, -(-6 * (c + 1) // 4))
            assert members == [6 * i + j for i in rows for j in columns]


@pytest.mark.parametrize(("tokens", "shape"), [(192, (12, 16)), (128, (8, 16)), (64, (8, 8)), (576, (24, 24))])
def test_pooled_grids_of_the_usual_budgets(tokens, shape):
    assert pooled_grid(tokens, (24, 24)) == shape


def test_a_number_that_no_grid_has():
    with pytest.raises(ValueError, match=r"no grid within 6 x 6 patches has 13 cells; .*12, 15"):
        reduced("average_pool", small.pixels(1), tokens=13)


def test_pooled_maxima_and_norms():
    mean, largest = (
        reduced("average_pool", parts()["pixels"]),
        reduced("average_pool", parts()["pixels"], options={"pool": "max"}),
    )
    scaled = reduced("average_pool", parts()["pixels"], options={"keep_norm": True})
    for row in range(3):
        norm = parts()["features"][row].norm(dim=-1).mean()
        for token in range(TOKENS):
            members = [m for m in largest.members[row, token].tolist() if m >= 0]
            assert torch.allclose(largest.tokens[row, token], parts()["features"][row][members].amax(0), atol=1e-5)
            wanted = mean.tokens[row, token] / mean.tokens[row, token].norm() * norm
            assert torch.allclose(scaled.tokens[row, token], wanted, atol=1e-4)


def test_downsampling_runs_the_tower_on_a_smaller_picture():
    out = reduced("downsample", parts()["pixels"])
    small_pictures = torch.nn.functional.interpolate(parts()["pixels"], size=[12, 16], mode="bicubic", antialias=True)
    with torch.no_grad():
        states = (
            model()
            .model.vision_tower(small_pictures, output_hidden_states=True, interpolate_pos_encoding=True)
            .hidden_states
        )
    assert out.grid == (3, 4) and torch.allclose(out.tokens, states[-2][:, 1:], atol=1e-5)
