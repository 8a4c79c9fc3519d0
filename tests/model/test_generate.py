"""Generation: batches equal single rows, padding sides, beams, no cache, with and without a reduction."""

import pytest
import torch
from model_helpers import IMAGE, golden_model, pad_batch, pixels, prompt
from transformers import StaticCache

from duet import DuetConfig
from duet.tokens import Counts
from duet.versions import cache_of

CONFIGS = {
    "full": None,
    "duet": DuetConfig(dominant=60, contextual=5, schedule={4: 0.5, 6: 0.0}),
    "release": DuetConfig(dominant=60, contextual=5, schedule={2: 0.5, 4: 0.25}, queries="all", variant="release"),
    "patch": DuetConfig(dominant=60, contextual=5, schedule={4: 0.5, 6: 0.0}, positions="patch"),
    "stage2": DuetConfig(stage1="none", schedule={4: 0.1}, queries="salient", positions="original"),
}
ROWS = [
    prompt([5, 9, 11], IMAGE, [13, 17, 19, 4]),
    prompt([21, 22, 23, 24, 25, 26]),
    prompt([31], IMAGE, [33, 34], IMAGE, [35, 36, 37]),
    prompt(IMAGE, [41, 42]),
]
PICTURES = [["coffee"], [], ["astronaut", "flower_tall"], ["flower_tall"]]
NEW = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return golden_model().eval()


def images(rows):
    names = [name for row in rows for name in PICTURES[row]]
    return torch.stack([pixels(name) for name in names]) if names else None


@pytest.fixture(scope="module")
def singles(model):
    cache = {}

    def get(name):
        if name not in cache:
            model.set_reduction(CONFIGS[name])
            cache[name] = [
                model.generate(torch.tensor([ROWS[row]]), images=images([row]), **NEW).tolist()[0] for row in range(4)
            ]
        return cache[name]

    return get


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_mixed_batch_equals_single_rows(model, singles, name, side):
    expected = singles(name)
    model.set_reduction(CONFIGS[name])
    ids, mask = pad_batch(ROWS, side)
    out = model.generate(ids, attention_mask=mask, images=images(range(4)), **NEW)
    assert out.tolist() == expected


def test_a_placeholder_picture_for_the_text_row_changes_nothing(model, singles):
    expected = singles("full")
    model.set_reduction(None)
    ids, mask = pad_batch(ROWS, "left")
    names = [name for row in PICTURES for name in (row or ["coffee"])]
    out = model.generate(input_ids=ids, attention_mask=mask, images=[pixels(name) for name in names], **NEW)
    assert out.tolist() == expected


@pytest.mark.parametrize("name", list(CONFIGS))
def test_without_a_cache_the_tokens_are_the_same(model, singles, name):
    expected = singles(name)
    model.set_reduction(CONFIGS[name])
    ids, mask = pad_batch(ROWS, "left")
    out = model.generate(ids, attention_mask=mask, images=images(range(4)), use_cache=False, **NEW)
    assert out.tolist() == expected


@pytest.mark.parametrize("name", list(CONFIGS))
def test_with_a_static_cache_the_tokens_are_the_same(model, singles, name):
    expected = singles(name)
    model.set_reduction(CONFIGS[name])
    ids, mask = pad_batch(ROWS, "left")
    out = model.generate(ids, attention_mask=mask, images=images(range(4)), cache_implementation="static", **NEW)
    assert out.tolist() == expected


@pytest.mark.parametrize("name", ["full", "duet"])
def test_one_graph_decodes_all_steps(model, name):
    model.set_reduction(CONFIGS[name])
    ids = torch.tensor([ROWS[0]])
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def prefilled():
        cache = StaticCache(config=model.config, max_cache_len=700)
        with torch.no_grad():
            return model(ids, images=images([0]), past_key_values=cache, use_cache=True)

    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend=count, fullgraph=True)
    first, second = prefilled(), prefilled()
    token = first.logits[:, -1:].argmax(-1)
    with torch.no_grad():
        for _ in range(4):
            stepped = compiled(token, past_key_values=first.past_key_values, use_cache=True)
            expected = model(token, past_key_values=second.past_key_values, use_cache=True)
            assert torch.allclose(stepped.logits, expected.logits, atol=1e-5)
            token = stepped.logits[:, -1:].argmax(-1)
    assert len(graphs) == 1


def test_what_the_splice_counted_is_not_counted_again(model, monkeypatch):
    model.set_reduction(CONFIGS["duet"])
    ids, mask = pad_batch(ROWS, "right")
    settings = [NEW, NEW | {"num_beams": 2}]
    expected = [model.generate(ids, attention_mask=mask, images=images(range(4)), **one).tolist() for one in settings]

    def refuse(*_):
        raise AssertionError("the decoder looked at the masks")

    monkeypatch.setattr(Counts, "read", refuse)
    for one, wanted in zip(settings, expected, strict=True):
        assert model.generate(ids, attention_mask=mask, images=images(range(4)), **one).tolist() == wanted


@pytest.mark.parametrize("name", ["full", "duet"])
def test_beams_and_sampling(model, name):
    model.set_reduction(CONFIGS[name])
    ids = torch.tensor([ROWS[0]])
    beams = model.generate(ids, images=images([0]), num_beams=3, **NEW)
    ids2, mask = pad_batch([ROWS[0], ROWS[1]], "right")
    both = model.generate(ids2, attention_mask=mask, images=images([0]), num_beams=3, **NEW)
    assert both[0].tolist() == beams[0].tolist()
    torch.manual_seed(0)
    sampled = model.generate(
        ids, images=images([0]), do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=4, num_return_sequences=2
    )
    assert sampled.shape[0] == 2 and sampled.shape[1] <= 4


def test_greedy_is_the_argmax_of_forward(model):
    model.set_reduction(CONFIGS["duet"])
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        first = model(input_ids=ids, images=images([0])).logits[:, -1].argmax(-1)
    assert model.generate(ids, images=images([0]), **NEW)[0, 0] == first


def test_text_only_forms(model):
    model.set_reduction(None)
    ids = torch.tensor([ROWS[1]])
    one = model.generate(ids, images=None, image_sizes=[], **NEW)
    two = model.generate(input_ids=ids, **NEW)
    padded, mask = pad_batch([ROWS[1], ROWS[1] + [27, 28]], "right", pad=99999)
    three = model.generate(padded, attention_mask=mask, **NEW)
    assert one.tolist() == two.tolist() == three[:1].tolist() and one.shape == (1, 5)


def test_refused_and_ignored_arguments(model):
    with pytest.raises(NotImplementedError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 2, 64))
    with pytest.raises(ValueError, match="needs a prompt"):
        model.generate(images=None)
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=torch.tensor([[1, 2]]), output_attentions=True)
    ids = torch.tensor([ROWS[1]])
    model.generate(ids, modalities=["image"], temperature=1.0, top_p=None, num_beams=1, **NEW)


def test_lmms_eval_calls(model):
    """The exact shapes of lmms-eval's calls: image_sizes next to fp16 pictures; loss and logits by string."""
    model.set_reduction(None)
    ids = torch.tensor([ROWS[0]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), images=images([0]).half(), image_sizes=[(640, 480)], do_sample=False,
        temperature=0, top_p=None, num_beams=1, max_new_tokens=2, use_cache=True, pad_token_id=0,
    )  # fmt: skip
    assert out.shape[0] == 1 and out.shape[1] <= 2
    with torch.inference_mode():
        result = model(
            input_ids=ids,
            labels=ids.masked_fill(ids == IMAGE, -100),
            images=images([0]),
            use_cache=True,
            image_sizes=[(640, 480)],
        )
    assert result["loss"].ndim == 0 and result["logits"].shape[1] == len(ROWS[0]) + 575


def test_two_models_do_not_disturb_each_other(model, singles):
    expected = singles("duet")[0]
    other = golden_model().eval()
    model.set_reduction(CONFIGS["duet"])
    other.generate(torch.tensor([ROWS[2]]), images=images([2]), **NEW)
    assert model.generate(torch.tensor([ROWS[0]]), images=images([0]), **NEW).tolist()[0] == expected
    assert other.reduction is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("setting", ["full", "duet", "patch"])
def test_step_by_step_with_a_cache_under_either_name(model, singles, setting, name):
    expected = singles(setting)[0]
    model.set_reduction(CONFIGS[setting])
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ROWS[0]]), images=images([0]), use_cache=True)
        tokens = [int(out.logits[0, -1].argmax())]
        while len(tokens) < len(expected):
            out = model(input_ids=torch.tensor([tokens[-1:]]), use_cache=True, **{name: cache_of(out)})
            tokens.append(int(out.logits[0, -1].argmax()))
    assert tokens == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"postion_ids": torch.zeros(1, 1)}, "did you mean 'position_ids'"),
        ({"past_key_value": object()}, "'past_key_value'"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "'cu_seq_lens_q'; it would have no effect"),
    ],
)
def test_what_forward_does_not_read_is_refused(model, given, message):
    model.set_reduction(None)
    with pytest.raises(TypeError, match=message):
        model(input_ids=torch.tensor([ROWS[1]]), **given)
    model(input_ids=torch.tensor([ROWS[1]]), modalities=["text"], position_ids=None)
