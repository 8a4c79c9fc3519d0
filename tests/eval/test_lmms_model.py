"""lmms-eval as a client: its unmodified `llava` model and our `duet_llava` say what this package says by itself."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; pip install -e '.[lmms]'")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2
from lmms_eval.models.simple.llava import Llava
from lmms_world import GOLDEN, Doc, own_answers, run_task, write_task

from duet import DuetConfig
from llava.eval.lmms import MODEL, DuetLlava, manifest
from llava.model.builder import load_pretrained_model
from llava.reduction import ReductionArguments

CHECKPOINT = GOLDEN / "llava_tiny"
FLAGS = {"dominant": 60, "contextual": 5, "layer_list": "[4,6]", "image_token_ratio_list": "[0.5,0.0]"}
PICTURES = [
    Doc("What is in the cup?", ("coffee.png",)),
    Doc("Is there a person in the image?\nAnswer the question using a single word or phrase.", ("astronaut.png",)),
    Doc("What colour is the flower?", ("flower_tall.png",)),
    Doc("Which one is it? A. a cup B. a flower", ("coffee.png",)),
]
MIXED = [Doc("What is two plus two?"), Doc("Which of them is a cup?", ("coffee.png", "flower_tall.png"))]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks, and a cache for `datasets` that is not the user's."""
    folder = tmp_path_factory.mktemp("lmms_tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
        write_task(folder, "small_pictures", PICTURES)
        write_task(folder, "small_mixed", MIXED)
        yield folder


@pytest.fixture(scope="module")
def reduced_checkpoint(tmp_path_factory):
    """The golden model, saved with a reduction in its config."""
    folder = tmp_path_factory.mktemp("reduced") / "llava-tiny-duet"
    reduction = ReductionArguments(**FLAGS)
    tokenizer, model, _, _ = load_pretrained_model(str(CHECKPOINT), None, "tiny", device="cpu", duet_config=reduction)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stock_llava(checkpoint, batch_size):
    """lmms-eval's class on the CPU: it has no other way to say so than this pair."""
    return Llava.create_from_arg_string(
        f"pretrained={checkpoint},device_map=auto", {"batch_size": batch_size, "device": "cpu"}
    )


def plugin(batch_size=1, **arguments):
    text = ",".join(f"{name}={value}" for name, value in arguments.items())
    return DuetLlava.create_from_arg_string(
        f"pretrained={CHECKPOINT},{text}".rstrip(","), {"batch_size": batch_size, "device": "cpu"}
    )


def stripped(texts):
    return [text.strip() for text in texts]


@functools.cache
def expected(checkpoint, reduced=False, like_lmms=False):
    """Our own answers to PICTURES and MIXED, in lists."""
    reduction = ReductionArguments(**FLAGS) if reduced else None
    said = own_answers(checkpoint, PICTURES + MIXED, reduction, like_lmms)
    return said[: len(PICTURES)], said[len(PICTURES) :]


def test_the_unmodified_llava_model_runs_on_this_package(tasks):
    answers, _ = run_task(stock_llava(CHECKPOINT, 1), tasks, ["small_pictures", "small_mixed"])
    pictures, mixed = expected(CHECKPOINT, like_lmms=True)
    assert stripped(answers["small_pictures"]) == pictures
    assert stripped(answers["small_mixed"]) == mixed
    assert len(set(pictures + mixed)) > len(pictures)  # a model that says one thing to everything shows nothing


def test_the_unmodified_llava_model_in_batches_with_a_reduction(reduced_checkpoint, tasks):
    lm = stock_llava(reduced_checkpoint, 3)
    assert lm.model.reduction is not None
    answers, _ = run_task(lm, tasks, ["small_pictures"])
    assert stripped(answers["small_pictures"]) == expected(reduced_checkpoint, like_lmms=True)[0]


@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["full", "duet"])
def test_the_plugin_says_what_this_package_says(flags, tasks):
    """In batches that mix two tasks, with and without pictures."""
    answers, _ = run_task(plugin(4, **flags), tasks, ["small_mixed", "small_pictures"])
    pictures, mixed = expected(CHECKPOINT, reduced=bool(flags))
    assert answers["small_mixed"] == mixed
    assert answers["small_pictures"] == pictures


def test_the_reduction_of_the_plugin_has_an_effect():
    assert plugin().model.reduction is None
    assert plugin(**FLAGS).model.reduction == DuetConfig(dominant=60, contextual=5, schedule={4: 0.5, 6: 0.0})
    assert expected(CHECKPOINT) != expected(CHECKPOINT, reduced=True)


def test_a_checkpoint_with_a_reduction_can_be_run_without(reduced_checkpoint):
    assert plugin(pretrained=reduced_checkpoint).model.reduction is not None
    assert plugin(pretrained=reduced_checkpoint, duet_tokens=0).model.reduction is None


def test_scores_come_from_the_answers(tasks, tmp_path):
    said, _ = expected(CHECKPOINT)
    docs = [Doc(doc.question, doc.pictures, said[i] if i % 2 else "else") for i, doc in enumerate(PICTURES)]
    write_task(tmp_path, "small_scored", docs)
    _, scores = run_task(plugin(2), tmp_path, ["small_scored"])
    assert scores["small_scored"] == pytest.approx(2 / 4)


def requests_for(docs, continuation):
    """Likelihood requests as lmms-eval makes them."""
    return [
        Instance(
            request_type="loglikelihood",
            arguments=(doc.question, continuation(doc), lambda d: d["visuals"], index, "small", "test"),
            idx=0,
            metadata={"task": "small", "doc_id": index, "repeats": 1},
        )
        for index, doc in enumerate(docs)
    ]


@pytest.mark.parametrize("flags", [{}, FLAGS], ids=["full", "duet"])
def test_likelihoods(flags):
    lm = plugin(**flags)
    lm.task_dict = {"small": {"test": [{"visuals": doc.opened()} for doc in PICTURES]}}
    found = lm.loglikelihood(requests_for(PICTURES, lambda doc: " a cup"))
    if not flags:
        stock = stock_llava(CHECKPOINT, 1)
        stock.task_dict = lm.task_dict
        theirs = stock.loglikelihood(requests_for(PICTURES, lambda doc: " a cup"))
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in theirs], abs=2e-3)
    assert len({round(loss, 5) for loss, _ in found}) == len(PICTURES)


@pytest.mark.parametrize("wrong", [None, 0, -1])
def test_a_greedy_continuation_is_told_from_another(wrong):
    """A stand-in predicts the very ids, or all but one of the continuation, behind more places than there are ids."""
    lm = plugin()
    seen = {}

    def predict(input_ids, labels, **_):
        seen["labels"] = labels[0]
        logits = torch.nn.functional.one_hot(input_ids[0], 2000).float().roll(-1, 0)
        places = torch.nonzero(labels[0] != -100)[:, 0]
        if wrong is not None:
            logits[places[wrong] - 1] = logits[places[wrong] - 1].roll(1)
        return SimpleNamespace(loss=torch.tensor(0.25), logits=torch.cat([torch.zeros(7, 2000), logits])[None])

    config = lm.model.config
    lm.model = predict
    predict.config, predict.device = config, torch.device("cpu")
    lm.task_dict = {"small": {"test": [{"visuals": []}]}}
    assert lm.loglikelihood(requests_for([Doc("What?")], lambda doc: "a cup")) == [(0.25, wrong is None)]
    said = lm.tokenizer.decode(seen["labels"][seen["labels"] != -100])
    assert said.replace(" ", "") == "acup</s>"


def test_lmms_eval_finds_the_plugin():
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class(MODEL) is DuetLlava


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "batch_size=auto must be a whole number"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
        ({"conv_template": "vicuna"}, "unknown conversation template 'vicuna'"),
        ({"dominate": 3}, "unknown in --model_args: --dominate=3"),
        ({"layer_list": "[4]"}, "--image_token_ratio_list is not given"),
        ({"pretrained": GOLDEN / "absent"}, "does not exist"),
    ],
)
def test_wrong_model_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plugin(**arguments)


def test_several_rounds_are_refused():
    with pytest.raises(NotImplementedError, match="single turns"):
        plugin().generate_until_multi_round([])
