"""Stage 1, stage 2 and their combination give the numbers of the public implementations (tests/golden/README.md)."""

import pytest
import torch
from golden_llava import batch_of, build, case, expand, pixels

import duet
from duet import DuetConfig
from duet.stage2 import LANGUAGE_REDUCERS
from duet.vision import encode_vision

TOLERANCE = 1e-4
RELEASE = {"variant": "release", "queries": "all"}


def pdrop(layers, ratios, **kw):
    return DuetConfig(stage1="none", schedule=dict(zip(layers, ratios, strict=True)), queries="last", **kw)


@pytest.fixture(scope="module")
def model():
    return build()


def single(tensors, image):
    ids, _ = expand(tensors["input_ids"][0])
    return {"input_ids": ids[None], "pixel_values": pixels(image)[None]}


def check_logits(out, tensors, prefix=""):
    logits = out.logits
    if f"{prefix}logits_v64" in tensors:
        assert (logits[..., :64] - tensors[f"{prefix}logits_v64"]).abs().max() <= TOLERANCE
    assert (logits.logsumexp(-1) - tensors[f"{prefix}logits_lse"]).abs().max() <= TOLERANCE
    assert (logits[:, -1] - tensors[f"{prefix}logits_last"]).abs().max() <= TOLERANCE
    assert torch.equal(logits.argmax(-1), tensors[f"{prefix}logits_argmax"])


def check_greedy(model, inputs, tensors, prefix=""):
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=2)
    new, wanted = out[0, inputs["input_ids"].shape[1] :], tensors[f"{prefix}greedy_ids"][0]
    sure = (tensors[f"{prefix}greedy_gap"] < TOLERANCE).nonzero()
    until = int(sure[0]) if len(sure) else len(wanted)
    assert new.tolist()[:until] == wanted.tolist()[:until]


def check_kept(record, tensors, prefix):
    layers = sorted(record.kept_after)
    assert layers
    for stage, layer in enumerate(layers):
        assert record.kept_after[layer] == tensors[f"{prefix}stage{stage}.kept_orig"].tolist(), f"stage {stage}"


@pytest.mark.parametrize("name", ["duet_stage1_300_7", "duet_stage1_170_35", "visionzip_54_10"])
@pytest.mark.parametrize("image", ["astronaut", "flower_tall"])
def test_released_stage1(model, name, image):
    tensors, info = case(name)
    stage1 = "visionzip" if name.startswith("visionzip") else "local_cluster"
    config = DuetConfig(
        dominant=info["dominant"], contextual=info["contextual"], stage1=stage1, variant="release", schedule={}
    )
    with torch.no_grad():
        reduced = encode_vision(model.model.vision_tower, pixels(image)[None], config=config)
    kept = (reduced.source[0, : info["dominant"]] + 1).tolist()
    assert kept == tensors[f"{image}.dominant_sorted"].tolist()
    anchors = (reduced.source[0, info["dominant"] :] + 1).tolist()
    assert anchors == tensors[f"{image}.anchor_positions"].tolist()
    sizes = (reduced.members[0] >= 0).sum(1) - 1
    assert sizes.tolist() == tensors[f"{image}.merge_counts"].tolist()
    merged = {int(p) + 1 for p in reduced.members[0].flatten().tolist() if p >= 0} - set(anchors)
    assert merged == set(tensors[f"{image}.merge_positions"].tolist())
    if f"{image}.tokens" in tensors:
        assert (reduced.tokens[0] - tensors[f"{image}.tokens"]).abs().max() <= TOLERANCE
    with duet.attach(model, config):
        inputs = single({"input_ids": tensors[f"{image}.input_ids"]}, image)
        with torch.no_grad():
            check_logits(model(**inputs), tensors, f"{image}.")
        check_greedy(model, inputs, tensors, f"{image}.")


@pytest.mark.parametrize(
    ("name", "image", "layers", "ratios"),
    [
        ("pdrop_L2_4_6_astronaut", "astronaut", [2, 4, 6], [0.5, 0.25, 0.125]),
        ("pdrop_L2_4_6_flower_tall", "flower_tall", [2, 4, 6], [0.5, 0.25, 0.125]),
        ("pdrop_L3_5_coffee", "coffee", [3, 5], [0.5, 0.25]),
    ],
)
def test_pyramid_drop(model, name, image, layers, ratios):
    tensors, _ = case(name)
    inputs = single(tensors, image)
    with duet.attach(model, pdrop(layers, ratios)), torch.no_grad():
        with duet.trace() as record:
            out = model(**inputs)
        check_kept(record.images[0], tensors, "last.s0.")
        check_logits(out, tensors, "last.")
        check_greedy(model, inputs, tensors, "last.")


def test_text_only_passes_through(model):
    _, info = case("pdrop_L2_4_6_text_only")
    ids = torch.tensor(info["input_ids"]).view(1, -1)
    with duet.attach(model, pdrop([2, 4, 6], [0.5, 0.25, 0.125])):
        out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=2)
    assert out[0, ids.shape[1] :].tolist() == info["greedy_ids"]


@pytest.mark.parametrize(
    ("name", "image", "layers", "stage1"),
    [
        ("duet_300_7_L4_6_flower_tall", "flower_tall", {4: 0.5, 6: 0.0}, (300, 7)),
        ("duet_170_35_L2_4_6_astronaut", "astronaut", {2: 0.75, 4: 0.5, 6: 0.25}, (170, 35)),
    ],
)
@pytest.mark.parametrize("mode", ["all_text", "last", "salient"])
def test_released_duet(model, name, image, layers, stage1, mode):
    tensors, info = case(name)
    dominant, contextual = stage1
    queries = "last" if mode == "last" else "all"
    config = DuetConfig(dominant=dominant, contextual=contextual, schedule=layers, variant="release", queries=queries)
    inputs = single(tensors, image)
    extra = {}
    if mode == "salient":
        idxs = torch.tensor(info["modes"]["salient"]["idxs"]).view(1, -1)
        extra["query_indices"] = idxs + (dominant + contextual) - 1
    with duet.attach(model, config), torch.no_grad():
        with duet.trace() as record:
            out = model(**inputs, **extra)
        check_kept(record.images[0], tensors, f"{mode}.s0.")
        check_logits(out, tensors, f"{mode}.")
        check_greedy(model, inputs | extra, tensors, f"{mode}.")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("pdrop_L2_4_6_eval_batch", pdrop([2, 4, 6], [0.5, 0.25, 0.125])),
        ("duet_300_7_L4_6_eval_batch", DuetConfig(schedule={4: 0.5, 6: 0.0}, **RELEASE)),
    ],
)
def test_eval_batch(model, name, config):
    tensors, info = case(name)
    inputs = batch_of(tensors, info["images"])
    with duet.attach(model, config), torch.no_grad(), duet.trace() as record:
        out = model(**inputs)
    for index, image in enumerate(record.images):
        check_kept(image, tensors, f"s{index}.")
    for row, length in enumerate(tensors["valid_len"].tolist()):
        assert (out.logits[row, length - 1] - tensors["logits_last"][row]).abs().max() <= TOLERANCE
        lse = out.logits[row, :length].logsumexp(-1)
        assert (lse - tensors["logits_lse"][row, :length]).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("pdrop_L2_4_6_train_batch", pdrop([2, 4, 6], [0.5, 0.25, 0.125])),
        ("pdrop_L2_4_6_train_plain", pdrop([2, 4, 6], [0.5, 0.25, 0.125])),
        ("duet_300_7_L4_6_train_batch", DuetConfig(schedule={4: 0.5, 6: 0.0}, **RELEASE)),
        ("duet_170_35_L2_4_6_train_batch",
         DuetConfig(dominant=170, contextual=35, schedule={2: 0.75, 4: 0.5, 6: 0.25}, **RELEASE)),
        ("duet_300_7_L4_6_train_salient", DuetConfig(schedule={4: 0.5, 6: 0.0}, **RELEASE)),
    ],
)  # fmt: skip
def test_training(name, config, monkeypatch):
    tensors, info = case(name)
    if "salient" in name:
        break_tie_as_stored(monkeypatch, sample=1, position=66, kept=tensors["s1.stage0.kept_orig"])
    images = info["images"] if "images" in info else [image for _, image in info["samples"]]
    inputs = batch_of(tensors, images)
    model = build().train()
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    if "salient" in name:
        inputs["query_indices"] = released_training_rows(tensors, inputs, config.entering)
    with duet.attach(model, config):
        with duet.trace() as record:
            out = model(**inputs)
        out.loss.backward()
    for index, image in enumerate(record.images):
        check_kept(image, tensors, f"s{index}.")
    assert abs(out.loss.item() - info["loss"]) <= TOLERANCE
    projector = model.model.multi_modal_projector
    assert (projector.linear_1.weight.grad - tensors["projector_0_weight_grad"]).abs().max() <= TOLERANCE
    assert (projector.linear_2.weight.grad - tensors["projector_2_weight_grad"]).abs().max() <= TOLERANCE
    norm = torch.stack([p.grad.norm() for p in projector.parameters()]).norm().item()
    assert abs(norm - info["grad_norm_mm_projector"]) <= 1e-3
    for layer, wanted in info["q_proj_grad_norm_per_layer"].items():
        got = model.model.language_model.layers[int(layer)].self_attn.q_proj.weight.grad.norm().item()
        assert abs(got - wanted) <= 1e-3


def break_tie_as_stored(monkeypatch, sample, position, kept):
    """Two tokens of this sample tie in the last bit of fp32, and the loss depends on which of them stays."""
    score = LANGUAGE_REDUCERS.get("text_guided")

    def nudged(stage, config):
        out = score(stage, config).clone()
        out[sample, position + kept] += 2e-8  # scores agree to about 1e-8
        return out

    monkeypatch.setitem(LANGUAGE_REDUCERS._entries, "text_guided", nudged)


def released_training_rows(tensors, inputs, entering):
    """The release keeps, of the given rows, those after the image that carry no label."""
    rows = []
    for b in range(len(tensors["idxs"])):
        ids, labels = tensors["input_ids"][b], tensors["labels"][b]
        image = (ids == -200).nonzero()
        if not len(image):
            rows.append([])
            continue
        start = int(image[0])
        chosen = [int(i) for i in tensors["idxs"][b].tolist() if i == i and i > start]
        rows.append([i + entering - 1 for i in chosen if labels[i] == -100])
    width = max(len(r) for r in rows)
    return torch.tensor([r + [-1] * (width - len(r)) for r in rows])


def test_a_missing_golden_case_fails():
    with pytest.raises(FileNotFoundError):
        case("no_such_case")
