"""A talk longer than the context keeps its newest question and its pictures; a question that is too long is refused."""

import io
import sys
from types import SimpleNamespace

import pytest
from model_helpers import GOLDEN, LLAVA

from duet import DuetConfig
from llava.context import PromptTooLong, drop_oldest, prompt_length, room_for_prompt, visual_tokens
from llava.conversation import conv_templates
from llava.eval import run_llava
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.serve import cli
from llava.tokenization import load_tokenizer

PICTURE = str(GOLDEN / "images" / "coffee.png")
VISUAL = [50, 30]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(LLAVA))


def talk(template="vicuna_v1", rounds=4):
    """Questions 0, 1, ... of which the last is open; two pictures in the first one."""
    conversation = conv_templates[template].copy()
    for number in range(rounds):
        marks = "<image>\n<image>\n" if number == 0 else ""
        conversation.append_message(conversation.roles[0], f"{marks}question {number}")
        conversation.append_message(conversation.roles[1], f"answer {number}" if number < rounds - 1 else None)
    return conversation


def length(conversation, tokenizer):
    return prompt_length(tokenizer_image_token(conversation.get_prompt(), tokenizer), VISUAL)


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_llama_2", "mpt", "v0", "llava_v0", "mistral_instruct"])
def test_the_oldest_turns_go_and_the_pictures_stay(tokenizer, template):
    whole = length(talk(template), tokenizer)
    fits = talk(template)
    assert drop_oldest(fits, tokenizer, VISUAL, whole) == 0 == drop_oldest(fits, tokenizer, VISUAL, None)
    assert fits.get_prompt() == talk(template).get_prompt()
    dropped = set()
    for room in range(whole - 1, 0, -1):
        short = talk(template)
        try:
            count = drop_oldest(short, tokenizer, VISUAL, room)
        except PromptTooLong as error:
            assert str(room) in str(error) and short.get_prompt() == talk(template).get_prompt()
            break
        dropped.add(count)
        prompt = short.get_prompt()
        assert length(short, tokenizer) <= room and prompt.count("<image>") == 2
        assert [f"question {number}" in prompt for number in range(4)] == [number >= count for number in range(4)]
        assert prompt.index("<image>\n<image>\n") < prompt.index(f"question {count}")
        assert short.messages[: short.offset] == talk(template).messages[: short.offset], "fixed examples stay"
    assert dropped == {1, 2, 3}


def test_as_few_turns_go_as_possible(tokenizer):
    short = talk()
    drop_oldest(short, tokenizer, VISUAL, length(talk(), tokenizer) - 1)
    assert "question 1" in short.get_prompt() and "question 0" not in short.get_prompt()


def test_marks_of_other_spellings_move_along(tokenizer):
    conversation = talk()
    conversation.messages[0][1] = "<im_start><image><im_end>\nfirst"
    drop_oldest(conversation, tokenizer, VISUAL, length(conversation, tokenizer) - 1, "<im_start><image><im_end>")
    assert conversation.messages[0][1] == "<im_start><image><im_end>\nquestion 1"


@pytest.mark.parametrize(
    ("config", "new", "room"),
    [
        ({"tokenizer_model_max_length": 2048, "max_position_embeddings": 4096}, 512, 2048),
        ({"tokenizer_model_max_length": 2048, "max_position_embeddings": 2048}, 512, 1920),
        ({"max_position_embeddings": 2048}, 4000, 1920),
        ({"tokenizer_model_max_length": None}, 10, None),
        ({}, 10, None),
    ],
)
def test_room(config, new, room):
    assert room_for_prompt(SimpleNamespace(**config), new) == room


def test_visual_tokens_are_those_that_enter():
    model = load_pretrained_model(str(LLAVA), None, "llava", device="cpu")[1]
    assert visual_tokens(model, [(1, 2), (30, 4)]) == [576, 576]
    model.set_reduction(DuetConfig(dominant=10, contextual=3, schedule={}))
    assert visual_tokens(model, [(1, 2)]) == [13]


# --- the commands


@pytest.fixture
def small_room(monkeypatch, tokenizer):
    """A context for about three of the questions below."""
    one = talk(rounds=1)
    room = len(tokenizer_image_token(one.get_prompt(), tokenizer)) + 576 + 60
    monkeypatch.setattr(run_llava, "room_for_prompt", lambda config, new: room)
    return room


FLAGS = ["--model-path", str(LLAVA), "--image-file", PICTURE, "--conv-mode", "vicuna_v1", "--temperature", "0"]
FLAGS += ["--max_new_tokens", "2", "--device", "cpu"]


def chat(monkeypatch, capsys, lines, interactive=False):
    stdin = io.StringIO("\n".join(lines) + "\n")
    stdin.isatty = lambda: interactive
    monkeypatch.setattr(sys, "stdin", stdin)
    status = cli.main([*FLAGS, "--debug"])
    err = capsys.readouterr().err
    return status, err, err.split("{'prompt': ")[1:]


def test_a_long_talk_goes_on(monkeypatch, capsys, small_room):
    seen = []
    monkeypatch.setattr(run_llava.logger, "warning_once", seen.append)
    questions = [f"what is number {number} here?" for number in range(5)]
    status, _, prompts = chat(monkeypatch, capsys, questions)
    assert status == 0 and len(prompts) == 5 and any("oldest questions are left out" in text for text in seen)
    for question, prompt in zip(questions, prompts, strict=True):
        assert question in prompt and prompt.count("<image>") == 1
    assert questions[0] in prompts[1] and questions[0] not in prompts[4] and questions[3] in prompts[4]


def test_a_question_that_is_too_long_does_not_end_a_talk(monkeypatch, capsys, small_room):
    lines = ["word " * 300, "what is it?"]
    status, err, prompts = chat(monkeypatch, capsys, lines, interactive=True)
    assert status == 0 and f"the context has room for {small_room}" in err
    assert len(prompts) == 1 and "<image>" in prompts[0] and "what is it?" in prompts[0] and "word" not in prompts[0]
    status, err, _ = chat(monkeypatch, capsys, lines)
    assert status == 1 and f"room for {small_room}" in err


def test_run_llava_refuses_a_question_that_is_too_long(capsys, small_room):
    assert run_llava.main([*FLAGS, "--query", "word " * 300]) == 1
    assert "error: the question takes" in capsys.readouterr().err
