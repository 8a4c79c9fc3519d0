"""ToMe after the tower and inside it."""

import pytest
import small
import torch
from dense import TOKENS, model, parts, reduced


def test_tome_merges_the_most_similar_pairs():
    out = reduced("tome_post", parts()["pixels"])
    for row in range(3):
        members = [[m for m in group if m >= 0] for group in out.members[row].tolist()]
        assert sorted(m for group in members for m in group) == list(range(36))  # every patch is in exactly one token
        assert [group[0] for group in members] == sorted(group[0] for group in members)
        for token, group in enumerate(members):
            assert torch.allclose(out.tokens[row, token], parts()["features"][row][group].mean(0), atol=1e-5)
    one_round = reduced("tome_post", parts()["pixels"], tokens=30)
    for row in range(3):
        unit = torch.nn.functional.normalize(parts()["keys"][row], dim=-1)
        best = {i: max(range(1, 36, 2), key=lambda j: (float(unit[i] @ unit[j]), -j)) for i in range(0, 36, 2)}
        pairs = sorted(best, key=lambda i: (-float(unit[i] @ unit[best[i]]), i))[:6]
        wanted = {j: sorted([j, *(i for i in pairs if best[i] == j)]) for j in range(36) if j not in pairs}
        got = [[m for m in group if m >= 0] for group in one_round.members[row].tolist()]
        assert sorted(got) == sorted(wanted.values())


@pytest.mark.parametrize("options", [{}, {"proportional": False}, {"weighted": False}])
def test_tome_in_the_tower_equals_a_literal_loop(options):
    from duet.stage1.tome_tower import merges_per_block

    assert merges_per_block(576, 192, 23) == [17] * 16 + [16] * 7
    assert merges_per_block(576, 64, 23) == [23] * 6 + [22] * 17
    with pytest.raises(ValueError, match=r"cannot merge 30 of 36 tokens in block 1 of 1"):
        merges_per_block(36, 6, 1)
    pixels = small.pixels(2)
    out = reduced("tome", pixels, options=options)
    tower = model().model.vision_tower
    body = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        hidden = body.pre_layrnorm(body.embeddings(pixels))
        for row in range(2):
            tokens, groups, cls = list(hidden[row, 1:]), [[i] for i in range(36)], hidden[row, 0]
            for block in body.encoder.layers[:3]:
                x = torch.stack([cls, *tokens])
                normed = block.layer_norm1(x)
                attention = block.self_attn
                split = lambda t: t.view(len(t), 4, 8).transpose(0, 1)  # noqa: E731
                q, k, v = (split(f(normed)) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
                sizes = [1.0] * len(groups) if options.get("weighted") is False else [len(g) for g in groups]
                bias = torch.tensor([1.0, *sizes]).log() * options.get("proportional", True)
                weights = (q @ k.transpose(1, 2) * attention.scale + bias).softmax(-1)
                x = x + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
                unit = torch.nn.functional.normalize(k.mean(0)[1:], dim=-1)
                even, odd = range(1, len(tokens), 2), range(0, len(tokens), 2)  # the class token is number 0
                best = {i: max(odd, key=lambda j: (float(unit[i] @ unit[j]), -j)) for i in even}
                gone = sorted(even, key=lambda i: (-float(unit[i] @ unit[best[i]]), i))[:8]
                cls, new, kept = x[0], [], []
                for i in [*(i for i in even if i not in gone), *odd]:
                    merged = [i, *(j for j in gone if best[j] == i)]
                    total = sum(sizes[j] for j in merged)
                    new.append(sum(x[1 + j] * sizes[j] for j in merged) / total)
                    kept.append(sorted(p for j in merged for p in groups[j]))
                stacked = torch.stack([cls, *new])
                stacked = stacked + block.mlp(block.layer_norm2(stacked))
                cls, tokens, groups = stacked[0], list(stacked[1:]), kept
            order = sorted(range(TOKENS), key=lambda i: groups[i][0])
            assert [[m for m in g if m >= 0] for g in out.members[row].tolist()] == [groups[i] for i in order]
            assert torch.allclose(out.tokens[row], torch.stack([tokens[i] for i in order]), atol=1e-4)


def test_only_attention_by_size_needs_a_bias(monkeypatch):
    block = getattr(model().model.vision_tower, "vision_model", model().model.vision_tower).encoder.layers[0]
    monkeypatch.setattr(block.self_attn.config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(ValueError, match=r"'flash_attention_2' cannot do; use sdpa .* proportional=False"):
        reduced("tome", small.pixels(1))
