"""Prompt strings of every template, to the byte."""

import json

import pytest
from data_helpers import golden_json
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava import conversation as conversation_lib
from llava.conversation import Conversation, SeparatorStyle, conv_templates, default_conversation

USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = USER.replace("curious user", "curious human").replace("the user's", "the human's")
MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.The "
    "visual content will be provided with the following format: <Image>visual content</Image>."
)
LLAMA_2_START = (
    "You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible, while being safe.  Your"
)
LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers."
)
CHATML = "<|im_start|>system\nAnswer the questions."
CHATML_TURNS = "<|im_end|><|im_start|>user\nq<|im_end|><|im_start|>assistant\na<|im_end|><|im_start|>user\nr<|im_end|>"
OPEN = "<|im_start|>assistant\n"

EXPECTED = {
    "v1": f"{USER} USER: q ASSISTANT: a</s>USER: r ASSISTANT:",
    "vicuna_v1": f"{USER} USER: q ASSISTANT: a</s>USER: r ASSISTANT:",
    "llava_v1": f"{HUMAN} USER: q ASSISTANT: a</s>USER: r ASSISTANT:",
    "v1_mmtag": f"{MMTAG} USER: q ASSISTANT: a</s>USER: r ASSISTANT:",
    "llava_v0": f"{HUMAN}###Human: q###Assistant: a###Human: r###Assistant:",
    "v0_mmtag": f"{MMTAG}###Human: q###Assistant: a###Human: r###Assistant:",
    "llava_llama_2": f"[INST] <<SYS>>\n{LLAVA_LLAMA_2}\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST]",
    "mistral_instruct": "[INST] q [/INST] a </s>[INST] r [/INST]",
    "mpt": MPT + CHATML_TURNS + OPEN,
    "chatml_direct": CHATML + CHATML_TURNS + OPEN,
    "mistral_direct": CHATML + CHATML_TURNS + OPEN,
}


def filled(name, *texts):
    conversation = conv_templates[name].copy()
    for index, text in enumerate(texts):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation


@pytest.mark.parametrize("name", EXPECTED)
def test_prompt(name):
    assert filled(name, "q", "a", "r", None).get_prompt() == EXPECTED[name]


def test_all_names_are_there():
    assert set(conv_templates) == set(EXPECTED) | {"default", "v0", "plain", "v0_plain", "llama_2"}
    assert default_conversation is conv_templates["vicuna_v1"]


def test_llama_2_system_text():
    prompt = filled("llama_2", "q", None).get_prompt()
    assert prompt.startswith(
        f"[INST] <<SYS>>\n{LLAMA_2_START} answers should not include any harmful, unethical, racist"
    )
    assert "positive in nature.\n\nIf a question does not make any sense" in prompt
    assert prompt.endswith("please don't share false information.\n<</SYS>>\n\nq [/INST]")


def test_seeded_template_hides_its_examples():
    template = conv_templates["v0"]
    assert template is conv_templates["default"] and len(template.messages) == template.offset == 2
    chat = filled("v0", "q", "a").to_gradio_chatbot()
    assert chat == [["q", "a"]]


def test_plain():
    assert filled("plain", "<image>").get_prompt() == "<image>\n"
    assert conv_templates["v0_plain"] is conv_templates["plain"]
    with pytest.raises(ValueError, match="sep2"):
        filled("plain", "<image>", "caption").get_prompt()


def test_golden_prompts_are_reproduced():
    """The prompt strings of the reference, for the templates that it recorded."""
    seen = 0
    for case in golden_json("prompts.json")["cases"]:
        name, kind = case["name"].split("/")
        if name not in conv_templates or kind in ("multi_turn",):
            continue
        if name == "plain":
            question = case["prompt"].removesuffix("\n")
            assert filled(name, question).get_prompt() == case["prompt"]
        else:
            question = case["prompt"].split(" USER: ", 1)[1].removesuffix(" ASSISTANT:")
            assert filled(name, question, None).get_prompt() == case["prompt"]
        seen += 1
    assert seen >= 20


@given(texts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5), name=st.sampled_from(sorted(EXPECTED)))
def test_segments_make_the_prompt(texts, name):
    conversation = filled(name, *texts)
    segments = conversation.segments()
    assert "".join(segment.text for segment in segments) == conversation.get_prompt()
    answers = [segment.text for segment in segments if segment.supervised]
    assert len(answers) == len(texts) // 2
    assert all(text in answer for text, answer in zip(texts[1::2], answers, strict=True))


def test_copy_is_independent():
    template = conv_templates["vicuna_v1"]
    filled("vicuna_v1", "q")
    assert len(template.messages) == 0
    first = filled("vicuna_v1", "q")
    second = first.copy()
    second.append_message("ASSISTANT", "a")
    second.messages[0][1] = "changed"
    assert first.messages == [["USER", "q"]]


def test_dict_is_json():
    conversation = filled("vicuna_v1", ("q", Image.new("RGB", (4, 4)), "Pad"), "a")
    described = json.loads(json.dumps(conversation.dict()))
    assert described["messages"] == [["USER", "q"], ["ASSISTANT", "a"]]
    assert described["sep2"] == "</s>"


def test_picture_in_the_first_message():
    picture = Image.new("RGB", (40, 20), "red")
    conversation = filled("vicuna_v1", ("what? <image>", picture, "Pad"), None)
    assert conversation.get_prompt() == f"{USER} USER: <image>\nwhat? ASSISTANT:"
    assert conversation.get_images(return_pil=True)[0].size == (40, 40)
    tagged = filled("v1_mmtag", ("what?", picture, "Crop"), None)
    assert tagged.get_prompt() == (
        f"{MMTAG} USER: <Image><image></Image> ASSISTANT: Received.</s>USER: what? ASSISTANT:"
    )
    html = conversation.to_gradio_chatbot()[0][0]
    assert html.startswith('<img src="data:image/jpeg;base64,') and html.endswith("what?")


def test_process_image_modes():
    conversation = conv_templates["v1"].copy()
    large = Image.new("RGB", (2688, 1344))
    assert conversation.process_image(large, "Default", return_pil=True).size == (1344, 672)
    assert conversation.process_image(large, "Resize", return_pil=True).size == (336, 336)
    assert isinstance(conversation.process_image(large, "Crop"), str)
    with pytest.raises(ValueError, match="Stretch"):
        conversation.process_image(large, "Stretch")


def test_system_prompt_can_be_replaced():
    assert filled("v1", "q", None).with_system("Be brief.").get_prompt() == "Be brief. USER: q ASSISTANT:"
    assert (
        filled("mpt", "q").with_system("Be brief.").get_prompt().startswith("<|im_start|>system\nBe brief.<|im_end|>")
    )


def test_llama_2_starts_with_a_user():
    with pytest.raises(ValueError, match="starts with a message"):
        filled("llama_2", None).get_prompt()


def test_set_default_conversation():
    try:
        assert conversation_lib.set_default_conversation("plain") is conv_templates["plain"]
        assert conversation_lib.default_conversation is conv_templates["plain"]
        assert conversation_lib.set_default_conversation("no such name") is conv_templates["vicuna_v1"]
    finally:
        conversation_lib.set_default_conversation("vicuna_v1")


def test_unknown_style_is_refused():
    odd = Conversation(system="", roles=("a", "b"), messages=[], offset=0, sep_style="TWO")
    with pytest.raises(ValueError, match="separator style"):
        odd.get_prompt()
    assert SeparatorStyle.TWO is not SeparatorStyle.SINGLE
