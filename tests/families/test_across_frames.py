"""Stage 1 across frames: a literal twin, what merges and what stays, families, trace, gradients, bad input."""

from dataclasses import replace
from typing import Any

import pytest
import qwen_models as qwen
import torch
from models import CASES, IMAGE
from torch.nn.functional import cosine_similarity

import duet
from duet import DuetConfig, long_video_bench, over_time
from duet.families.prompt import Prompt, insert
from duet.over_time import forerunners, merge_over_time
from duet.probe import peak_memory
from duet.stage1 import CLASS_TOKEN, CONTEXTUAL, DOMINANT, VisionReduction
from duet.tokens import Counts

GRID = (3, 4)
CLIPS = ("video_llava", "llava_onevision", "llava_next_video")
VIDEO_CASES = {family: CASES[family] for family in CLIPS} | qwen.CASES
CONFIG = DuetConfig(dominant=4, contextual=2, cluster_width=3, schedule={1: 0.5, 3: 0.0}, across_frames=0.5)


def frame_of(sources, tokens, kind=DOMINANT, members=()):
    members = torch.tensor([members], dtype=torch.long) if members else torch.empty(1, 0, 0, dtype=torch.long)
    kinds = torch.full((len(sources),), kind)
    kinds[torch.tensor(sources) < 0] = CLASS_TOKEN
    kinds[len(sources) - members.shape[1] :] = CONTEXTUAL
    return VisionReduction(tokens[None], torch.tensor([sources]), kinds, members, GRID)


def random_video(frames=9, class_token=True, seed=0):
    """Frames with three to six tokens at random places, whose values depend on the place alone in every other one."""
    g = torch.Generator().manual_seed(seed)
    background = torch.randn(13, 8, generator=g)
    video = []
    for number in range(frames):
        sources = torch.randperm(12, generator=g)[: 3 + number % 3].tolist()
        sources = [-1, *sources] if class_token else sources
        noise = torch.randn(len(sources), 8, generator=g)
        video.append(frame_of(sources, background[sources] + noise * (0.1 if number % 2 else 1.0)))
    return video


def literal(frames, count):
    """Groups of (frame, token), one for each token that stays, as the docstring says it, in plain loops."""
    rows, columns = GRID
    spot = lambda patch: (-rows - columns, 0) if patch < 0 else divmod(patch, columns)  # noqa: E731
    last, before, alike = {}, {}, {}
    for f, frame in enumerate(frames):
        found = {}
        for k, patch in enumerate(frame.source[0].tolist()):
            found[patch] = (f, k)
            apart = lambda place: max(abs(a - b) for a, b in zip(spot(place), spot(patch), strict=True))  # noqa: B023, E731
            seen = sorted(last, key=lambda place: (apart(place), place % (rows * columns + 1)))
            if not seen:
                alike[f, k] = -1.0
                continue
            before[f, k] = last[seen[0]]
            other = frames[before[f, k][0]].tokens[0, before[f, k][1]]
            cosine = cosine_similarity(frame.tokens[0, k], other, dim=0).clamp(min=0)
            alike[f, k] = float(cosine / (1 + apart(seen[0])))
        last |= found
    kept = sorted(sorted(alike, key=lambda token: alike[token])[:count])
    groups = {token: [] for token in kept}
    for token in alike:
        into = token
        while into not in groups:
            into = before[into]
        groups[into].append(token)
    return groups


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("keep", [7, 12, 25, 0.3, 0.9, 1000])
def test_merging_equals_a_literal_twin(keep, class_token, monkeypatch):
    frames = random_video(class_token=class_token, seed=int(10 * keep))
    total = sum(frame.source.shape[1] for frame in frames)
    merged = merge_over_time(frames, keep)
    count = merged.tokens.shape[1]
    assert count == (round(keep * total) if isinstance(keep, float) else min(keep, total))
    groups = literal(frames, count)
    wanted = torch.stack([torch.stack([frames[f].tokens[0, k] for f, k in group]).mean(0) for group in groups.values()])
    assert torch.allclose(merged.tokens[0], wanted, atol=1e-6)
    patches = [(f, int(frames[f].source[0, k])) for f, k in groups]
    assert merged.source[0].tolist() == [f * 12 + patch if patch >= 0 else -1 for f, patch in patches]
    kinds = [CLASS_TOKEN if patch < 0 else DOMINANT for _, patch in patches]
    sizes = map(len, groups.values())
    kinds = [CONTEXTUAL if size > 1 and kind == DOMINANT else kind for kind, size in zip(kinds, sizes, strict=True)]
    assert merged.kind.tolist() == kinds
    assert (merged.grid, merged.passes) == ((27, 4), 9)
    monkeypatch.setattr(over_time, "_ENTRIES_AT_ONCE", 30)  # in many small parts
    assert torch.equal(merge_over_time(frames, keep).tokens, merged.tokens)


def test_a_still_background_counts_once_and_what_moves_stays_new():
    g = torch.Generator().manual_seed(1)
    background, thing = torch.randn(12, 32, generator=g).abs(), -torch.randn(32, generator=g).abs()
    frames = []
    for number in range(4):  # the thing crosses the second row, one patch a frame
        tokens = background.clone()
        tokens[4 + number] = thing
        frames.append(frame_of(list(range(12)), tokens))
    with duet.trace():
        merged = merge_over_time(frames, 18)
    # All of the first frame, the thing's three later places, and the three places that it left.
    assert merged.source[0].tolist() == [*range(12), 12 + 4, 12 + 5, 24 + 5, 24 + 6, 36 + 6, 36 + 7]
    assert merged.members[0, 0].tolist() == [0, 12, 24, 36]
    assert torch.allclose(merged.tokens[0, :4], background[:4])
    assert torch.equal(merged.tokens[0, [4, 13, 15, 17]], thing.expand(4, -1))


def test_forerunners_take_the_lower_of_two_places_as_near():
    frame, place = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 2, 1, 6, 6])
    before, distance = forerunners(frame, place, 3, GRID)
    assert before.tolist() == [-1, -1, 0, 1, 3]
    assert distance[2:].tolist() == [1, 1, 0]


def test_equal_tokens_stay_in_the_order_of_time():
    frames = [frame_of([0, 1], torch.ones(2, 4)) for _ in range(4)]
    with duet.trace():
        merged = merge_over_time(frames, 3)
    assert merged.source[0].tolist() == [0, 1, 12]
    assert [[p for p in group if p >= 0] for group in merged.members[0].tolist()] == [[], [1, 13, 25, 37], [12, 24, 36]]


def test_averages_carry_what_their_tokens_averaged():
    first = frame_of([0, 5], torch.tensor([[1.0, 0.0], [0.0, 1.0]]), members=[[5, 6, -1]])
    second = frame_of([0, 5], torch.tensor([[3.0, 0.0], [0.0, 3.0]]), members=[[5, 9, 10]])
    with duet.trace():
        merged = merge_over_time([first, second], 2)
    assert torch.equal(merged.tokens[0], torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    assert merged.members[0].tolist() == [[0, 12, -1, -1, -1], [5, 6, 17, 21, 22]]
    assert merge_over_time([first, second], 2).members.numel() == 0  # nobody asked


def test_every_token_that_is_averaged_gets_a_gradient():
    frames = random_video()
    leaves = [frame.tokens.requires_grad_() for frame in frames]
    merge_over_time(frames, 12).tokens.square().sum().backward()
    assert all(leaf.grad.abs().sum(-1).min() > 0 for leaf in leaves)


def batch_and_singles(case, model):
    names = [name for name in case.samples if "video" in name] + ["text only"]
    samples = [case.samples[name] for name in names]
    return case.inputs(model, samples), [case.inputs(model, [sample]) for sample in samples]


@torch.no_grad()
@pytest.mark.parametrize("family", list(VIDEO_CASES))
@pytest.mark.parametrize(("stage1", "keep"), [("local_cluster", 0.5), ("local_cluster", 9), ("none", 15)])
def test_a_batch_equals_its_samples(family, stage1, keep):
    case = VIDEO_CASES[family]
    model = case.build()
    inputs, singles = batch_and_singles(case, model)
    changes = {"dominant": 4, "contextual": 2, "stage1": stage1, "across_frames": keep, "variant": "paper"}
    if stage1 == "none" and family == "video_llava":
        changes["across_frames"] = 40  # more than a frame's 36 patches
    with duet.attach(model, DuetConfig(cluster_width=3, schedule={1: 0.5, 3: 0.0}, **changes)), duet.trace() as record:
        logits = model(**inputs).logits
        for row, single in enumerate(singles):
            alone = model(**single).logits[0]
            assert (logits[row, -len(alone) :] - alone).abs().max() <= 1e-5
    visual = record.passes[0][0].visual
    assert visual[0] == {0.5: 9, 9: 9, 15: changes["across_frames"]}[keep] and visual[-1] == 0
    shown = sum(entry.grid[0] * entry.grid[1] for entry in record.images)
    assert shown == sum(len(entry.fate()) for entry in record.images)


@torch.no_grad()
@pytest.mark.parametrize("family", list(VIDEO_CASES))
def test_a_still_video_is_its_first_frame(family):
    case = VIDEO_CASES[family]
    model = case.build()
    inputs = case.inputs(model, [case.samples["video"]])
    pixels = inputs["pixel_values_videos"]
    if family in CLIPS:
        inputs["pixel_values_videos"] = pixels[:, :1].expand_as(pixels).contiguous()
    else:
        inputs["pixel_values_videos"] = pixels[: len(pixels) // 3].repeat(3, 1)
    config = DuetConfig(dominant=4, contextual=2, cluster_width=3, schedule={1: 0.5})
    with duet.attach(model, config), duet.trace() as record:
        [video] = duet.handle(model).family.pictures(model, inputs)
        frames = video.encode(None).tokens.view(3, 6, -1)
    with duet.attach(model, replace(config, across_frames=6)), duet.trace() as merged:
        model(**inputs)
        [video] = duet.handle(model).family.pictures(model, inputs)
        assert torch.allclose(video.encode(None).tokens, frames[0], atol=1e-5)
    image = merged.images[0]
    patches = record.images[0].grid[0] * record.images[0].grid[1]
    assert image.source == record.images[0].source
    for place, group in zip(image.source, image.members, strict=True):
        assert place in group and {member // patches for member in group} == {0, 1, 2}
    assert merged.passes[0][0].visual == [6] and len(image.fate()) == 3 * patches
    assert (merged.tower_passes, merged.whole_passes) == (6, 0)


@torch.no_grad()
@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_rotary_positions_are_those_of_the_tokens_that_stay(family):
    case = qwen.CASES[family]
    model = case.build()
    inputs = case.inputs(model, [case.samples["video"]])
    ids, marks = inputs["input_ids"], inputs["input_ids"] == qwen.VIDEO
    with duet.attach(model, DuetConfig(dominant=4, contextual=2, schedule={}, across_frames=9)) as handle:
        host: Any = handle.family
        [video] = host.pictures(model, inputs)
        with duet.trace() as record:
            encoded = video.encode(None)
        whole = Prompt(model.get_input_embeddings()(ids), inputs["attention_mask"])
        whole = host.place(model, ids, whole, inputs, None)
        whole = replace(whole, counts=Counts([ids.shape[1] - video.expected[0] + encoded.counts[0]], encoded.counts))
        shrunk = insert(whole, [(video, marks, encoded)], None)
    assert encoded.offsets is not None and encoded.offsets.tolist() == record.images[0].source == sorted(
        record.images[0].source
    )
    assert whole.position_ids is not None and shrunk.position_ids is not None and shrunk.visual_mask is not None
    wanted = whole.position_ids[:, 0, marks[0]][:, encoded.offsets]
    assert torch.equal(shrunk.position_ids[:, 0, shrunk.visual_mask[0]], wanted)
    assert torch.equal(shrunk.inputs_embeds[shrunk.visual_mask], encoded.tokens)


@torch.no_grad()
@pytest.mark.parametrize("family", qwen.FAMILIES)
@pytest.mark.parametrize("config", [CONFIG, DuetConfig(dominant=14, contextual=4, per="picture", schedule={2: 0.5})])
def test_a_packed_tower_takes_long_videos_in_steps(family, config, monkeypatch):
    case = qwen.CASES[family]
    model = case.build()
    inputs = case.batch(model)
    sizes = []
    model.model.visual.blocks[0].register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    with duet.attach(model, config):
        together = model(**inputs).logits
        calls = len(sizes)
        monkeypatch.setattr("duet.families.qwen_tower._PATCHES_AT_ONCE", 100)
        assert torch.allclose(model(**inputs).logits, together, atol=1e-5)
    assert calls == 2 and len(sizes) - calls > 4 and max(sizes[calls:]) <= 100  # no frame is larger
    sizes.clear()
    with duet.attach(model, DuetConfig.none()):
        model(**inputs)
    assert len(sizes) == 2  # whole pictures take the model's own way


def peak(case, model, family, frames, config):
    """Bytes that encoding a video of so many frames needs beyond weights and pixels."""
    inputs = case.inputs(model, [(2, [("video", frames if family in CLIPS else (frames, 6, 8))], 4)])
    with torch.no_grad(), duet.attach(model, config) as handle:
        host: Any = handle.family
        return peak_memory(lambda: host.pictures(model, inputs)[0].encode(None), torch.device("cpu")).tracked


@pytest.mark.parametrize("family", list(VIDEO_CASES))
def test_what_the_tower_needs_hardly_depends_on_the_number_of_frames(family, monkeypatch):
    monkeypatch.setattr("duet.families.qwen_tower._PATCHES_AT_ONCE", 16 * 48)
    case = VIDEO_CASES[family]
    model = case.build()
    config = DuetConfig(dominant=1, contextual=0, schedule={}, stage1="average_pool", across_frames=0.25)
    few, many = (peak(case, model, family, frames, config) for frames in (32, 128))
    assert many <= 1.25 * few


def test_the_bench_of_long_videos(capsys, tmp_path):
    arguments = (
        "--frames 64 256 --dominant 2 --contextual 0 --image_size 84 --tower_width 64 --tower_layers 2 --width 128 "
        "--layers 2 --rounds 1 --device cpu --markdown"
    )
    assert long_video_bench.main([*arguments.split(), str(tmp_path / "report.md")]) == 0
    report = (tmp_path / "report.md").read_text()
    assert report.strip() in capsys.readouterr().out and "- torch: " in report
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")]
    assert [row[:3] for row in rows[2:]] == [
        ["all tokens", "16", "592"], ["reduced", "64", "128"], ["reduced", "256", "512"], ["merged, too", "64", "32"],
        ["merged, too", "256", "128"],
    ]  # fmt: skip
    assert all(int(row[-1].rstrip("%")) <= 100 for row in rows[2:])  # of the memory that 16 whole frames take


@pytest.mark.parametrize("family", list(VIDEO_CASES))
def test_training_on_videos(family):
    case = VIDEO_CASES[family]
    model = case.build().train()
    inputs = case.inputs(model, [case.samples["video"]])
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 20, -100)
    labels = labels.masked_fill(labels >= IMAGE, -100)
    with duet.attach(model, CONFIG):
        model(**inputs, labels=labels).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if any(part in name for part in case.projectors)]
    assert grads and all(grad is not None and grad.isfinite().all() for grad in grads)


@torch.no_grad()
@pytest.mark.parametrize("family", ["video_llava", "qwen2_5_vl"])
def test_generation_and_saved_configurations(family, tmp_path):
    case = VIDEO_CASES[family]
    model = case.build()
    inputs = case.inputs(model, [case.samples["video"]])
    with duet.attach(model, CONFIG) as handle:
        assert "merged over time to 50% of a video's tokens" in repr(handle)
        cached, plain = (
            model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False)
        )
        assert torch.equal(cached, plain)
        model.config.save_pretrained(tmp_path)
    stored = DuetConfig.from_model_config(type(model.config).from_pretrained(tmp_path))
    assert stored == CONFIG and CONFIG.across_frames == 0.5
    assert "across_frames" not in DuetConfig().to_dict()
    assert not DuetConfig(stage1="none", schedule={}, across_frames=0.5).is_noop(36)


def test_one_frame_has_nothing_to_merge():
    case = VIDEO_CASES["video_llava"]
    model = case.build()
    inputs = case.inputs(model, [(2, [("video", 1)], 4)])
    with torch.no_grad():
        plain = model(**inputs).logits
        with duet.attach(model, DuetConfig(stage1="none", schedule={}, across_frames=0.1)):
            assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("value", [0, -3, True, 0.0, 1.0, 1.5, float("nan"), "all"])
def test_values_that_are_no_count_and_no_share(value):
    with pytest.raises(ValueError, match=r"across_frames must be"):
        DuetConfig(across_frames=value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llava", {}, r"model_type 'llava' has no input for videos"),
        ("internvl", {}, r"model_type 'internvl' has no input for videos"),
        ("video_llava", {"across_frames": 5}, r"across_frames = 5 tokens cannot hold the first frame.*leaves 6"),
        ("qwen2_vl", {"across_frames": 5}, r"across_frames = 5 tokens cannot hold the first frame.*leaves 6"),
        ("video_llava", {"stage1": "tome"}, r"stage1='tome' changes pictures or tower blocks.*across_frames"),
    ],
)
def test_what_cannot_be_merged_over_time_says_so(family, changes, message):
    case = (CASES | qwen.CASES)[family]
    model = case.build()
    config = DuetConfig(**{"dominant": 4, "contextual": 2, "schedule": {}, "across_frames": 0.5} | changes)
    with pytest.raises(ValueError, match=message), duet.attach(model, config):
        model(**case.inputs(model, [case.samples["video"]]))
