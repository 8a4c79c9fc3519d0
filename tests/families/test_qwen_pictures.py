"""Pictures as the models' own processors hand them over: tiny, long and thin, in chats, with or without neighbours."""

import numpy as np
import pytest
import qwen_models as qwen
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import duet
from duet import DuetConfig

CONFIG = DuetConfig(dominant=3, contextual=1, schedule={1: 0.5, 3: 0.0})
PROCESSORS = {
    "qwen2_5_vl": hf.Qwen2_5_VLProcessor, "qwen2_vl": hf.Qwen2VLProcessor, "qwen3_vl": hf.Qwen3VLProcessor,
}  # fmt: skip
SPECIAL = {
    "<|image_pad|>": qwen.IMAGE, "<|video_pad|>": qwen.VIDEO,
    "<|vision_start|>": qwen.START, "<|vision_end|>": qwen.END,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{m.role}} {% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{c.text}}{% endif %} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(params=qwen.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return qwen.build(family)


def picture(height, width):
    values = np.random.RandomState(height * 7 + width).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def image_processor():
    return hf.Qwen2VLImageProcessorPil(
        patch_size=qwen.PATCH, merge_size=qwen.MERGE, temporal_patch_size=2, min_pixels=64 * 2, max_pixels=64 * 30
    )


def make_processor(family):
    """The family's processor with a tokenizer of a few words; its video part would need torchvision."""
    words = {w: i for i, w in enumerate(("<unk>", "<pad>", "user", "assistant", "what", "is", "this"))}
    tokenizer = Tokenizer(models.WordLevel(words | SPECIAL, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    host = PROCESSORS[family]

    class WithoutVideos(host):
        def check_argument_for_proper_class(self, argument_name, argument):
            if argument_name != "video_processor":
                super().check_argument_for_proper_class(argument_name, argument)

    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", padding_side="left",
        additional_special_tokens=list(SPECIAL),
    )  # fmt: skip
    return WithoutVideos(
        image_processor=image_processor(), tokenizer=fast, video_processor=None, chat_template=TEMPLATE
    )


def chat(processor, turns):
    """Inputs of a batch of chats; a turn is a list of words and pictures."""
    content = [
        [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in turn]
        for turn in turns
    ]
    messages = [[{"role": "user", "content": entry}] for entry in content]
    return processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip


@torch.no_grad()
def test_chats_through_the_own_processor_generate_attached(model, family):
    processor = make_processor(family)
    turns = [
        ["what is this", picture(40, 24)],
        [picture(1, 1), "is this", picture(8, 150)],
        ["what is what"],
        [picture(3, 500), "what"],
    ]
    batch = dict(chat(processor, turns))
    with duet.attach(model, CONFIG), duet.trace() as trace:
        together = model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert trace.passes[0][0].visual == [4, 4 + 4, 0, 4]
        assert [len(image.source) for image in trace.images] == [4] * 4
        for row, turn in enumerate(turns):
            alone = model.generate(**chat(processor, [turn]), max_new_tokens=4, do_sample=False)
            assert torch.equal(together[row, -4:], alone[0, -4:]), row


@torch.no_grad()
def test_a_picture_of_one_pixel_is_what_the_processor_makes_of_it(model, family):
    """It has fewer units than the budget, so that stage 1 leaves it alone and the trace counts that."""
    inputs = dict(chat(make_processor(family), [[picture(1, 1), "what is this"]]))
    units = int(inputs["image_grid_thw"].prod()) // qwen.MERGE**2
    plain = model(**inputs).logits
    with duet.attach(model, DuetConfig(dominant=870, contextual=154, schedule={})), duet.trace() as trace:
        assert torch.equal(model(**inputs).logits, plain)
    assert (units, trace.tower_passes, trace.whole_passes) == (4, 1, 1)
    with duet.attach(model, CONFIG), duet.trace() as trace:
        model(**inputs)
    assert trace.passes[0][0].visual == [4] and trace.whole_passes == 1


def test_an_aspect_ratio_that_the_processor_refuses_never_reaches_the_model(family):
    with pytest.raises(ValueError, match="aspect ratio"):
        chat(make_processor(family), [[picture(4, 1000)]])


@torch.no_grad()
def test_a_video_shorter_than_a_temporal_patch_is_one_frame(model, family):
    """The processors repeat the last frame until a temporal patch is full."""
    inputs = qwen.make_inputs(family, [(3, [("video", (1, 6, 8))], 5)])
    with duet.attach(model, CONFIG), duet.trace() as trace:
        assert model(**inputs).logits.isfinite().all()
    assert trace.passes[0][0].visual == [4]


@torch.no_grad()
def test_the_longest_and_the_smallest_picture_of_a_batch_do_not_mind_each_other(model, family):
    grids = [(1, 2, 2), (1, 2, 60), (1, 60, 2), (1, 18, 18)]
    samples = [(2, [("image", grid)], 3) for grid in grids]
    config = DuetConfig(dominant=0.3, contextual=0.1, schedule={2: 0.5})
    with duet.attach(model, config), duet.trace() as trace:
        together = model(**qwen.make_inputs(family, samples)).logits
        assert trace.passes[0][0].visual == [1, 9 + 3, 9 + 3, 24 + 8]
        for row, sample in enumerate(samples):
            alone = model(**qwen.make_inputs(family, [sample])).logits[0]
            assert torch.allclose(together[row, -len(alone) :], alone, atol=1e-5), grids[row]
