"""Labels from a model's own chat template: exactly the answers and their end marks, or an error that says why not."""

from __future__ import annotations

import hf_world
import pytest
from PIL import Image

from llava.constants import IGNORE_INDEX
from llava.train.hf_chat import Chat, messages_of, spread
from llava.train.hf_data import blank_row, collate
from llava.train.hf_model import visual_ids
from llava.train.hf_processor import load_processor
from llava.train.records import BadSampleError, check_record

TURNS = [
    {"from": "human", "value": "what is <image> and what is\n<image>"},
    {"from": "gpt", "value": "a thing, a thing"},
    {"from": "human", "value": "a thing?"},
    {"from": "gpt", "value": "no more"},
]
RECORD = {"id": "r", "image": ["a.png", "b.png"], "conversations": TURNS}
PICTURES = [Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 50), "blue")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hf_chat")


@pytest.fixture(scope="module")
def chats(folder):
    """By family: its chat; read from disk as training does."""
    from transformers import AutoConfig

    found = {}
    for family in (*hf_world.FAMILIES, "video_llava"):
        path = hf_world.build(family, folder)
        config = AutoConfig.from_pretrained(path)
        found[family] = Chat(load_processor(str(path), config), visual_ids(config), 500)
    return found


def learned(chat, sample):
    """The stretches of text that a sample teaches."""
    texts, run = [], []
    pairs = zip(sample["input_ids"][0].tolist(), sample["labels"][0].tolist(), strict=True)
    for token, label in [*pairs, (0, IGNORE_INDEX)]:
        if label != IGNORE_INDEX:
            run.append(token)
        elif run:
            texts.append(chat.tokenizer.decode(run).strip())
            run = []
    return texts


@pytest.mark.parametrize("family", hf_world.FAMILIES)
def test_exactly_the_answers_are_learned(chats, family):
    chat = chats[family]
    end = "<|im_end|>" if family == "qwen2_5_vl" else "</s>"
    messages = messages_of(RECORD, chat.end_mark)
    sample = chat.sample(chat.fit(messages), PICTURES, [])
    assert learned(chat, sample) == [f"a thing, a thing{end}", f"no more{end}"]
    visual = [token in chat.visual_ids for token in sample["input_ids"][0].tolist()]
    assert sum(visual) > 2
    assert all(label == IGNORE_INDEX for label, is_visual in zip(sample["labels"][0], visual, strict=True) if is_visual)
    text_only = {"id": "t", "conversations": TURNS[2:]}
    assert learned(chat, chat.sample(chat.fit(messages_of(text_only, chat.end_mark)), [], [])) == [f"no more{end}"]


def test_both_ways_of_finding_answers_agree(folder):
    """The same template with and without marks."""
    from transformers import AutoConfig

    path = hf_world.build("qwen2_5_vl", folder)
    config = AutoConfig.from_pretrained(path)
    plain = Chat(load_processor(str(path), config), visual_ids(config), 500)
    marked_template = hf_world.CHATML_TEMPLATE.replace(
        "{% else %}{{ c['text'] }}{% endif %}",
        "{% elif m['role'] == 'assistant' %}{% generation %}{{ c['text'] }}{% endgeneration %}"
        "{% else %}{{ c['text'] }}{% endif %}",
    )
    (folder / "marked.jinja").write_text(marked_template)
    marked = Chat(load_processor(str(path), config, None, str(folder / "marked.jinja")), visual_ids(config), 500)
    assert marked.marked and not plain.marked
    messages = messages_of(RECORD)
    assert marked.fit(messages) == plain.fit(messages)


def test_an_end_mark_is_added_only_where_the_template_has_none(chats):
    assert chats["llava"].end_mark == "</s>"
    assert chats["qwen2_5_vl"].end_mark == ""


def test_a_single_image_comes_first_and_several_stay(chats):
    one = {"image": "a.png", "conversations": [{"from": "human", "value": "what <image> is"}, TURNS[1]]}
    assert [part["type"] for part in messages_of(one)[0]["content"]] == ["image", "text"]
    several = messages_of(RECORD)[0]["content"]
    assert [part["type"] for part in several] == ["text", "image", "text", "image"]
    with_system = messages_of({"conversations": [{"from": "system", "value": "be brief"}, *TURNS[2:]]})
    assert [message["role"] for message in with_system] == ["system", "user", "assistant"]


def test_whole_turns_beyond_the_limit_are_left_out_with_their_pictures(chats):
    chat = chats["llava"]
    later = [TURNS[2], TURNS[3], *TURNS[:2]]
    record = {"image": ["a.png", "b.png"], "conversations": later}
    whole = chat.fit(messages_of(record, chat.end_mark))
    short = Chat(chat.processor, chat.visual_ids, len(whole.ids) - 5).fit(messages_of(record, chat.end_mark))
    assert whole.pictures["image"] == 2 and short.pictures["image"] == 0
    assert "no more" in short.text and "a thing, a thing" not in short.text
    with pytest.raises(BadSampleError, match="--model_max_length"):
        Chat(chat.processor, chat.visual_ids, 5).fit(messages_of(record, chat.end_mark))


def test_a_template_that_rewrites_history_is_an_error(chats, folder):
    chat = chats["qwen2_5_vl"]
    last_only = hf_world.CHATML_TEMPLATE.replace(
        "{{ c['text'] }}", "{{ c['text'] if loop.last and (m['role'] == 'user' or m == messages[-1]) else 'gone' }}"
    )
    processor = load_processor(str(folder / "qwen2_5_vl"), _config(folder), None, _written(folder, last_only))
    broken = Chat(processor, chat.visual_ids, 500)
    with pytest.raises(BadSampleError, match=r"cannot be found.*--chat_template"):
        broken.fit(messages_of({"conversations": [*TURNS[2:], *TURNS[2:]]}))


def _config(folder):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(hf_world.build("qwen2_5_vl", folder))


def _written(folder, template):
    (folder / "own.jinja").write_text(template)
    return str(folder / "own.jinja")


def test_missing_templates_say_what_to_do(folder):
    with pytest.raises(ValueError, match="no such file"):
        load_processor(str(folder / "qwen2_5_vl"), _config(folder), None, "nowhere.jinja")


def test_answers_are_carried_over_where_the_processor_writes_more():
    """Time stamps and tile marks between the pictures; a lost answer is an error."""
    visual = {100, 101}
    plain, answers = [1, 5, 100, 6, 7, 8, 100, 9], [False] * 4 + [True] * 2 + [False, True]
    full = [1, 5, 70, 100, 100, 71, 72, 100, 6, 7, 8, 70, 100, 9]
    assert [place for place, mark in enumerate(spread(plain, answers, full, visual)) if mark] == [9, 10, 13]
    with pytest.raises(BadSampleError, match="other tokens"):
        spread(plain, answers, [1, 5, 100, 6, 100, 9], visual)


def test_a_blank_row_teaches_nothing_and_keeps_the_batch_whole(chats):
    chat = chats["llava_next"]
    blank = blank_row(chat, "image", 8)
    assert (blank["labels"] == IGNORE_INDEX).all() and blank["pixel_values"].shape[0] == 1
    sample = chat.sample(chat.fit(messages_of(RECORD, chat.end_mark)), PICTURES, [])
    pad = {"input_ids": 7, "labels": IGNORE_INDEX, "attention_mask": 0}
    batch = collate([sample, blank], pad)
    tiles = max(sample["pixel_values"].shape[1], blank["pixel_values"].shape[1])
    assert batch["pixel_values"].shape[:2] == (3, tiles) and batch["image_sizes"].shape == (3, 2)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    rest = blank["input_ids"].shape[1]
    short = 0 if rest > sample["input_ids"].shape[1] else 1
    assert (batch["attention_mask"][short].sum() == min(rest, sample["input_ids"].shape[1])) and (
        batch["input_ids"][short][batch["attention_mask"][short] == 0] == 7
    ).all()


def test_videos_become_frames(chats):
    chat = chats["video_llava"]
    record = {"video": "a.gif", "conversations": [{"from": "human", "value": "<video>\nwhat?"}, TURNS[3]]}
    labelled = chat.fit(messages_of(record, chat.end_mark))
    sample = chat.sample(labelled, [], [[PICTURES[0]] * 8])
    assert sample["pixel_values_videos"].shape == (1, 8, 3, hf_world.SIDE, hf_world.SIDE)
    assert (sample["input_ids"] == chat.processor.video_token_id).sum() == 8 * 37
    assert learned(chat, sample) == ["no more</s>"]


def test_records_with_videos_are_checked():
    video = {"id": "v", "video": "a.gif", "conversations": [{"from": "human", "value": "<video> what?"}, TURNS[3]]}
    check_record(video, videos=True)
    with pytest.raises(BadSampleError, match="videos are not supported"):
        check_record(video)
    with pytest.raises(BadSampleError, match="fewer <video> marks than videos: 1 for 2"):
        check_record(video | {"video": ["a.gif", "b.gif"]}, videos=True)
    with pytest.raises(BadSampleError, match="'video' must be a path"):
        check_record(video | {"video": 3}, videos=True)
