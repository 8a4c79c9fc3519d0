"""Stage 1 on packed towers against slow, literal versions with full attention maps; what stays is at its place."""

from dataclasses import replace

import pytest
import qwen_models as qwen
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

import duet
from duet import DuetConfig
from duet.families import FAMILIES
from duet.families.prompt import Prompt
from duet.families.qwen_tower import PackedFrames, reduce_pictures
from duet.families.reading import read_pictures
from duet.probe import peak_memory
from duet.stage1 import VISION_REDUCERS

GRIDS = [(1, 8, 12), (3, 6, 8), (1, 4, 6), (1, 2, 2)]  # an image, a video, a small image, one unit
UNIT = qwen.MERGE**2


@pytest.fixture(params=qwen.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return qwen.build(family)


@torch.no_grad()
def host_run(model, grids):
    """The host's own tower: its output, and what its attention modules got, block by block."""
    tower, seen = model.model.visual, []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        for block in tower.blocks
    ]
    out = tower(qwen.pixels(grids), grid_thw=torch.tensor(grids))
    for hook in hooks:
        hook.remove()
    return out, seen


def literal_maps(model, seen, block, grids):
    """Full attention maps [H, P, P] and rotated keys [H, P, d] of every frame, patches in raster order of units."""
    args, kwargs = seen[block]
    attention = model.model.visual.blocks[block].attn
    hidden = args[0] if args else kwargs["hidden_states"]
    q, k, _ = attention.qkv(hidden).reshape(len(hidden), 3, attention.num_heads, -1).permute(1, 0, 2, 3)
    q, k = apply_rotary_pos_emb_vision(q, k, *kwargs["position_embeddings"])
    if model.config.model_type == "qwen2_5_vl":  # undo the windows, unit by unit, by looking for where each one went
        order = window_order(grids)
        back = [order.index(unit) * UNIT + i for unit in range(len(order)) for i in range(UNIT)]
        q, k = q[back], k[back]
    maps, keys, start = [], [], 0
    for frames, rows, columns in grids:
        for _ in range(frames):
            part = slice(start, start + rows * columns)
            scores = torch.einsum("qhd,khd->hqk", q[part], k[part]) / q.shape[-1] ** 0.5
            maps.append(scores.softmax(-1))
            keys.append(k[part].transpose(0, 1))
            start += rows * columns
    return maps, keys


def window_order(grids):
    """Raster numbers of units in the order of 2 x 2 windows."""
    order, start = [], 0
    for frames, rows, columns in grids:
        high, wide = rows // 2, columns // 2
        for frame in range(frames):
            for top in range(0, high, 2):
                for left in range(0, wide, 2):
                    for r in range(top, min(top + 2, high)):
                        for c in range(left, min(left + 2, wide)):
                            order.append(start + frame * high * wide + r * wide + c)
        start += frames * high * wide
    return order


def literal_signals(attention_map, keys):
    """Column mass, rows and mean keys of units, by loops. Shapes: [H, P, P], [H, P, d] -> [N], [N, N], [N, d]."""
    heads, patches, _ = attention_map.shape
    count = patches // UNIT
    mass, rows, metric = torch.zeros(count), torch.zeros(count, count), torch.zeros(count, keys.shape[-1])
    for j in range(count):
        inside = slice(j * UNIT, (j + 1) * UNIT)
        for head in range(heads):
            mass[j] += attention_map[head, :, inside].sum() / (heads * patches * UNIT)
            metric[j] += keys[head, inside].sum(0) / (heads * UNIT)
            for i in range(count):
                rows[i, j] += attention_map[head, i * UNIT : (i + 1) * UNIT, inside].sum() / (heads * UNIT**2)
    return mass, rows, metric


def run_tower(model, grids):
    family = FAMILIES.get(model.config.model_type)
    return family.run_tower(model.model.visual, qwen.pixels(grids), torch.tensor(grids))


@torch.no_grad()
def test_the_tower_is_the_hosts_to_the_bit(model):
    out, _ = host_run(model, GRIDS)
    packed = run_tower(model, GRIDS)
    assert torch.equal(packed.levels[0], out.pooler_output)
    for mine, theirs in zip(packed.levels[1:], getattr(out, "deepstack_features", None) or [], strict=True):
        assert torch.equal(mine, theirs)


@torch.no_grad()
@pytest.mark.parametrize(("family", "block"), [("qwen2_5_vl", 3), ("qwen2_5_vl", 1), ("qwen2_vl", 3), ("qwen3_vl", 3)])
def test_signals_equal_full_maps(family, block):
    """Block 1 ranks where no later one sees a whole frame."""
    model = qwen.build(family, fullatt_block_indexes=[0, 1]) if block == 1 else qwen.build(family)
    packed = run_tower(model, GRIDS)
    maps, keys = literal_maps(model, host_run(model, GRIDS)[1], block, GRIDS)
    frame, start = 0, 0
    for frames, rows, columns in GRIDS:
        stop, count = start + frames * rows * columns, rows * columns // UNIT
        parts = PackedFrames(packed.part(start, stop, UNIT), frames, count, UNIT)
        signals = parts.signals(slice(0, frames), (rows // 2, columns // 2))
        every = torch.arange(count).expand(frames, -1)
        mass, all_rows, metric = signals.column_mass(), torch.cat(list(signals.rows(every)), 1), signals.key_metric()
        for number in range(frames):
            wanted = literal_signals(maps[frame], keys[frame])
            for mine, theirs in zip((mass[number], all_rows[number], metric[number]), wanted, strict=True):
                assert torch.allclose(mine, theirs, atol=1e-6)
            frame += 1
        start = stop


def literal_paper(features, signals, k1, k2, width):
    """Algorithm 1 on one frame; returns (place, token) pairs in raster order."""
    mass, rows, _ = signals
    ranked = sorted(range(len(mass)), key=lambda i: (-mass[i].item(), i))
    dominant, centres, rest = ranked[:k1], ranked[k1 : k1 + k2], ranked[k1:]
    tokens = {i: features[i] for i in dominant}
    for centre in centres:
        others = sorted((i for i in rest if i != centre), key=lambda i: (-rows[centre, i].item(), i))
        tokens[centre] = features[[centre, *others[: width - 1]]].mean(0)
    return sorted(tokens.items())


def literal_release(features, signals, k1, k2, width):
    """The released code on one frame: strided anchors, key cosine, a sum of anchor and mean."""
    mass, _, metric = signals
    ranked = sorted(range(len(mass)), key=lambda i: (-mass[i].item(), i))
    pool = ranked[k1 : k1 + width * k2]
    stride = len(pool) // k2
    anchors = [pool[i * stride] for i in range(k2)]
    tokens = {i: features[i] for i in ranked[:k1]}
    unit = metric / metric.norm(dim=-1, keepdim=True)
    joined = {anchor: [] for anchor in anchors}
    for other in (i for i in pool if i not in anchors):
        joined[max(anchors, key=lambda a: (unit[other] @ unit[a]).item())].append(other)
    for anchor, members in joined.items():
        tokens[anchor] = features[anchor] + (features[members].mean(0) if members else 0)
    return sorted(tokens.items())


@torch.no_grad()
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_stage_1_equals_the_literal_algorithm_in_place(model, variant):
    packed = run_tower(model, GRIDS)
    maps, keys = literal_maps(model, host_run(model, GRIDS)[1], 3, GRIDS)
    config = DuetConfig(dominant=3, contextual=2, cluster_width=2, schedule={}, variant=variant)
    literal = literal_paper if variant == "paper" else literal_release
    features = torch.cat(packed.levels, -1)
    frame, start = 0, 0
    for (frames, rows, columns), picture in zip(GRIDS, reduce_pictures(packed, GRIDS, qwen.MERGE, config), strict=True):
        wanted, places, count = [], [], rows * columns // UNIT
        for number in range(frames):
            mine = features[start : start + count]
            reduced = (
                literal(mine, literal_signals(maps[frame], keys[frame]), 3, 2, 2) if count > 5 else enumerate(mine)
            )
            for place, token in reduced:
                wanted.append(token)
                places.append(place + number * count)
            frame, start = frame + 1, start + count
        assert picture.index.tolist() == places
        assert torch.allclose(torch.cat(picture.levels, -1), torch.stack(wanted), atol=1e-5)


@torch.no_grad()
def test_pictures_do_not_look_at_each_other(model):
    config = DuetConfig(dominant=3, contextual=2, schedule={})
    together = reduce_pictures(run_tower(model, GRIDS), GRIDS, qwen.MERGE, config)
    for grid, mine in zip(GRIDS, together, strict=True):
        alone = reduce_pictures(run_tower(model, [grid]), [grid], qwen.MERGE, config)[0]
        assert torch.equal(alone.index, mine.index)
        assert torch.allclose(torch.cat(alone.levels), torch.cat(mine.levels), atol=1e-5)


@torch.no_grad()
def test_long_videos_are_reduced_a_few_frames_at_a_time(model, monkeypatch):
    config = DuetConfig(dominant=3, contextual=2, schedule={})
    packed = run_tower(model, GRIDS)
    at_once = reduce_pictures(packed, GRIDS, qwen.MERGE, config)
    monkeypatch.setattr("duet.families.qwen_tower._PATCHES_AT_ONCE", 60)
    for mine, theirs in zip(reduce_pictures(packed, GRIDS, qwen.MERGE, config), at_once, strict=True):
        assert torch.equal(mine.index, theirs.index)
        assert torch.equal(torch.cat(mine.levels), torch.cat(theirs.levels))


def peak_of_stage_1(model, grids, config):
    packed = run_tower(model, grids)
    return peak_memory(lambda: reduce_pictures(packed, grids, qwen.MERGE, config), torch.device("cpu")).tracked


@torch.no_grad()
def test_stage_1_needs_no_map_and_as_much_for_many_frames_as_for_few():
    model, config = qwen.build("qwen2_5_vl"), DuetConfig(dominant=100, contextual=20, schedule={})
    whole_map = 2 * 2304**2 * 4  # bytes of 2 heads
    assert peak_of_stage_1(model, [(1, 48, 48)], config) < whole_map / 2
    few, many = (peak_of_stage_1(model, [(frames, 48, 48)], config) for frames in (3, 6))
    assert many < 1.25 * few


@torch.no_grad()
def test_a_budget_per_picture_is_shared_by_its_frames(model):
    config = DuetConfig(dominant=10, contextual=4, schedule={}, per="picture")
    image, video, small, _ = reduce_pictures(run_tower(model, GRIDS), GRIDS, qwen.MERGE, config)
    assert (len(image.index), len(small.index)) == (14, 6)
    frames = [sum(12 * f <= i < 12 * (f + 1) for i in video.index.tolist()) for f in range(3)]
    assert frames == [4 + 2, 3 + 1, 3 + 1]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_kept_tokens_keep_their_rotary_positions(model, family, side):
    inputs = qwen.mixed_batch(family, side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pictures = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    positions, _ = model.model.get_rope_index(ids, attention_mask=mask, **extra_positions(inputs))
    with duet.attach(model, DuetConfig(dominant=4, contextual=2, schedule={})):
        found = FAMILIES.get(family).pictures(model, pictures)
        kept = {p.kind: p.encode(None) for p in found}
        prompt, _ = read_pictures(model, Prompt(model.get_input_embeddings()(ids), mask), ids, pictures, None, None)
    keep = mask.bool() & (ids != qwen.IMAGE) & (ids != qwen.VIDEO)
    for entry in found:
        marks, start = ids == entry.token_id, 0
        flags = torch.zeros(int(marks.sum()), dtype=torch.bool)
        offsets = iter(kept[entry.kind].offsets.split(kept[entry.kind].counts))
        for expected in entry.expected:
            flags[start + next(offsets)] = True
            start += expected
        keep[marks] = flags
    for row in range(len(ids)):
        assert torch.equal(prompt.position_ids[-3:, row, prompt.attention_mask[row]], positions[:, row, keep[row]])


def extra_positions(inputs):
    names = ("image_grid_thw", "video_grid_thw", "mm_token_type_ids", "second_per_grid_ts")
    return {name: inputs[name] for name in names if name in inputs}


@torch.no_grad()
def test_deepstack_features_follow_the_tokens_that_are_left():
    """The decoder by hand: features of kept tokens only are added, at their places, after layers 0 and 1."""
    model, single = qwen.build("qwen3_vl"), qwen.mixed_singles("qwen3_vl")[4]
    config = DuetConfig(dominant=5, contextual=2, schedule={1: 0.5})
    with duet.attach(model, config):
        with duet.trace() as trace:
            mine = model(**single).logits
        prompt, _ = read_pictures(
            model, Prompt(model.get_input_embeddings()(single["input_ids"]), single["attention_mask"]),
            single["input_ids"], {n: v for n, v in single.items() if "ids" not in n or "mm" in n}, None, None,
        )  # fmt: skip
    text, hidden = model.model.language_model, prompt.inputs_embeds
    visual = prompt.visual_mask[0].nonzero()[:, 0]
    assert prompt.additions[0][0, ~prompt.visual_mask[0]].abs().max() == 0
    assert (prompt.additions[0][0, visual].abs().amax(-1) > 0).all()

    def layer(index, hidden, positions):
        length = hidden.shape[1]
        causal = torch.full((length, length), float("-inf")).triu(1)[None, None]
        return text.layers[index](
            hidden, attention_mask=causal, position_embeddings=text.rotary_emb(hidden, positions), position_ids=None
        )

    positions = prompt.position_ids[-3:]
    hidden = layer(0, hidden, positions) + prompt.additions[0]
    alive = torch.ones(hidden.shape[1], dtype=torch.bool)
    alive[visual] = False
    start = 0
    for image in trace.images:
        alive[visual[start + torch.tensor(image.kept_after[1])]] = True
        start += len(image.source)
    assert start == len(visual) and alive[visual].sum() == len(visual) // 2
    hidden, positions = hidden[:, alive], positions[:, :, alive]
    hidden = layer(1, hidden, positions) + prompt.additions[1][:, alive]
    for index in (2, 3):
        hidden = layer(index, hidden, positions)
    assert torch.allclose(model.lm_head(text.norm(hidden)), mine, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", VISION_REDUCERS.names())
def test_every_vision_reducer_works_or_says_what_does(model, family, name):
    config = DuetConfig(dominant=4, contextual=0, schedule={2: 0.5}, stage1=name)
    try:
        handle = duet.attach(model, config)
    except ValueError as error:
        assert f"stage1='{name}' does not work with model_type '{family}'" in str(error)
        assert "local_cluster" in str(error)
        return
    with handle, duet.trace() as trace:
        logits = model(**qwen.mixed_batch(family)).logits
        for row in (0, 4):
            alone = model(**qwen.mixed_singles(family)[row]).logits[0]
            assert torch.allclose(logits[row, -len(alone) :], alone, atol=1e-5)
    assert logits.isfinite().all()
    entering = trace.passes[0][0].visual
    if not config.adaptive:
        assert entering == [4, 0, 8, 12, 16]
    assert 0 < entering[0] < 24 and entering[1] == 0


@torch.no_grad()
def test_pooling_takes_the_largest_grid_of_cells_within_the_budget(model, family):
    with duet.attach(model, DuetConfig(dominant=11, contextual=0, schedule={}, stage1="average_pool")):
        counts = FAMILIES.get(family).pictures(model, {
            "pixel_values": qwen.pixels([(1, 8, 12), (1, 10, 6)]),
            "image_grid_thw": torch.tensor([(1, 8, 12), (1, 10, 6)]),
        })[0].encode(None).counts  # fmt: skip
    assert counts == [10, 10]  # 2 x 5 cells of 4 x 6 units, 5 x 2 of 5 x 3


@torch.no_grad()
def test_the_trace_tells_the_fate_of_every_unit_in_the_order_of_the_prompt(model, family):
    inputs = qwen.mixed_batch(family)
    with duet.attach(model, DuetConfig(dominant=4, contextual=2, schedule={2: 0.5})), duet.trace() as trace:
        model(**inputs)
    grids = [image.grid for image in trace.images]
    clip, one, small, tall = (3, 4), (4, 6), (2, 3), (5, 3)
    assert grids == [one, small, tall, *[clip] * 6, tall]
    for image in trace.images:
        assert image.source == sorted(image.source)
        assert 2 in image.kept_after
        fate = image.fate()
        assert len(fate) == image.grid[0] * image.grid[1]
        whole = image.grid == small
        assert ("dropped in stage 1" in fate) != whole
        assert any("merged into token" in line for line in fate) != whole


@torch.no_grad()
def test_the_trace_counts_frames_that_stage_1_left_whole(model, family):
    with duet.attach(model, DuetConfig(dominant=11, contextual=1, schedule={})), duet.trace(images=False) as trace:
        model(**qwen.mixed_batch(family))
    assert (trace.tower_passes, trace.whole_passes) == (10, 7)  # 12 units of every video frame and 6 of an image fit


def test_a_share_of_a_single_unit_keeps_it(model):
    config = DuetConfig(dominant=0.1, contextual=0.0, schedule={})
    assert [len(p.index) for p in reduce_pictures(run_tower(model, GRIDS), GRIDS, qwen.MERGE, config)] == [2, 3, 1, 1]
    assert replace(config, dominant=1.0).keeps_every_patch(17)
