"""The reduced decoder: batches, padding, caches, positions, query rows, training."""

import pytest
import small
import torch

import duet
from duet import DuetConfig, run_decoder
from duet.cache import DuetCache
from duet.families import reduced
from duet.queries import query_rows, surviving_rows
from duet.versions import CACHE, cache_of

BASE = dict(dominant=10, contextual=3, cluster_width=3, schedule={2: 0.5, 4: 0.25}, stage1="local_cluster")
VARIANTS = {
    "last": {},
    "all": {"queries": "all"},
    "salient": {"queries": "salient", "salient_tokens": 3},
    "given": {"queries": (0, -2)},
    "original": {"positions": "original"},
    "patch": {"positions": "patch"},
    "release": {"variant": "release", "queries": "all"},
    "visionzip": {"stage1": "visionzip"},
    "stage 2 only": {"stage1": "none", "schedule": {1: 0.5, 3: 0.1, 5: 0.0}},
    "stage 1 only": {"schedule": {}},
    "drop all": {"schedule": {2: 0.5, 4: 0.0}},
}
TOLERANCE = 1e-5


def config(name):
    return DuetConfig(**(BASE | VARIANTS[name]))


@pytest.fixture(scope="module")
def model():
    return small.build()


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixed_batch_equals_single_runs(model, name, side):
    with duet.attach(model, config(name)):
        batch = model(**small.mixed_batch(side), use_cache=False)
        for row, inputs in enumerate(small.mixed_singles()):
            alone = model(**inputs, use_cache=False).logits[0]
            together = batch.logits[row]
            together = together[-len(alone) :] if side == "left" else together[: len(alone)]
            assert (alone - together).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_generation_equals_recomputation(model, name):
    inputs = small.mixed_batch("left")
    with duet.attach(model, config(name)):
        kwargs = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        cached = model.generate(**inputs, use_cache=True, **kwargs)
        again = model.generate(**inputs, use_cache=False, **kwargs)
        assert isinstance(cache_of(cached), DuetCache)
        assert torch.equal(cached.sequences, again.sequences)
        for a, b in zip(cached.logits, again.logits, strict=True):
            assert (a - b).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["last", "original"])
def test_beams_and_samples_equal_recomputation(model, name, mode):
    inputs = small.mixed_batch("left")
    with duet.attach(model, config(name)):
        torch.manual_seed(1)
        cached = model.generate(**inputs, max_new_tokens=5, use_cache=True, **mode)
        torch.manual_seed(1)
        again = model.generate(**inputs, max_new_tokens=5, use_cache=False, **mode)
    assert torch.equal(cached, again)


@torch.no_grad()
def test_layers_hold_what_the_schedule_says(model):
    with duet.attach(model, config("drop all")):
        inputs = small.mixed_singles()[0]
        out = model(**inputs, use_cache=True)
    text = inputs["input_ids"].shape[1] - small.PATCHES
    held = [cache_of(out).get_seq_length(layer) - text for layer in range(small.LAYERS)]
    assert held == config("drop all").tokens_per_layer(small.PATCHES, small.LAYERS) == [13, 13, 6, 6, 0, 0]
    assert cache_of(out).get_seq_length() == inputs["input_ids"].shape[1]
    assert out.logits.shape[1] == text


@torch.no_grad()
def test_a_second_turn_on_the_same_cache_equals_one_forward(model):
    inputs = small.mixed_singles()[0]
    ids = inputs["input_ids"]
    turn = torch.tensor([[5, 6, 7, 8]])
    with duet.attach(model, config("last")):
        first = model(**inputs, use_cache=True)
        second = model(input_ids=turn, **{CACHE: cache_of(first)}, use_cache=True)
        whole = model(
            input_ids=torch.cat((ids, turn), 1), pixel_values=inputs["pixel_values"], prompt_length=ids.shape[1]
        )
    assert (second.logits[:, -1] - whole.logits[:, -1]).abs().max() <= TOLERANCE


def test_caches_that_cannot_hold_a_reduction_are_refused(model):
    from transformers import DynamicCache

    inputs = small.mixed_singles()[0]
    full = DynamicCache(config=model.config.text_config)
    model(**inputs, **{CACHE: full}, use_cache=True)
    with duet.attach(model, config("last")):
        with pytest.raises(ValueError, match="already holds positions"):
            model(**inputs, **{CACHE: full}, use_cache=True)
        with pytest.raises(ValueError, match="output_attentions"):
            model(**inputs, output_attentions=True)


def test_patches_and_text_keep_the_numbers_of_the_whole_prompt(model, monkeypatch):
    ids, mask = small.pad([small.prompt(2, 2, 3, 3), small.prompt(3, 0, 4, 2)], "left")
    entered = {}

    def spy(*args, **kwargs):
        entered.update(kwargs)
        return run_decoder(*args, **kwargs)

    monkeypatch.setattr(reduced, "run_decoder", spy)
    with duet.attach(model, config("patch")), duet.trace() as trace:
        model(input_ids=ids, attention_mask=mask, pixel_values=small.pixels(2))
    valid, visual = entered["attention_mask"][0], entered["visual_mask"][0]
    positions = entered["position_ids"][0][valid]
    first, second = (torch.tensor(image.source) for image in trace.images)
    assert torch.equal(positions[visual[valid]], torch.cat([3 + first, 3 + small.PATCHES + 1 + second]))
    assert entered["next_position"].tolist() == [int(positions.max()) + 1, 8] == mask.sum(1).tolist()


@pytest.mark.parametrize("counts", [(1, 35), (37, 1), (2, 36)])
def test_placeholders_that_do_not_match_the_images(model, counts):
    images, placeholders = counts
    ids = torch.tensor([[1] + [small.IMAGE_TOKEN] * placeholders + [4, 5]])
    with duet.attach(model, config("last")), pytest.raises(ValueError, match="placeholder"):
        model(input_ids=ids, pixel_values=small.pixels(images + (placeholders == 37)))


def training_batch():
    inputs = small.mixed_batch("right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = ids.masked_fill(~mask, -100)
    for row, length in enumerate(mask.sum(1).tolist()):
        labels[row, : length - 3] = -100
    return inputs | {"labels": labels}


@pytest.mark.parametrize("name", VARIANTS)
def test_training_loss_equals_the_shorter_sequences_and_gradients_flow(name):
    model = small.build().train()
    model.model.vision_tower.requires_grad_(False)
    batch = training_batch()
    with duet.attach(model, config(name)):
        loss = model(**batch, use_cache=False).loss
        losses = []
        for row, inputs in enumerate(small.mixed_singles()):
            size = inputs["input_ids"].shape[1]
            losses.append(model(**inputs, labels=batch["labels"][row : row + 1, :size], use_cache=False).loss)
        loss.backward()
    assert torch.allclose(loss, torch.stack(losses).mean(), atol=1e-5)  # three labels in every sample
    for parameter in model.model.multi_modal_projector.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0
    for parameter in model.model.language_model.layers.parameters():
        assert parameter.grad.isfinite().all()


def test_a_trainable_tower_gets_gradients():
    model = small.build().train()
    with duet.attach(model, config("last")):
        model(**training_batch(), use_cache=False).loss.backward()
    block = model.model.vision_tower.encoder.layers[0] if hasattr(model.model.vision_tower, "encoder") else None
    weight = block.mlp.fc1.weight if block is not None else next(model.model.vision_tower.parameters())
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(reentrant):
    results = []
    for checkpointing in (False, True):
        model = small.build().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with duet.attach(model, config("all")):
            loss = model(**training_batch(), use_cache=False).loss
            loss.backward()
        results.append((loss, model.model.language_model.layers[3].mlp.up_proj.weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_training_and_inference_choose_the_same_rows_for_the_same_prompt(model):
    inputs = small.mixed_singles()[0]
    ids = inputs["input_ids"]
    labels = ids.clone()
    labels[:, : ids.shape[1] - 1] = -100
    with duet.attach(model, config("last")), torch.no_grad():
        with duet.trace() as training:
            model(**inputs, labels=labels)
        with duet.trace() as inference:
            model(input_ids=ids[:, :-1], pixel_values=inputs["pixel_values"])
    assert training.images[0].kept_after == inference.images[0].kept_after


def test_trainer_trains_an_attached_model(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = small.build()
    batch = training_batch()
    with duet.attach(model, config("last")):
        arguments = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, per_device_train_batch_size=1)
        trainer = Trainer(model, arguments, train_dataset=[0, 1], data_collator=lambda _: batch)
        result = trainer.train()
    assert result.training_loss > 0 and result.global_step == 2


# --- which rows rank -------------------------------------------------------------------------------------------------


def rows(text, queries, answers=None, valid=None):
    """``text``: one letter per position, i = image, t = text, p = padding; returns the ranking positions."""
    visual = torch.tensor([[c == "i" for c in text]])
    mask = torch.tensor([[c != "p" for c in text]])
    marks = None if answers is None else torch.tensor([[c == "a" for c in answers]])
    return query_rows(None if mask.all() else mask, visual, marks, queries)[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("text", "queries", "answers", "wanted"),
    [
        ("ttiittt", "last", None, [6]),
        ("ppttiit", "last", None, [6]),
        ("ttiittpp", "last", None, [5]),
        ("ttiittt", "all", None, [4, 5, 6]),
        ("ttiittiit", "all", None, [4, 5, 8]),
        ("ttiittttt", "last", "-----a-a-", [4, 6]),  # the token before each answer
        ("ttiittttt", "all", "-----a-a-", [4, 6, 8]),  # every text token that is no answer
        ("tiitt", "all", "---aa", [2]),  # plain caption: the position before the first label, the last image token
        ("tiitt", "last", "---aa", [2]),
        ("tttii", "last", None, [4]),
        ("tttii", "all", None, [4]),  # nothing after the image: the last prompt position
        ("tttt", "last", None, [3]),
    ],
)
def test_query_rows(text, queries, answers, wanted):
    assert rows(text, queries, answers) == wanted


@torch.no_grad()
def test_a_row_that_is_dropped_hands_over_to_the_token_before_it(model):
    """A caption: nothing but answers after the image, so its last token ranks, and a later stage finds it gone."""
    decoder = model.model.language_model
    embeds = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(3))
    visual = torch.zeros(1, 30, dtype=torch.bool)
    visual[:, 2:26] = True
    labels = torch.full((1, 30), -100)
    labels[:, 26:] = 5
    seen = []

    def drop_the_last(stage, settings):
        seen.append(stage.state.queries[0].nonzero()[:, 0].tolist())
        assert torch.equal(stage.state.queries, stage.state.text)
        return -torch.arange(stage.state.visual.shape[1], dtype=torch.float)[None]

    settings = DuetConfig(stage1="none", schedule={1: 0.5, 2: 0.25, 3: 0.0})
    run_decoder(decoder, embeds, visual_mask=visual, labels=labels, config=settings, reducer=drop_the_last)
    assert seen == [[25], [13]]  # the last of 24 visual tokens, then the last of the 12 that are left
    rows = torch.tensor([[False, True, True], [True, False, False]])
    origin = torch.tensor([[0, 3, 5], [0, 1, 2]])
    left, none = torch.tensor([[False, False], [True, False]]), torch.zeros(2, 2, dtype=torch.bool)
    assert surviving_rows(rows, origin, left, torch.tensor([[0, 4], [0, 2]]), None).tolist() == [
        [False, True],
        [True, False],
    ]
    valid = torch.tensor([[True, False], [True, True]])
    assert surviving_rows(rows, origin, none, origin[:, :2], valid).tolist() == [[True, False], [True, False]]


def test_labels_of_a_pass_that_goes_on_from_a_reduced_cache_give_its_loss(model):
    inputs = small.mixed_singles()[0]
    turn = torch.tensor([[5, 6, 7, 8]])
    with duet.attach(model, config("last")), torch.no_grad():
        first = model(**inputs, use_cache=True)
        second = model(input_ids=turn, **{CACHE: cache_of(first)}, use_cache=True, labels=turn)
    expected = torch.nn.functional.cross_entropy(second.logits[0, :-1], turn[0, 1:])
    assert second.loss == pytest.approx(float(expected), abs=1e-5)


def test_a_reduced_cache_is_not_used_again(model):
    inputs = small.mixed_singles()[0]
    with duet.attach(model, config("last")), torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
    with pytest.raises(NotImplementedError, match="begin with a new one"):
        cache.reset()
