"""Hugging Face models in their real architectures: they learn, resume, save what transformers reads, and refuse."""

from __future__ import annotations

import json
import sys

import hf_world
import pytest
import torch
import train_world
from test_train_resume import forget_after

import duet
from duet import DuetConfig
from llava.train.hf_arguments import parse_hf_arguments
from llava.train.records import BadSampleError
from llava.train.train_hf import run

LORA = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.1}


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory):
    return tmp_path_factory.mktemp("hf_models")


@pytest.fixture
def train_hf(hf_models, tmp_path):
    """Run a training in this process."""

    def go(family, data=None, output="out", **flags):
        model = hf_world.build(family, hf_models)
        data = data or hf_world.write_records(tmp_path / "data")
        return run(parse_hf_arguments(hf_world.command_line(tmp_path, family, model, data, output, **flags)))

    return go


@pytest.mark.parametrize("family", hf_world.FAMILIES)
def test_the_loss_falls_and_the_result_is_the_familys_own(train_hf, tmp_path, family):
    import transformers as hf

    train_hf(family, max_steps=24, save_steps=24, lr_scheduler_type="constant")
    losses = train_world.losses(tmp_path)
    assert losses[24] < 0.7 * losses[1]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == family and config["duet"]["dominant"] == int(hf_world.REDUCTION[family][0])
    loaded, report = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert duet.attach(loaded).config.schedule == {1: 0.5, 3: 0.0}
    figures = [line for line in train_world.figures(tmp_path) if "loss" in line]
    assert all(line["visual_tokens_from_layer_3"] == 0 for line in figures if "visual_tokens_from_layer_3" in line)
    assert any(line["seconds_vision"] > 0 for line in figures)


@pytest.mark.parametrize(
    ("family", "kind"), [("llava", "full"), ("llava_next", "lora"), ("qwen2_5_vl", "full"), ("qwen2_5_vl", "lora")]
)
def test_resumed_losses_equal_the_uninterrupted_ones(train_hf, tmp_path, family, kind):
    flags = {"max_steps": 7, "save_steps": 5} | (LORA if kind == "lora" else {})
    train_hf(family, **flags)
    whole = train_world.losses(tmp_path)
    forget_after(tmp_path / "out", 5)
    (tmp_path / "out" / "train_log.jsonl").unlink()
    train_hf(family, **flags)
    resumed = train_world.losses(tmp_path)
    assert sorted(resumed) == [6, 7]
    assert max(abs(resumed[step] - whole[step]) for step in resumed) < 1e-5


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_output_folders_and_checkpoints_are_respected_as_in_llavas_own_training(train_hf, tmp_path, caplog, kind):
    from safetensors.torch import load_file, save_file

    from llava.train.checkpoints import CheckpointError
    from llava.train.folder_lock import exclusive

    flags = {"max_steps": 3, "save_steps": 2, "lr_scheduler_type": "constant"} | (LORA if kind == "lora" else {})
    train_hf("llava", **flags)
    out, weights = tmp_path / "out", "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    before = (out / weights).read_bytes()
    assert train_hf("llava", **flags) is False and "finished: nothing is trained" in caplog.text
    assert (out / weights).read_bytes() == before
    with pytest.raises(CheckpointError, match=r"other settings \(learning_rate: .* -> 1e-05\)"):
        train_hf("llava", **flags | {"learning_rate": 1e-5})
    with exclusive(out), pytest.raises(CheckpointError, match="in use by another run"):
        train_hf("llava", **flags)
    saved = out / "checkpoint-2"
    (saved / "checkpoint_complete.json").unlink()
    whole = load_file(saved / weights)
    name = next(name for name in whole if "lora_A" in name or "q_proj" in name)
    save_file({key: value for key, value in whole.items() if key != name}, saved / weights, metadata={"format": "pt"})
    with pytest.raises((CheckpointError, ValueError), match=r"1 (adapter )?weights are"):
        train_hf("llava", output="new", resume_from_checkpoint=saved, **flags)
    for path in (saved / weights, saved / "optimizer.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match=rf"{weights} is missing \(weights\); optimizer\.pt is missing"):
        train_hf("llava", output="new", resume_from_checkpoint=saved, **flags)


def test_lora_saves_an_adapter_that_peft_loads(train_hf, hf_models, tmp_path):
    import peft
    import transformers as hf

    train_hf("llava", max_steps=4, **LORA)
    out = tmp_path / "out"
    for folder in (out, out / "checkpoint-2"):
        assert (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_config.json").is_file()
        assert "duet" in json.loads((folder / "config.json").read_text())
    base = hf.LlavaForConditionalGeneration.from_pretrained(hf_world.build("llava", hf_models))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(base, out).merge_and_unload()
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert any("language_model" in name for name in changed) and any("projector" in name for name in changed)
    assert not any("vision_tower" in name or "embed_tokens" in name for name in changed)


def test_checkpointing_and_the_blank_row_do_not_change_the_loss(train_hf, tmp_path, monkeypatch):
    train_hf("llava", output="plain", max_steps=2)
    train_hf("llava", output="saving", max_steps=2, gradient_checkpointing=True)
    from llava.train import hf_data

    class Always(hf_data.HfCollator):
        """Adds the blank row to every batch, as a batch without pictures gets it on several ranks."""

        def __call__(self, instances):
            rows = [instance["inputs"] for instance in instances]
            return hf_data.collate([*rows, hf_data.blank_row(chat_of(instances), "image", 8)], self.pad)

    def chat_of(_):
        return made[0]

    made = []
    from llava.train import train_hf as module

    original = module.load_data

    def load_data(args, chat, videos):
        made.append(chat)
        data = original(args, chat, videos)
        data["data_collator"].collator = Always(chat, [], 8)
        return data

    monkeypatch.setattr(module, "load_data", load_data)
    train_hf("llava", output="blank", max_steps=2)
    plain, saving, blank = (train_world.losses(tmp_path, name) for name in ("plain", "saving", "blank"))
    assert plain == pytest.approx(saving, abs=1e-5) and plain == pytest.approx(blank, abs=1e-5)


def test_parts_that_learn(train_hf, tmp_path):
    """Projector only: everything else stays as it was."""
    from safetensors.torch import load_file

    train_hf("llava", max_steps=2, mm_tunable_parts="mm_mlp_adapter")
    first, second = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("checkpoint-2", ""))
    base = load_file(next((tmp_path.parent).rglob("hf_models*/llava/model.safetensors")))
    assert {name for name in second if not torch.equal(second[name], base[name])} == {
        name for name in second if "projector" in name
    }
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_without_reduction_and_with_the_papers_budget(train_hf, tmp_path):
    train_hf("llava", output="full", max_steps=1, dominant=None, contextual=None, layer_list=None,
             image_token_ratio_list=None, duet_tokens=0)  # fmt: skip
    assert "duet" not in json.loads((tmp_path / "full" / "config.json").read_text())
    none = {"dominant": None, "contextual": None, "layer_list": None, "image_token_ratio_list": None}
    with pytest.raises(ValueError, match=r"dominant \+ contextual"):  # 192 tokens of a tower with 36
        train_hf("llava", output="preset", max_steps=1, duet_tokens=192, **none)
    with pytest.raises(ValueError, match="has rows"):
        train_hf("qwen2_5_vl", output="preset", max_steps=1, duet_tokens=192, **none)
    train_hf("qwen2_5_vl", output="preset", max_steps=1, duet_tokens=640, **none)
    config = json.loads((tmp_path / "preset" / "config.json").read_text())
    assert config["duet"]["dominant"] == DuetConfig.preset("qwen2.5-vl-7b", tokens=640).dominant


def test_a_dry_run_shows_what_is_learned_and_leaves_nothing(train_hf, tmp_path, capsys):
    train_hf("qwen2_5_vl", dry_run=True)
    shown = capsys.readouterr().out
    assert "record r0:" in shown and "supervised 'a thing number 0<|im_end|>'" in shown
    assert "one step: loss" in shown and "everything works" in shown
    assert not list((tmp_path / "out").glob("*dry*")) and not (tmp_path / "out" / "run_complete.json").exists()


def test_a_model_type_that_is_not_supported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip_2"}))
    with pytest.raises(ValueError, match=r"'blip_2'.*supported: .*llava_next.*docs/add-a-family\.md"):
        run(parse_hf_arguments(["--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "out")]))


def test_flags_that_mean_nothing_here():
    with pytest.raises(ValueError, match="--model_name_or_path is needed"):
        parse_hf_arguments([])
    with pytest.raises(ValueError, match="--mm_tunable_parts"):
        parse_hf_arguments(["--model_name_or_path", "x", "--mm_tunable_parts", "mm_nothing"])
    with pytest.raises(ValueError, match="finetune_duet_qlora"):
        parse_hf_arguments(["--model_name_or_path", "x", "--bits", "4", "--lora_enable", "True"])
    with pytest.raises(ValueError, match="--vision_tower is not a training flag"):
        parse_hf_arguments(["--model_name_or_path", "x", "--vision_tower", "y"])


def test_videos_are_trained_on(train_hf, tmp_path):
    """Clips of 3 and of 12 frames, images, text; a short clip shows frames more than once."""
    data = hf_world.write_videos(tmp_path / "clips")
    train_hf("video_llava", data, max_steps=12, lr_scheduler_type="constant")
    losses = train_world.losses(tmp_path)
    assert losses[12] < losses[1]
    entering = [line["visual_tokens_entering"] for line in train_world.figures(tmp_path) if "loss" in line]
    assert max(entering) == 8 * 10  # 8 frames of 8 + 2 tokens


@pytest.fixture
def one_video(tmp_path):
    """A data set of one video record, whose file the test writes."""

    def make(name):
        turns = [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "this"}]
        record = {"id": "clip", "video": name, "conversations": turns}
        (tmp_path / "v.json").write_text(json.dumps([record] * 2))
        return tmp_path / "v.json", tmp_path

    return make


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.gif", None, "id clip.*video 'gone.gif'.*does not exist"),
        ("empty.gif", b"", r"id clip.*empty \(0 bytes\)"),
        ("torn.gif", b"GIF89a-nothing", "id clip.*cannot be decoded"),
        ("no.txt", b"text", "id clip.*has none of the suffixes"),
    ],
)
def test_unreadable_videos_are_named_before_the_first_step(train_hf, tmp_path, one_video, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadSampleError, match=message):
        train_hf("video_llava", one_video(name), scan_images="decode")
    assert not (tmp_path / "out" / "train_log.jsonl").exists()


def test_videos_without_a_reader(train_hf, tmp_path, one_video, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"not looked at")
    monkeypatch.setitem(sys.modules, "av", None)
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "av" else real(name, *rest))
    with pytest.raises(ImportError, match=r"PyAV.*pip install"):
        train_hf("video_llava", one_video("a.mp4"))


def test_a_family_without_videos_says_so(train_hf, tmp_path):
    with pytest.raises(BadSampleError, match="videos are not supported"):
        train_hf("llava", hf_world.write_videos(tmp_path / "clips"))
