"""LLaVA-1.6 checkpoints in LLaVA's and llava-hf's layouts give the logits of transformers' own LLaVA-NeXT."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from model_helpers import edit_config, edit_weights
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
from v16_world import PINPOINTS, SIZES, TILE, picture, write_original, write_tower

import duet
from duet import DuetConfig
from llava.conversation import conv_templates
from llava.convert import chat_template, convert, extract_projector, main, tiling_processor
from llava.eval.generate import template_for
from llava.eval.plans import read_geometry
from llava.mm_utils import process_images
from llava.model.anyres import Tiling
from llava.model.builder import load_pretrained_model

REDUCED = DuetConfig(dominant=9, contextual=3, cluster_width=2, schedule={1: 0.5, 3: 0.0})


def load(path, name="says-nothing", **kwargs):
    return load_pretrained_model(str(path), None, name, device="cpu", **kwargs)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights in LLaVA's layout, in llava-hf's, and back in LLaVA's."""
    root = tmp_path_factory.mktemp("v16")
    original = write_original(root / "llava-v1.6-vicuna-tiny", write_tower(root / "tower"))
    assert main(["--from", str(original), "--to", "hf", "--out", str(root / "hf")]) == 0
    assert main(["--from", str(root / "hf"), "--to", "llava", "--out", str(root / "back")]) == 0
    return {"original": original, "hf": root / "hf", "back": root / "back"}


@pytest.fixture(scope="module")
def host(folders):
    return LlavaNextForConditionalGeneration.from_pretrained(folders["hf"]).eval()


@pytest.fixture(scope="module")
def models(folders):
    return {name: load(path) for name, path in folders.items()}


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_budgets_are_the_papers_rows_for_tiles(folders, layout):
    row = DuetConfig.preset("llava-next-7b", 640)
    assert (row.dominant, row.contextual) == (170, 35)
    with pytest.raises(ValueError, match=r"170 \+ 35"):  # the paper's row, which the tests' small tower cannot fill
        load(folders[layout], duet_tokens=640)
    with pytest.raises(ValueError, match=r"'llava-next-7b' has rows \[160, 320, 640\], not 192"):
        load(folders[layout], duet_tokens=192)
    assert read_geometry(str(folders[layout]), None).preset == "llava-next-7b"


def batch(model, image_processor, tokenizer):
    """Rows with one picture of every shape, one with two, and one with text only; padded on the right."""
    pictures = [picture(size, seed) for seed, size in enumerate([*SIZES, SIZES[0], SIZES[2]])]
    rows = [[1, 5 + seed, -200, 40 + seed, 50] for seed in range(len(SIZES))]
    rows += [[1, 7, 8, 9], [1, -200, 12, -200, 13, 14]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    pixels = process_images(pictures, image_processor, model.config)
    return {
        "input_ids": ids, "attention_mask": mask, "images": pixels, "image_sizes": [one.size for one in pictures]
    }  # fmt: skip


def host_inputs(host, inputs):
    """The same batch as transformers' LLaVA-NeXT takes it: one placeholder per token, sizes (height, width)."""
    passes = max(len(pixels) for pixels in inputs["images"])
    padded = [torch.cat([p, p.new_zeros(passes - len(p), *p.shape[1:])]) for p in inputs["images"]]
    pixels, sizes = torch.stack(padded), torch.tensor([(height, width) for width, height in inputs["image_sizes"]])
    with torch.no_grad():
        counts = iter([len(x) for x in host.model.get_image_features(pixels, sizes).pooler_output])
    rows = []
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        valid = [token for token, keep in zip(ids, mask, strict=True) if keep]
        rows.append([y for x in valid for y in ([host.config.image_token_id] * next(counts) if x == -200 else [x])])
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "pixel_values": pixels,
        "image_sizes": sizes,
    }


@torch.no_grad()
def logits(model, inputs, vocabulary=2000):
    """Logits at valid positions, row by row."""
    if "images" in inputs:
        spliced = model.prepare_inputs_labels_for_multimodal(
            inputs["input_ids"], None, inputs["attention_mask"], None, None, inputs["images"], inputs["image_sizes"]
        )
        mask = spliced[2].bool()
    else:
        mask = inputs["attention_mask"].bool()
    out = model(**inputs).logits[..., :vocabulary]
    return [row[keep] for row, keep in zip(out, mask, strict=True)]


def test_both_layouts_give_transformers_logits(models, host):
    tokenizer, model, image_processor, _ = models["original"]
    inputs = batch(model, image_processor, tokenizer)
    expected = logits(host, host_inputs(host, inputs))
    for name, (_, other, processor, _) in models.items():
        got = logits(other, batch(other, processor, tokenizer))
        for row, wanted in zip(got, expected, strict=True):
            assert row.shape == wanted.shape, name
            torch.testing.assert_close(row, wanted, atol=1e-4, rtol=0, msg=name)
    assert len({len(row) for row in expected}) > 5


def test_every_sample_alone_is_what_it_is_in_the_batch(models):
    tokenizer, model, image_processor, _ = models["original"]
    inputs = batch(model, image_processor, tokenizer)
    together, first = logits(model, inputs), 0
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        count = int((ids == -200).sum())
        own = {"images": inputs["images"][first : first + count], "image_sizes": inputs["image_sizes"][first:][:count]}
        first += count
        with torch.no_grad():
            alone = model(input_ids=ids[mask.bool()][None], **(own if count else {})).logits[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("padding", [True, False], ids=["placeholder", "none"])
def test_reduction_is_the_same_as_attached_to_transformers_model(models, host, padding):
    """Same tokens from the same weights, in the same order, with the same records; a text-only row changes nothing."""
    tokenizer, model, image_processor, _ = models["original"]
    inputs = batch(model, image_processor, tokenizer)
    theirs = host_inputs(host, inputs)
    if padding:  # what a training batch brings for the text-only row
        inputs["images"].insert(len(SIZES), torch.zeros(1, 3, TILE, TILE))
        inputs["image_sizes"].insert(len(SIZES), (TILE, TILE))
    for config in (
        REDUCED,
        DuetConfig(dominant=9, contextual=3, schedule={1: 0.5}, variant="release"),
        DuetConfig(dominant=31, contextual=6, schedule={}, per="picture"),
        DuetConfig(dominant=36, contextual=0, schedule={2: 0.5}),
        DuetConfig(stage1="visionzip", dominant=9, contextual=3, schedule={}),
        DuetConfig(stage1="hired", dominant=10, contextual=0, schedule={}),
    ):
        with duet.attach(host, config), duet.trace() as wanted:
            expected = host(**theirs).logits[..., :2000]
        model.set_reduction(config)
        try:
            with duet.trace() as seen:
                got = model(**inputs).logits
        finally:
            model.set_reduction(None)
        assert [layer.visual for layer in seen.passes[0]] == [layer.visual for layer in wanted.passes[0]]
        ours = [(image.source, image.kind, image.members, image.grid) for image in seen.images]
        del ours[2 * len(SIZES) : 2 * len(SIZES) + padding]
        assert ours == [(image.source, image.kind, image.members, image.grid) for image in wanted.images]
        rows = wanted.passes[0][-1].tokens
        assert rows == seen.passes[0][-1].tokens
        for row, length in enumerate(rows):
            torch.testing.assert_close(got[row, :length], expected[row, :length], atol=1e-4, rtol=0)


def test_what_is_written(folders):
    keys = set(load_file(folders["original"] / "model.safetensors"))
    assert "model.image_newline" in keys
    assert "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding" in keys
    assert set(load_file(folders["back"] / "model.safetensors")) == keys
    hub = set(load_file(folders["hf"] / "model.safetensors"))
    assert {"image_newline", "language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"} <= hub
    config = json.loads((folders["hf"] / "config.json").read_text())
    assert config["model_type"] == "llava_next" and config["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert config["image_grid_pinpoints"] == [[height, width] for width, height in PINPOINTS]
    back = json.loads((folders["back"] / "config.json").read_text())
    assert back["image_grid_pinpoints"] == PINPOINTS and back["mm_patch_merge_type"] == "spatial_unpad"
    assert back["image_aspect_ratio"] == "anyres" and back["vocab_size"] == 2000
    assert back["mm_unpad_rounded"] is False


def test_llava_hf_checkpoints_from_the_hub_unpad_as_transformers(folders, models, host, tmp_path):
    """A folder that says nothing about rounding is the hub's. Its preprocessing is in a file of LLaVA-NeXT's own."""
    folder = tmp_path / "hub"
    shutil.copytree(folders["hf"], folder)
    edit_config(folder, drop=("mm_unpad_rounded", "image_aspect_ratio", "mm_patch_merge_type"))
    (folder / "processor_config.json").unlink()
    tiling_processor(models["original"][2], PINPOINTS).save_pretrained(folder)
    name = folder / "preprocessor_config.json"
    name.write_text(name.read_text().replace("LlavaNextImageProcessorPil", "LlavaNextImageProcessor"))
    _, model, image_processor, _ = load(folder)
    ours = process_images([picture(SIZES[3])], models["original"][2], models["original"][1].config)
    assert torch.equal(process_images([picture(SIZES[3])], image_processor, model.config), ours)
    assert model.config.mm_unpad_rounded is True
    assert model.config.image_aspect_ratio == "anyres" and model.config.mm_patch_merge_type == "spatial_unpad"
    odd = next(
        (w, h)
        for w in range(20, 600)
        for h in range(20, 600)
        if _tokens(models["original"][1], (w, h)) != _tokens(model, (w, h))
    )
    processor = AutoProcessor.from_pretrained(folders["hf"])
    inputs = processor(images=picture(odd), text="<image>", return_tensors="pt")
    assert (inputs["input_ids"] == 2000).sum() == _tokens(model, odd) != _tokens(models["original"][1], odd)


def _tokens(model, size):
    return Tiling.of(model.config, model.get_vision_tower().config).layout(size).placeholders


def test_processors_agree(folders, models):
    """Tiles of transformers' processor for the same pinpoints are ours, up to rounding to 8 bits (0.015)."""
    _, model, image_processor, _ = models["original"]
    processor = AutoProcessor.from_pretrained(folders["hf"])
    for size in SIZES:
        ours = process_images([picture(size)], image_processor, model.config)[0]
        theirs = processor(images=picture(size), text="USER: <image>\nHi ASSISTANT:", return_tensors="pt")
        assert theirs["image_sizes"].tolist() == [[size[1], size[0]]]
        assert (theirs["input_ids"] == 2000).sum() == _tokens(model, size)
        torch.testing.assert_close(theirs["pixel_values"][0], ours, atol=0.02, rtol=0)
    for name, (_, other, processor, _) in models.items():
        again = process_images([picture(SIZES[0])], processor, other.config)[0]
        assert torch.equal(again, process_images([picture(SIZES[0])], image_processor, model.config)[0]), name


def test_generation_is_the_same_in_both_layouts(models):
    tokenizer, model, image_processor, _ = models["original"]
    inputs = batch(model, image_processor, tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": inputs["attention_mask"]}
    for config in (None, REDUCED):
        new = []
        for name in ("original", "hf"):
            models[name][1].set_reduction(config)
            new.append(
                models[name][1].generate(
                    inputs["input_ids"], images=inputs["images"], image_sizes=inputs["image_sizes"], **options
                )
            )
            models[name][1].set_reduction(None)
        assert torch.equal(*new) and len(new[0]) == len(inputs["input_ids"])


def test_mistral_and_the_reduction_survive(tmp_path):
    tower = write_tower(tmp_path / "tower")
    original = write_original(tmp_path / "llava-v1.6-mistral-tiny", tower, mistral=True, duet=REDUCED.to_dict())
    convert(str(original), "hf", str(tmp_path / "hf"))
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["text_config"]["model_type"] == "mistral"
    one, two = load(original), load(tmp_path / "hf")
    assert type(one[1]) is type(two[1]) and "Mistral" in type(two[1]).__name__ and two[1].reduction == REDUCED
    ids, pixels = torch.tensor([[1, 5, -200, 6]]), process_images([picture(SIZES[0])], one[2], one[1].config)
    with torch.no_grad():
        a, b = (m(input_ids=ids, images=pixels, image_sizes=[SIZES[0]]).logits for m in (one[1], two[1]))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = AutoProcessor.from_pretrained(tmp_path / "hf").apply_chat_template(chat, add_generation_prompt=True)
    assert text == "[INST] <image>\nWhat? [/INST]"


@pytest.mark.parametrize("name", ["mistral_instruct", "chatml_direct"])
def test_chat_templates_write_what_our_templates_write(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = conv_templates[name].copy()
    said = [("<image>\nWhat is it?", "A cup."), ("Which colour?", None)]
    chat = []
    for question, reply in said:
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], reply)
        picture_first = [{"type": "image"}] if question.startswith("<image>") else []
        text = question.removeprefix("<image>\n")
        chat.append({"role": "user", "content": [*picture_first, {"type": "text", "text": text}]})
        if reply is not None:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    rendered, _ = render_jinja_template([chat], chat_template=chat_template(conversation), add_generation_prompt=True)
    assert rendered[0] == conversation.get_prompt()


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("llava-v1.6-vicuna-7b", "vicuna_v1"),
        ("llava-v1.6-vicuna-13b-hf", "vicuna_v1"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("LLaVA-v1.6-Mistral-7b-hf", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-v1.6-34b-hf", "chatml_direct"),
    ],
)
def test_templates_of_published_names(name, template):
    assert template_for(name, SimpleNamespace()) == template


def test_missing_newlines_are_named(folders, tmp_path):
    for layout, key in (("original", "model.image_newline"), ("hf", "image_newline")):
        shutil.copytree(folders[layout], tmp_path / layout)
        edit_weights(tmp_path / layout, lambda state, key=key: {k: v for k, v in state.items() if k != key})
        with pytest.raises(ValueError, match=r"1 missing key\(s\): model\.image_newline"):
            load(tmp_path / layout)


def test_projector_files_carry_the_newline(folders, tmp_path):
    assert extract_projector(str(folders["hf"]), str(tmp_path / "p.safetensors")) == 5
    stored = load_file(tmp_path / "p.safetensors")
    assert torch.equal(
        stored["model.image_newline"], load_file(folders["original"] / "model.safetensors")["model.image_newline"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_patch_merge_type": "spatial"}, "'anyres' with 'spatial'"),
        ({"image_aspect_ratio": "pad"}, "'pad' with 'spatial_unpad'"),
    ],
)
def test_what_llava_hf_cannot_lay_out(folders, tmp_path, change, message, capsys):
    shutil.copytree(folders["original"], tmp_path / "m")
    edit_config(tmp_path / "m", **change)
    if change.get("mm_patch_merge_type") == "spatial":
        edit_weights(tmp_path / "m", lambda s: {k: v for k, v in s.items() if k != "model.image_newline"})
    assert main(["--from", str(tmp_path / "m"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 1
    assert message in capsys.readouterr().err


def test_other_llava_hf_families_are_refused(folders, tmp_path):
    shutil.copytree(folders["hf"], tmp_path / "m")
    edit_config(tmp_path / "m", model_type="llava_onevision")
    with pytest.raises(ValueError, match=r"'llava_onevision' is not supported here.*duet\.attach"):
        load(tmp_path / "m")
