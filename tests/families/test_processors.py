"""Conversations through transformers' own processors and chat templates, into ``generate`` as it is."""

import numpy as np
import pytest
import torch
import transformers as hf
from models import ANYRES, CASES, IMAGE, SIDE, VIDEO
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import duet

WORDS = ["user", "assistant", "what", "is", "in", "the", "picture", "first", "second", "and", ":", "?"]
SPECIAL = {
    "<pad>": 0,
    "<s>": 1,
    "</s>": 2,
    "<image>": IMAGE,
    "<video>": VIDEO,
    "<img>": 103,
    "</img>": 104,
    "<unk>": 105,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% elif part['type'] == 'video' %}<video> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)
SQUARE, SHORT = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
CLIP = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def tokenizer():
    words = SPECIAL | {word: 3 + number for number, word in enumerate(WORDS)}
    filler = {f"w{number}": number for number in range(110) if number not in words.values()}
    backend = Tokenizer(models.WordLevel(filler | words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("image_token", "video_token", "start_image_token", "end_image_token", "context_image_token")
    tokens = ("<image>", "<video>", "<img>", "</img>", "<image>")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", extra_special_tokens=dict(zip(names, tokens, strict=True)),
    )  # fmt: skip


def processor(family):
    given = {"tokenizer": tokenizer(), "chat_template": TEMPLATE}
    if family == "llava":
        return hf.LlavaProcessor(
            image_processor=hf.CLIPImageProcessorPil(size=SHORT, crop_size=SQUARE), **given, **CLIP
        )
    tiles = hf.LlavaNextImageProcessorPil(size=SHORT, crop_size=SQUARE, **ANYRES)
    if family == "llava_next":
        return hf.LlavaNextProcessor(image_processor=tiles, **given, **CLIP)
    if family == "llava_next_video":
        frames = hf.LlavaNextVideoVideoProcessor(size=SHORT, crop_size=SQUARE)
        return hf.LlavaNextVideoProcessor(image_processor=tiles, video_processor=frames, **given, **CLIP)
    if family == "video_llava":
        images = hf.VideoLlavaImageProcessor(size=SHORT, crop_size=SQUARE)
        frames = hf.VideoLlavaVideoProcessor(size=SHORT, crop_size=SQUARE)
        return hf.VideoLlavaProcessor(image_processor=images, video_processor=frames, **given, patch_size=4)
    if family == "internvl":
        images = hf.GotOcr2ImageProcessorPil(size=SQUARE, max_patches=4, crop_to_patches=True)
        frames = hf.InternVLVideoProcessor(size=SQUARE)
        return hf.InternVLProcessor(image_processor=images, video_processor=frames, image_seq_length=9, **given)
    images = hf.LlavaOnevisionImageProcessorPil(size=SQUARE, **ANYRES)
    frames = hf.LlavaOnevisionVideoProcessor(size=SQUARE)
    return hf.LlavaOnevisionProcessor(
        image_processor=images, video_processor=frames, num_image_tokens=36, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_3", **given,
    )  # fmt: skip


def conversations(video):
    rng = np.random.default_rng(0)
    pixels = lambda *shape: rng.integers(0, 255, (*shape, 3), dtype=np.uint8)  # noqa: E731
    wide, square, tall = (
        {"type": "image", "image": Image.fromarray(pixels(*s))} for s in ((40, 64), (30, 30), (90, 20))
    )
    say = lambda text: {"type": "text", "text": text}  # noqa: E731
    users = [
        [wide, say("what is in the picture ?")],
        [square, say("first and"), tall, say("second ?")],
        [say("what is first ?")],
    ]
    if video:
        users.append([{"type": "video", "video": pixels(3, 30, 40)}, say("what is first ?")])
    return [[{"role": "user", "content": content}] for content in users]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "entering"),
    [
        ("llava", [10, 20, 0]),
        ("llava_next", [50, 90, 0]),  # five passes; five and four
        ("video_llava", [10, 20, 0, 30]),
        ("llava_onevision", [35, 14, 0, 21]),  # several images take one pass each
        ("llava_next_video", [35, 63, 0, 21]),
        ("internvl", [21, 42, 0, 21]),  # two tiles and a thumbnail; one, and four with one
    ],
)
def test_chat_templates_and_generate(family, entering):
    video = len(entering) == 4
    if video:
        pytest.importorskip("torchvision", reason="transformers' video processors need torchvision")
    case = CASES[family]
    model = case.build()
    inputs = processor(family).apply_chat_template(
        conversations(video and family != "llava"), tokenize=True, add_generation_prompt=True, return_dict=True,
        padding=True, return_tensors="pt",
    )  # fmt: skip
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    plain = model.generate(**inputs, **options)
    with duet.attach(model, case.config), duet.trace() as record:
        assert model.generate(**inputs, **options).shape == plain.shape
    assert record.passes[0][0].visual == [count for count in entering for _ in range(2)]  # two beams each
    with duet.attach(model, case.noops[-1]):
        assert torch.equal(model.generate(**inputs, **options), plain)
