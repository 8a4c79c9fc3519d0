"""SparseVLM in its versions against a slow loop written from its description, and what recycling must hold."""

import math

import pytest
import small
import torch

import duet
from duet import DuetConfig, run_decoder
from duet.draw import describe, patch_fates
from duet.stage2.sparsevlm import _adaptive, density_peaks, raters, recycled, survivors
from duet.tokens import TokenState

SCHEDULE = {2: 20.5 / 36, 4: 9.5 / 36}
VERSIONS = {
    "1.0": {"scale": 2.4, "bias": 3.0},
    "1.5": {},
    "2.0": {"recycle": False, "plus": True},
    "2.0 with three heads": {"recycle": False, "plus": True, "heads": 3},
}


@pytest.fixture(scope="module")
def model():
    return small.build()


def config(version, **more):
    schedule = {2: 0.999, 4: 0.999} if version == "1.0" else SCHEDULE
    return DuetConfig(stage1="none", stage2="sparsevlm", schedule=schedule, options=VERSIONS[version], **more)


# --- the slow loop ---------------------------------------------------------------------------------------------------


def attention(decoder, layer, hidden, positions):
    """All probabilities of one layer, [H, L, L], head by head."""
    block = decoder.layers[layer]
    normed = block.input_layernorm(hidden)
    cos, sin = (table[0] for table in decoder.rotary_emb(hidden[None], torch.tensor([positions])))
    turn = lambda x: x * cos + torch.cat((-x[:, 4:], x[:, :4]), 1) * sin  # noqa: E731
    query, key = block.self_attn.q_proj(normed), block.self_attn.k_proj(normed)
    maps = []
    for head in range(4):
        q, k = turn(query[:, 8 * head : 8 * head + 8]), turn(key[:, 8 * (head // 2) : 8 * (head // 2) + 8])
        scores = (q @ k.T / 8**0.5).masked_fill(~torch.ones(len(q), len(q)).tril().bool(), -math.inf)
        maps.append(scores.softmax(-1))
    return torch.stack(maps)


def tables(decoder, hidden, position):
    """Cosine and sine of each pair of dimensions of a head, at one position."""
    cos, sin = decoder.rotary_emb(hidden[None], torch.tensor([[position]]))
    return [(float(cos[0, 0, i]), float(sin[0, 0, i])) for i in range(4)]


def prior(decoder, hidden, a, b):
    """The scaled logit of ones at positions a and b, relative to that at distance zero."""
    pairs = zip(tables(decoder, hidden, a), tables(decoder, hidden, b), strict=True)
    return sum((c - s) * (d - t) + (c + s) * (d + t) for (c, s), (d, t) in pairs) / 8


def cluster(points, count):
    """Density peaks by loops over pairs."""
    distance = [[float((p - q).norm()) / len(p) ** 0.5 for q in points] for p in points]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in distance]
    largest = max(map(max, distance))
    value = []
    for i in range(len(points)):
        denser = [j for j in range(len(points)) if (density[j], -j) > (density[i], -i)]
        value.append(density[i] * min([distance[i][j] for j in denser], default=largest))
    centres = sorted(range(len(points)), key=lambda i: (-value[i], i))[:count]
    groups = [[c] for c in centres]
    for i in range(len(points)):
        if i not in centres:
            groups[min(range(count), key=lambda g: distance[i][centres[g]])].append(i)
    return centres, groups


@torch.no_grad()
def literal(model, single, config):
    """Logits of one sample, every step spelled out."""
    decoder = model.model.language_model
    hidden = model(**single, output_hidden_states=True).hidden_states[0][0]
    visual = [int(token) == small.IMAGE_TOKEN for token in single["input_ids"][0]]
    positions = list(range(len(visual)))
    text = [i for i in range(len(visual)) if not visual[i] and i > visual.index(True)]
    pictures = [i for i, is_visual in enumerate(visual) if is_visual]
    votes = (hidden[pictures] @ hidden[text].T).softmax(-1).mean(0)
    chosen = {t for t, vote in zip(text, votes, strict=True) if vote > votes.mean()}
    origin = list(range(len(visual)))
    option = config.option
    for layer in range(small.LAYERS):
        maps = attention(decoder, layer, hidden, positions)
        cos_sin = decoder.rotary_emb(hidden[None], torch.tensor([positions]))
        out = decoder.layers[layer](hidden[None], position_embeddings=cos_sin)
        hidden = (out if isinstance(out, torch.Tensor) else out[0])[0]
        if layer + 1 not in config.schedule:
            continue
        rows = [i for i, o in enumerate(origin) if o in chosen]
        columns = [i for i in range(len(origin)) if visual[i]]
        if option("plus"):
            correct = torch.tensor(
                [[max(0.1, prior(decoder, hidden, positions[r], positions[c])) for c in columns] for r in rows]
            )
            divided = maps[:, rows][:, :, columns] / correct
            heads = sorted(range(4), key=lambda h: -float(divided[h].sum()))[: option("heads") or 2]
            score = divided[heads].mean(0).mean(0)
        else:
            score = maps.mean(0)[rows][:, columns].mean(0)
        order = [columns[i] for i in sorted(range(len(columns)), key=lambda i: (-float(score[i]), i))]
        most = math.floor(config.schedule[layer + 1] * 36 + 1e-6)
        if option("scale"):
            rank = int(torch.linalg.matrix_rank(maps.mean(0)[rows][:, columns]))
            alive = min(int(option("scale") * rank + option("bias")), len(columns) - 1)
        elif option("recycle"):
            clusters = [int((int(0.3 * (len(columns) - k)) + 1) / 10) + 1 for k in range(most)]
            alive = max(k for k in range(most) if k + clusters[k] == most)
        else:
            alive = most
        keep, deleted = set(order[:alive]), order[alive:]
        if option("recycle"):
            pool = deleted[: int(0.3 * len(deleted)) + 1]
            centres, groups = cluster(hidden[pool], int(len(pool) / 10) + 1)
            means = {
                pool[c]: hidden[[pool[i] for i in group]].mean(0) for c, group in zip(centres, groups, strict=True)
            }
            hidden = torch.stack([means.get(i, hidden[i]) for i in range(len(hidden))])
            keep |= set(means)
        left = [i for i in range(len(origin)) if not visual[i] or i in keep]
        hidden, origin, visual = hidden[left], [origin[i] for i in left], [visual[i] for i in left]
        positions = list(range(len(left))) if config.positions != "original" else [positions[i] for i in left]
    return model.lm_head(decoder.norm(hidden))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_versions_equal_the_slow_loop(model, version, positions):
    single = small.mixed_singles()[0]
    wanted = literal(model, single, config(version, positions=positions))
    with duet.attach(model, config(version, positions=positions)):
        got = model(**single).logits[0]
    assert got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-4)


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alive", "total"),
    [
        ((300, 200, 110), (309, 204, 113)),  # "192"
        ((303, 110, 36), (312, 117, 39)),  # "128"
        ((66, 30, 17), (82, 32, 18)),  # "64"
    ],
)
def test_published_lists_with_recycled_tokens(alive, total):
    before = 576
    for kept, left in zip(alive, total, strict=True):
        assert kept + recycled(before - kept) == left and survivors(before, left) == kept
        before = left


def test_every_total_can_be_had():
    for before in range(1, 80):
        for total in range(before + 1):
            alive = survivors(before, total)
            new = min(recycled(before - alive), total - alive)
            assert alive + new == total and 0 <= alive <= total
            if total >= recycled(before):
                assert alive + recycled(before - alive) == total
    assert survivors(50, 50) == 50 and recycled(0) == 0


@torch.no_grad()
def test_adaptive_counts_differ_by_sample_and_do_not_depend_on_the_batch(model):
    with duet.attach(model, config("1.0")), duet.trace() as together:
        batch = model(**small.mixed_batch("left")).logits
    counts = [segment.visual for segment in together.passes[0]]
    assert counts[0] == [36, 0, 72] and len({count / 36 for count in counts[1][::2]}) == 2
    for row, single in enumerate(small.mixed_singles()):
        with duet.attach(model, config("1.0")), duet.trace() as alone:
            logits = model(**single).logits[0]
        assert [segment.visual[0] for segment in alone.passes[0]] == [count[row] for count in counts]
        assert torch.allclose(batch[row, -len(logits) :], logits, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"scale": 0.001}, recycled(36)),  # a rank of nearly nothing: only recycled tokens
        ({"scale": 0.001, "recycle": False}, 0),
        ({"scale": 0.001, "bias": 5.0, "recycle": False}, 5),
        ({"scale": 999.0}, 35),  # a large one keeps all but one, which the schedule allows
    ],
)
def test_adaptive_counts_at_their_limits(model, options, left):
    settings = DuetConfig(stage1="none", stage2="sparsevlm", schedule={2: 0.999}, options=options)
    with duet.attach(model, settings), duet.trace() as record:
        model(**small.mixed_singles()[0])
    assert record.passes[0][-1].visual == [left]


def test_a_rank_of_zero_leaves_the_bias():
    settings = DuetConfig(stage2="sparsevlm", options={"scale": 9.0, "bias": 6.0})
    assert _adaptive(50, 0, settings, recycle=False) == 6 and _adaptive(50, 0, settings, recycle=True) == 6 + recycled(
        44
    )
    assert _adaptive(50, 2, settings, recycle=False) == 24 and _adaptive(50, 9, settings, recycle=False) == 49
    assert _adaptive(9, 9, settings, recycle=True) == 9  # as many ratings as tokens: the layer is skipped


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_cached_generation_equals_recomputation(model, version):
    inputs = small.mixed_batch("left")
    with duet.attach(model, config(version)):
        cached = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        again = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)


# --- recycling -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_trace_follows_merges(model):
    with duet.attach(model, config("1.5")), duet.trace() as record:
        model(**small.mixed_batch("right"))
    image = record.images[0]
    first = image.merged_after[2]
    centres = set(first.values())
    assert len(image.kept_after[2]) == 20 and centres <= set(image.kept_after[2])
    assert len(centres) == recycled(36 - survivors(36, 20)) and all(first[c] == c for c in centres)
    assert len(first) == 3 * (36 - survivors(36, 20)) // 10 + 1
    for token, fate in enumerate(image.fate()):
        assert fate.startswith(f"kept as token {token}")
        assert (f"merged into token {first[token]} after layer 2" in fate) if token in first else True
        gone = token not in first and token not in image.kept_after[2]
        assert fate.endswith("dropped after layer 2") == gone
    shared = [record.images[1].merged_after[2], record.images[2].merged_after[2]]  # two images, clustered together
    across = [token for group in shared for token in group.values() if not 0 <= token < 36]
    assert across and any(
        "merged into a token of another image" in fate for i in (1, 2) for fate in record.images[i].fate()
    )


@torch.no_grad()
def test_recycled_tokens_are_drawn(model):
    with duet.attach(model, config("1.5")), duet.trace() as record:
        model(**small.mixed_singles()[0])
    image = record.images[0]
    groups = image.recycled(4)
    for place, tokens in groups.items():
        assert place in image.kept_after[4] and place in tokens
        assert all(
            f"merged into token {place} after layer" in image.fate()[token] for token in tokens if token != place
        )
    fates = patch_fates(image, 4)
    assert (fates >= 0).sum() == sum(len(tokens) for tokens in groups.values()) > len(groups) > 0
    assert (fates == -1).sum() == 9 - len(groups)
    assert describe(image, 4) == f"after layer 4: 9 of 36 ({9 - len(groups)} kept, 0 merged, {len(groups)} recycled)"
    assert image.recycled(0) == {} and "recycled" not in describe(image, 0)


def test_gradients_reach_every_merged_token(model):
    decoder = model.model.language_model
    visual = torch.zeros(1, 30, dtype=torch.bool)
    visual[:, 3:23] = True
    embeds = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    schedule = {1: 4.5 / 20}
    seen = {}

    def watch(stage, settings):
        from duet.stage2.sparsevlm import sparsevlm

        seen["decision"] = sparsevlm(stage, settings)
        return seen["decision"]

    settings = DuetConfig(stage1="none", stage2="sparsevlm", schedule=schedule)
    out = run_decoder(decoder, embeds, visual_mask=visual, config=settings, reducer=watch)
    decision = seen["decision"]
    merged = (decision.merged_into[0] >= 0).nonzero()[:, 0]
    (gradient,) = torch.autograd.grad(
        decision.hidden[0, decision.merged_into[0, merged[0]]].sum(), embeds, retain_graph=True
    )
    members = [int(i) for i in merged if decision.merged_into[0, i] == decision.merged_into[0, merged[0]]]
    assert len(members) > 1 and all(gradient[0, i].abs().sum() > 0 for i in members)
    assert out.last_hidden_state.shape[1] == 14 and decision.kept == [4]


def test_clusters_of_equal_tokens():
    centres, assigned = density_peaks(torch.ones(6, 4), 3)
    assert centres.tolist() == [0, 1, 2] and assigned.tolist() == [0, 1, 2, 0, 0, 0]
    points = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2]])
    _, assigned = density_peaks(points, 2)
    assert len(set(assigned[:3].tolist())) == len(set(assigned[3:].tolist())) == 1 and assigned[0] != assigned[3]


def state(hidden, visual, text):
    marks = lambda letters: torch.tensor([[c == "x" for c in letters]])  # noqa: E731
    size = torch.arange(len(visual))[None]
    return TokenState(hidden, None, marks(visual), marks(text), marks(text), size, size, None, False)


def test_raters_match_the_picture_more_than_average():
    hidden = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [3, 0], [0, 3]]])
    assert raters(state(hidden, "xx---", "--xxx"))[0].tolist() == [False, False, False, True, False]
    same = torch.ones(1, 5, 2)
    assert raters(state(same, "xx---", "--xxx"))[0].tolist() == [False, False, True, True, True]
    assert raters(state(same, "-----", "--xxx"))[0].tolist() == [False, False, True, True, True]
