"""CDPruner equals a dense determinant search, listens to the question, and to nothing else."""

import math

import pytest
import small
import torch
from transformers import CLIPConfig, CLIPModel

import duet
from duet import DuetConfig
from duet.question import ClipQuestion, ClipText, MeanQuestion, asked, read_question
from duet.stage1.cdpruner import most_probable_subset, unit_range
from duet.vision import encode_vision

TOKENS = 12
CONFIG = DuetConfig(stage1="cdpruner", dominant=TOKENS, contextual=0, schedule={})


@pytest.fixture(scope="module")
def model():
    return small.build()


def reduce_images(model, pixels, config=CONFIG, question=None):
    project = model.model.multi_modal_projector
    with torch.no_grad():
        return encode_vision(model.model.vision_tower, pixels, config=config, project=project, question=question)


def literal_subset(kernel, count):
    """Greedy MAP by determinants: each pick makes the determinant of the chosen block largest."""
    picks = []
    while len(picks) < count:

        def volume(i):
            block = kernel[[*picks, i]][:, [*picks, i]]
            return float(torch.linalg.slogdet(block)[1])

        picks.append(max((i for i in range(len(kernel)) if i not in picks), key=lambda i: (volume(i), -i)))
    return picks


def literal_relevance(scores):
    low, high = min(scores), max(scores)
    return [(s - low + 1e-6) / (high - low + 1e-6) for s in scores]


@torch.no_grad()
@pytest.mark.parametrize("with_question", [True, False])
def test_equals_a_search_by_determinants(model, with_question):
    pixels, words = small.pixels(3), torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    got = reduce_images(model, pixels, question=MeanQuestion(words) if with_question else None)
    features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    unit = torch.nn.functional.normalize(model.model.multi_modal_projector(features).double(), dim=-1)
    for row in range(3):
        rho = [1.0] * small.PATCHES
        if with_question:
            rho = literal_relevance((unit[row] @ (words[row].double() / words[row].double().norm())).tolist())
        rho = torch.tensor(rho, dtype=torch.float64)
        kernel = rho[:, None] * (unit[row] @ unit[row].T).fill_diagonal_(1.0) * rho[None]
        assert got.source[row].tolist() == sorted(literal_subset(kernel, TOKENS))
        assert torch.allclose(got.tokens[row], features[row, got.source[row]], atol=1e-5)


@torch.no_grad()
def test_the_question_decides(model):
    pixels = small.pixels(1).expand(2, -1, -1, -1)
    words = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    got = reduce_images(model, pixels, question=MeanQuestion(words))
    assert got.source[0].tolist() != got.source[1].tolist()
    silent = reduce_images(model, pixels, question=MeanQuestion(torch.zeros(2, 32)))
    assert torch.equal(silent.source, reduce_images(model, pixels).source)


@torch.no_grad()
def test_relevance_ranges_over_one_image_or_as_released_over_the_batch(model):
    values = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    assert torch.allclose(unit_range(values), torch.tensor([[0.0, 1 / 3, 1.0], [1.0, 1.0, 1.0]]), atol=1e-5)
    assert torch.allclose(unit_range(values, whole_batch=True)[1], torch.full((3,), 2 / 3), atol=1e-5)
    release = DuetConfig(**(CONFIG.to_dict() | {"variant": "release"}))
    pixels = small.pixels(3)
    words = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)) * 5
    question = MeanQuestion(words)
    together = reduce_images(model, pixels, release, question)
    alone = [reduce_images(model, pixels[i : i + 1], release, question.select(torch.tensor([i]))) for i in range(3)]
    same = [torch.equal(one.source[0], together.source[i]) for i, one in enumerate(alone)]
    assert not all(same), "the released range must depend on the batch"


def test_more_picks_than_directions_take_the_lowest_indices():
    unit = torch.eye(3).repeat(1, 2, 1)  # six tokens in three directions
    picks = most_probable_subset(unit, torch.ones(1, 6), 5)
    assert picks.tolist() == [[0, 1, 2, 3, 4]]


def test_equal_tokens_are_never_taken_twice(model):
    out = reduce_images(model, torch.zeros(1, 3, 24, 24))
    assert len(set(out.source[0].tolist())) == TOKENS


def test_the_question_is_text_after_the_image_without_answers_or_padding():
    images = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0]]).bool()
    valid = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1] * 7, [1] * 7])
    answers = torch.tensor([[0, 0, 0, 0, 1, 0, 0], [0] * 7, [0, 0, 0, 1, 1, 1, 1]]).bool()
    got = asked(valid, images, answers)
    assert [row.nonzero().flatten().tolist() for row in got] == [[3, 5], [], [1]]
    assert asked(None, images, None)[0].nonzero().flatten().tolist() == [3, 4, 5, 6]
    embeds = torch.randn(3, 7, 4)
    mean = read_question(None, embeds, got, None).embedding
    assert torch.allclose(mean[0], embeds[0, [3, 5]].mean(0)) and not mean[1].any()


@torch.no_grad()
def test_a_model_hands_its_question_on(model):
    """Each sample keeps its own patches whatever stands beside it, and other words keep other patches."""
    batch, singles = small.mixed_batch("left"), small.mixed_singles()
    with duet.attach(model, CONFIG):
        with duet.trace() as together:
            logits = model(**batch).logits
        alone = []
        for row, single in enumerate(singles):
            with duet.trace() as seen:
                got = model(**single).logits[0]
            alone += [image.source for image in seen.images]
            assert torch.allclose(logits[row, -len(got) :], got, atol=1e-5)
        assert alone == [image.source for image in together.images]
        changed = singles[0]["input_ids"].clone()
        changed[0, -4:] = torch.tensor([11, 12, 13, 14])
        with duet.trace() as other:
            model(**(singles[0] | {"input_ids": changed}))
        before = singles[0]["input_ids"].clone()
        before[0, 1:4] = torch.tensor([11, 12, 13])
        with duet.trace() as same:
            model(**(singles[0] | {"input_ids": before}))
    assert other.images[0].source != alone[0] and same.images[0].source == alone[0]


@torch.no_grad()
def test_answers_do_not_ask(model):
    single = small.mixed_singles()[0]
    labels = single["input_ids"].clone()
    labels[:, :-3] = -100
    with duet.attach(model, CONFIG):
        sources = []
        for answer in (5, 50):
            ids = single["input_ids"].clone()
            ids[0, -3:] = answer
            with duet.trace() as seen:
                model(**(single | {"input_ids": ids}), labels=labels)
            sources.append(seen.images[0].source)
        assert sources[0] == sources[1]
        cached = model.generate(**single, max_new_tokens=4, do_sample=False)
        again = model.generate(**single, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)


class Words:
    """A tokenizer that cuts at spaces: word ``w7`` is token 7."""

    bos_token_id, eos_token_id = 98, 99

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [int(word[1:]) for word in text.split()]}


def decode(ids, skip_special_tokens):
    return " ".join(f"w{i}" for i in ids if not (skip_special_tokens and i < 3))


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(5)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = {**vision, "vocab_size": 100, "max_position_embeddings": 8, "bos_token_id": 98, "eos_token_id": 99}
    config = CLIPConfig(
        text_config=text | {"num_hidden_layers": 2, "initializer_range": 0.3},
        vision_config=vision | {"image_size": 24, "patch_size": 4},
        projection_dim=16,
    )
    return CLIPModel(config).eval()


@torch.no_grad()
def test_clip_reads_long_questions_in_chunks(clip):
    encode = ClipText(clip, Words(), decode)
    read = encode([[1, 10, 11], list(range(20, 33)), []])
    assert isinstance(read, ClipQuestion) and read.counted.sum(1).tolist() == [1, 3, 0]
    one = clip.get_text_features(torch.tensor([[98, 10, 11, 99]]))
    one = one if isinstance(one, torch.Tensor) else one.pooler_output
    assert torch.allclose(read.text[0, 0], torch.nn.functional.normalize(one[0], dim=0), atol=1e-5)
    last = clip.get_text_features(torch.tensor([[98, 32, 99]]))
    last = last if isinstance(last, torch.Tensor) else last.pooler_output
    assert torch.allclose(read.text[1, 2], torch.nn.functional.normalize(last[0], dim=0), atol=1e-5)


@torch.no_grad()
def test_relevance_is_negative_clip_similarity(model, clip):
    pixels, encode = small.pixels(3), ClipText(clip, Words(), decode)
    question = encode([[10, 11], list(range(20, 33)), []])
    got = reduce_images(model, pixels, question=question)
    features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    joint = clip.visual_projection(clip.vision_model.post_layernorm(features)).double()
    joint = torch.nn.functional.normalize(joint, dim=-1)
    unit = torch.nn.functional.normalize(model.model.multi_modal_projector(features).double(), dim=-1)
    for row in range(3):
        chunks = question.text[row][question.counted[row]].double()
        rho = torch.ones(small.PATCHES, dtype=torch.float64)
        if len(chunks):
            scores = [-math.fsum((chunks @ patch).tolist()) / len(chunks) for patch in joint[row]]
            rho = torch.tensor(literal_relevance(scores), dtype=torch.float64)
        kernel = rho[:, None] * (unit[row] @ unit[row].T).fill_diagonal_(1.0) * rho[None]
        assert got.source[row].tolist() == sorted(literal_subset(kernel, TOKENS))


@torch.no_grad()
def test_an_attached_text_tower_is_used_and_leaves_no_trace(model, clip):
    single, keys = small.mixed_singles()[0], set(vars(model))
    with duet.attach(model, CONFIG), duet.trace() as plain:
        model(**single)
    with duet.attach(model, CONFIG, text_encoder=ClipText(clip, Words(), decode)), duet.trace() as read:
        model(**single)
        with pytest.raises(ValueError, match="text_encoder reads token ids"):
            embeds = model.get_input_embeddings()(single["input_ids"])
            model(inputs_embeds=embeds, pixel_values=single["pixel_values"])
    assert plain.images[0].source != read.images[0].source
    assert set(vars(model)) == keys


def test_what_cannot_read_is_refused(model, clip):
    with pytest.raises(ValueError, match=r"CLIPText\w+ has no text_\w+; pass a CLIPModel"):
        ClipText(clip.text_model, Words(), decode)
    question = MeanQuestion(torch.ones(1, 32))
    with pytest.raises(ValueError, match="project="), torch.no_grad():
        encode_vision(model.model.vision_tower, small.pixels(1), config=CONFIG, question=question)
