"""Labels: parity with the reference, and right by construction for every template."""

import pytest
from data_helpers import data_args, golden_json, record, supervised_runs, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.train import labels as labels_lib
from llava.train.records import BadSampleError

GOLDEN_CASES = golden_json("labels.json")["cases"]
TEXT = st.lists(
    st.sampled_from(
        [
            "hello",
            " ",
            "ASSISTANT: ",
            "USER:",
            "é花😀",
            "\n",
            "[/INST] ",
            "[INST]",
            "</s>",
            "###",
            "a",
            " b.",
            "<|im_end|>",
        ]
    ),
    min_size=1,
    max_size=6,
).map(lambda parts: "".join(parts) + "x")
TURN_ENDS = {
    "v1": "</s>",
    "llava_v1": "</s>",
    "v1_mmtag": "</s>",
    "llama_2": " </s>",
    "llava_llama_2": " </s>",
    "mistral_instruct": " </s>",
    "mpt": "<|im_end|>",
    "chatml_direct": "<|im_end|>",
}


def case_name(case):
    return f"{case['tokenizer']}-{case['kind']}-{case.get('id', case['input_ids'][2])}"


def run(texts, template, name="tokenizer", has_image=False, num_images=1):
    source = record(*texts)["conversations"]
    conversation = conv_templates[template]
    source = labels_lib.preprocess_multimodal([source], data_args(), num_images, conversation)
    out = labels_lib.preprocess(source, tokenizer(name), has_image=has_image, conversation=conversation)
    return out["input_ids"][0].tolist(), out["labels"][0].tolist()


def said(ids, name="tokenizer"):
    return tokenizer(name).decode(ids)


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=case_name)
def test_golden_labels(case):
    source = labels_lib.preprocess_multimodal([case["conversation"]], data_args())
    loaded = tokenizer(case["tokenizer"])
    if case["kind"] == "preprocess_plain":
        out = labels_lib.preprocess_plain(source, loaded, conversation=conv_templates["plain"])
    else:
        if case["has_image"]:
            assert source == [case["after_preprocess_multimodal"]]
        out = labels_lib.preprocess_v1(source, loaded, case["has_image"], conv_templates["v1"])
    ids, labels = out["input_ids"][0].tolist(), out["labels"][0].tolist()
    assert ids == case["input_ids"]
    if "tokenization mismatch" in case.get("stdout", ""):
        # The reference splits at " ASSISTANT: ", which this answer contains; it gives up and masks the whole record.
        assert set(case["labels"]) == {IGNORE_INDEX}
        answers = [turn["value"] for turn in case["conversation"] if turn["from"] == "gpt"]
        decoded = [said(span, case["tokenizer"]) for span in supervised_runs(ids, labels)]
        assert [text.strip() for text in decoded] == [answer + "</s>" for answer in answers]
    else:
        assert labels == case["labels"]


def test_the_reference_failed_on_something():
    """The branch above that does not compare with the reference is used, and only where it gave up."""
    failed = [case for case in GOLDEN_CASES if "tokenization mismatch" in case.get("stdout", "")]
    assert [case["id"] for case in failed] == ["sep_in_answer", "sep_in_answer"]


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_legacy"])
@pytest.mark.parametrize("template", TURN_ENDS)
@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_supervised_text_is_the_answers(template, name, texts):
    """One turn or several, with separators and special tokens inside questions and answers."""
    flat = [text for pair in texts for text in pair]
    ids, labels = run(flat, template, name)
    runs = supervised_runs(ids, labels)
    assert len(runs) == len(texts)
    for (_, answer), span in zip(texts, runs, strict=True):
        decoded, expected = said(span, name).strip(), (answer + TURN_ENDS[template]).strip()
        if name == "tokenizer_legacy":  # it puts a space after every special token
            decoded, expected = decoded.replace(" ", ""), expected.replace(" ", "")
        assert decoded == expected


@pytest.mark.parametrize("template", TURN_ENDS)
@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_ids_are_those_of_the_prompt(template, texts):
    """Training sees exactly the ids that inference makes of the same prompt."""
    flat = [text for pair in texts for text in pair]
    flat[0] = "<image>\n" + flat[0]
    ids, labels = run(flat, template, has_image=True)
    conversation = conv_templates[template].copy()
    source = labels_lib.preprocess_multimodal([record(*flat)["conversations"]], data_args(), 1, conversation)[0]
    for index, turn in enumerate(source):
        conversation.append_message(conversation.roles[index % 2], turn["value"])
    assert ids == tokenizer_image_token(conversation.get_prompt(), tokenizer())
    assert labels[ids.index(IMAGE_TOKEN_INDEX)] == IGNORE_INDEX


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_legacy"])
def test_several_images_keep_their_places(name):
    texts = ["<image> left, <image> right", "two", "and <image>?", "three"]
    ids, labels = run(texts, "v1", name, has_image=True, num_images=3)
    assert ids.count(IMAGE_TOKEN_INDEX) == 3
    assert [said(span, name).strip() for span in supervised_runs(ids, labels)] == ["two</s>", "three</s>"]


@given(caption=TEXT)
@settings(max_examples=50, deadline=None)
def test_plain_supervises_the_caption_and_its_line_end(caption):
    ids, labels = run(["<image>\nignored question", caption], "plain", has_image=True)
    assert ids[:2] == [1, IMAGE_TOKEN_INDEX] and labels[:2] == [IGNORE_INDEX, IGNORE_INDEX]
    assert labels[2:] == ids[2:]
    assert said(ids[2:]).strip() == (caption + "\n").strip() and ids[-1] == 13


def test_v0_supervises_the_assistants_lines_and_the_marks():
    ids, labels = run(["first?", "one", "second?", "two"], "v0")
    text = "".join(said(span) for span in supervised_runs(ids, labels))
    assert "Assistant: one" in text and "Assistant: two" in text
    assert "first" not in text and "second" not in text and "curious" not in text
    assert labels[0] == IGNORE_INDEX and labels[-1] == ids[-1]
    assert "### Human: first?\n### Assistant: one\n### Human" in said(ids)


@pytest.mark.parametrize(
    ("template", "function"),
    [
        ("v1", labels_lib.preprocess_v1),
        ("llama_2", labels_lib.preprocess_llama_2),
        ("mistral_instruct", labels_lib.preprocess_llama_2),
        ("mpt", labels_lib.preprocess_mpt),
        ("v0", labels_lib.preprocess_v0),
    ],
)
def test_preprocess_dispatches(template, function):
    source = [record("q", "a")["conversations"]]
    conversation = conv_templates[template]
    one = labels_lib.preprocess(source, tokenizer(), conversation=conversation)
    two = function(source, tokenizer(), conversation=conversation)
    assert one["labels"][0].tolist() == two["labels"][0].tolist()


def test_the_default_template_is_used():
    source = [record("q", "a")["conversations"]]
    assert "curious user" in said(labels_lib.preprocess(source, tokenizer())["input_ids"][0])


def test_a_template_of_another_style_is_refused():
    with pytest.raises(ValueError, match="TWO"):
        labels_lib.preprocess_v1([record("q", "a")["conversations"]], tokenizer(), conversation=conv_templates["mpt"])


def test_several_conversations_are_padded():
    sources = [record("q", "a")["conversations"], record("a longer question", "and a longer answer")["conversations"]]
    out = labels_lib.preprocess_v1(sources, tokenizer())
    assert out["input_ids"].shape == out["labels"].shape
    assert out["labels"][0, -1] == IGNORE_INDEX and out["input_ids"][0, -1] == tokenizer().pad_token_id


def test_text_only_records_may_speak_of_the_mark():
    ids, _ = run(["what does <image> mean?", "a mark"], "v1", has_image=False)
    assert IMAGE_TOKEN_INDEX not in ids


def test_system_turn_replaces_the_system_prompt():
    turns = [{"from": "system", "value": "Be brief."}, *record("q", "a")["conversations"]]
    ids = labels_lib.preprocess([turns], tokenizer())["input_ids"][0]
    assert said(ids).strip() == "<s> Be brief. USER: q ASSISTANT: a</s>"


@pytest.mark.parametrize(
    ("is_multimodal", "start_end", "template", "expected"),
    [
        (False, False, "v1", "what is <image> this?"),
        (True, False, "v1", "<image>\nwhat is  this?"),
        (True, True, "v1", "<im_start><image><im_end>\nwhat is  this?"),
        (True, False, "v1_mmtag", "<Image><image></Image>\nwhat is  this?"),
        (True, True, "v1_mmtag", "<Image><im_start><image><im_end></Image>\nwhat is  this?"),
    ],
)
def test_mark_placement(is_multimodal, start_end, template, expected):
    source = record("what is <image> this?", "a")["conversations"]
    arguments = data_args(is_multimodal=is_multimodal, mm_use_im_start_end=start_end)
    out = labels_lib.preprocess_multimodal([source], arguments, conversation=conv_templates[template])
    assert out[0][0]["value"] == expected
    assert source[0]["value"] == "what is <image> this?"


@pytest.mark.parametrize(
    ("texts", "template", "message"),
    [
        (["q", ""], "v1", "answer in turn 1 is empty"),
        (["q", "a", "r", "  "], "v1", "answer in turn 3 is empty"),
        (["q", ""], "mpt", "answer in turn 1 is empty"),
        (["<image>", ""], "plain", "answer in turn 1 is empty"),
        (["q"], "v1", "no question with an answer"),
        (["no mark", "caption"], "plain", "plain template"),
        (["<image>", "caption", "more", "text"], "plain", "plain template"),
    ],
)
def test_what_cannot_be_labelled_is_an_error(texts, template, message):
    with pytest.raises(BadSampleError, match=message):
        run(texts, template, has_image=True)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["human", "assistant"], "unknown role 'assistant'"),
        (["human", "human", "gpt"], "must alternate"),
        (["human", "gpt", "system"], "unknown role 'system'|must alternate"),
    ],
)
def test_wrong_roles(roles, message):
    turns = [{"from": role, "value": "x"} for role in roles]
    with pytest.raises(BadSampleError, match=message):
        labels_lib.preprocess_v1([turns], tokenizer())


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match="load_tokenizer"):
        labels_lib.preprocess_v1([record("q", "a")["conversations"]], Slow())
