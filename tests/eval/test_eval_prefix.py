"""Questions about one picture share its prefix: the same answers, one run of the picture, the same ledger."""

from dataclasses import replace

import pytest
import runner_world
import torch
from runner_world import noise

import duet
from llava.context import PromptTooLong
from llava.eval import prefix
from llava.eval.generate import Answerer
from llava.eval.ledger import sample_metadata

STAGE_1_ONLY = duet.DuetConfig(dominant=10, contextual=2, schedule={})
PATCH = replace(STAGE_1_ONLY, positions="patch")
TWO_STAGES = duet.DuetConfig(dominant=10, contextual=2, schedule={1: 0.5, 3: 0.0})
LISTENS = duet.DuetConfig(stage1="cdpruner", dominant=12, contextual=0, schedule={})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return runner_world.load_model(tmp_path_factory.mktemp("prefix"))


@pytest.fixture
def answerer(loaded):
    tokenizer, model, processor = loaded
    model.set_reduction(None)
    yield Answerer(model, tokenizer, processor, "vicuna_v1")
    model.set_reduction(None)
    model.config.tokenizer_model_max_length = 2048


ONE, TWO = noise(1), noise(2)
BATCH = [
    ("What is it?", [ONE]),
    ("Is there a red one on the left of it, or not?", [ONE]),
    ("What is it?", [TWO]),
    ("Why?", [ONE]),
    ("Which of the two?", [ONE, TWO]),
    ("Are they the same, and where?", [ONE, TWO]),
    ("Where?", [TWO]),
]


@pytest.fixture
def counted(answerer, monkeypatch):
    """(rows, columns) of every prefill that the decoder runs."""
    shapes, layer = [], answerer.model.model.layers[0]
    hook = layer.register_forward_hook(lambda module, given, out: shapes.append(tuple(given[0].shape[:2])))
    yield shapes
    hook.remove()


@pytest.mark.parametrize("reduction", [None, STAGE_1_ONLY, PATCH], ids=["full", "stage 1", "patch positions"])
def test_shared_prefixes_give_the_same_answers(answerer, reduction, counted):
    answerer.model.set_reduction(reduction)
    alone = [answerer.answer([sample], 10)[0] for sample in BATCH]
    counted.clear()
    assert answerer.answer(BATCH, 10) == alone
    assert len(set(alone)) > 4, "answers that are all alike prove nothing"
    assert counted[0][0] == 3, "two pictures alone, and one pair"
    assert counted[1][0] == len(BATCH)
    assert counted[1][1] < 40 < counted[0][1], "what comes after the pictures is short"


@pytest.mark.parametrize("reduction", [TWO_STAGES, LISTENS], ids=["drops in the decoder", "reads the question"])
def test_prefixes_are_shared_only_where_the_picture_does_not_depend_on_the_question(answerer, counted, reduction):
    answerer.model.set_reduction(reduction)
    alone = [answerer.answer([sample], 10)[0] for sample in BATCH]
    counted.clear()
    assert answerer.answer(BATCH, 10) == alone
    assert counted[0][0] == len(BATCH)


@pytest.mark.parametrize(
    "batch",
    [
        [("What is it?", [ONE]), ("What is it?", [TWO])],
        [("What is it?", [ONE]), ("Why?", [ONE]), ("No picture?", [])],
        [("Why <image>", [ONE]), ("<image>", [ONE])],
    ],
    ids=["nothing in common", "a text-only question", "nothing after the picture but the template"],
)
def test_other_batches(answerer, batch):
    assert answerer.answer(batch, 6) == [answerer.answer([sample], 6)[0] for sample in batch]


def test_a_prompt_that_the_context_would_cut_is_refused(answerer):
    """The model cuts the end: the question itself."""
    ids = answerer.prompt_ids(*BATCH[0][:1], 1)
    answerer.model.config.tokenizer_model_max_length = len(ids) - 1 + 36
    answerer.answer(BATCH[:1], 6)
    answerer.model.config.tokenizer_model_max_length -= 1
    with pytest.raises(
        PromptTooLong, match=rf"takes {len(ids) + 35} tokens .*36 visual ones.* room for {len(ids) + 34}"
    ):
        answerer.answer(BATCH[:1], 6)


@pytest.mark.parametrize("reduction", [None, STAGE_1_ONLY, PATCH], ids=["full", "stage 1", "patch positions"])
def test_the_ledger_is_that_of_single_questions(answerer, reduction):
    answerer.model.set_reduction(reduction)

    def facts(batch):
        with duet.trace(images=False) as trace:
            answerer.answer(batch, 3)
        assert len(trace.passes) == 1
        tokens = [segment.tokens for segment in trace.passes[0]]
        return sample_metadata(trace, [36 * len(pictures) for _, pictures in batch], None), tokens

    shared, shared_tokens = facts(BATCH)
    for place, sample in enumerate(BATCH):
        single, tokens = facts([sample])
        assert shared[place] == single[0]
        assert [column[place] for column in shared_tokens] == [column[0] for column in tokens]


def test_prompts_without_a_common_object_share_nothing():
    same, other = torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)
    assert prefix.find_shared([[1, -200, 2], [1, -200, 3]], [same, other]) is None
    assert prefix.find_shared([[1, -200], [1, -200]], [same, same]) is None, "no suffix to go on with"
    assert prefix.find_shared([[1, -200, 2], [9, -200, 3]], [same, same]) is None, "other words in front"
    found = prefix.find_shared([[1, -200, 2], [1, -200, 3, 4]], [same, same])
    assert found == prefix.Shared([[1, -200]], [[0]], [0, 0], [[2], [3, 4]])
