"""The Hugging Face scripts say what they will do, and what is missing, before anything is loaded."""

from __future__ import annotations

import json
import subprocess

import hf_world
import pytest
import train_world

from llava.train import launch
from llava.train.hf_plan import HfPlan
from llava.train.plan import main, resolve
from llava.train.plan_text import usage


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("hf_plan")


def plan_of(job="finetune_duet_hf", flags=(), accelerators=8, **env):
    found = resolve(job, env, list(flags), accelerators)
    assert isinstance(found, HfPlan)
    return found


def test_the_hf_script_on_eight_devices():
    plan = plan_of()
    text = plan.describe()
    assert "llava-hf/llava-1.5-7b-hf (llava)" in text and "scripts/zero3.json" in text
    assert "300 dominant + 7 contextual" in text and "0.5 after layer 16, 0 after layer 24 of 32" in text
    assert plan.stages[0].global_batch == 128 and plan.stages[0].steps == 5198
    assert not plan.can_run and "missing    data_path playground/data/llava_v1_5_mix665k.json" in text
    command = launch.training_command(plan.devices, plan.stages[0].arguments(), 1, plan.job.module)
    assert "llava.train.train_hf" in command and command[command.index("--duet_tokens") + 1] == "192"


def test_a_model_on_disk_gets_its_own_budget(models):
    model = hf_world.build("qwen2_5_vl", models)
    path, images = hf_world.write_records(models / "data")
    env = {"BASE_MODEL": str(model), "FINETUNE_DATA": str(path), "FINETUNE_IMAGES": str(images)}
    plan = plan_of(**env)
    assert plan.model_type == "qwen2_5_vl" and plan.tokens == "640" and plan.can_run
    assert "870 dominant + 154 contextual" in plan.describe() and plan.stages[0].records == 8
    lora = plan_of(flags=["--lora_enable", "True"], **env)
    assert "LoRA adapters (rank 128)" in lora.describe() and str(lora.stages[0].output).endswith("finetune-lora")
    assert plan_of(**env, DUET_TOKENS="0").reduction is None
    flags = "--dominant 9 --contextual 1 --layer_list [2] --image_token_ratio_list [0]"
    own = plan_of(flags=flags.split(), **env)
    assert own.reduction.dominant == 9 and "--duet_tokens" not in own.stages[0].arguments()


def test_what_cannot_be_known_or_does_not_exist(models):
    unknown = plan_of(BASE_MODEL="someone/some-model")
    assert "type not known before it is fetched" in unknown.describe() and "missing    budget" in unknown.describe()
    assert "640 on average" in plan_of(BASE_MODEL="someone/some-model", DUET_TOKENS="640").describe()
    nowhere = plan_of(BASE_MODEL="./nowhere")
    assert not nowhere.can_run and "missing    model ./nowhere" in nowhere.describe()
    (models / "config.json").write_text(json.dumps({"model_type": "blip_2"}))
    with pytest.raises(ValueError, match=r"'blip_2'.*supported: .*docs/add-a-family\.md"):
        plan_of(BASE_MODEL=str(models))
    with pytest.raises(ValueError, match="RECIPE=huge: expected hf"):
        plan_of(RECIPE="huge")
    with pytest.raises(ValueError, match="has rows"):
        plan_of(DUET_TOKENS="77")


def test_the_video_script():
    plan = plan_of("finetune_duet_video")
    text = plan.describe()
    assert "LanguageBind/Video-LLaVA-7B-hf (video_llava)" in text and "scripts/zero2.json" in text
    assert "160 dominant + 32 contextual" in text and plan.stages[0].global_batch == 128
    missing = [item.what for item in plan.missing]
    assert any("videochatgpt_tune_.json" in what for what in missing) and any(
        "nlp_tune.json" in what for what in missing
    )
    assert "20 dominant + 7 contextual" in plan_of("finetune_duet_video", DUET_TOKENS="136").describe()
    tiny = plan_of("finetune_duet_video", accelerators=0)
    assert "40 dominant + 8 contextual" in tiny.describe() and tiny.can_run
    assert [command[2] for _, command in tiny.after()] == ["playground.tiny.evaluate_video"]


def test_videos_need_a_reader(models, monkeypatch):
    record = {"id": "v", "video": "a.mp4", "conversations": [{"from": "human", "value": "<video>"}]}
    (models / "v.json").write_text(json.dumps([record]))
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "av" else real(name, *rest))
    plan = plan_of("finetune_duet_video", FINETUNE_DATA=str(models / "v.json"), FINETUNE_IMAGES=str(models))
    assert "missing    package av" in plan.describe() and not plan.can_run


def test_both_scripts_print_their_plan(capsys):
    for job in ("finetune_duet_hf", "finetune_duet_video"):
        script = train_world.ROOT / "scripts" / f"{job}.sh"
        assert job in script.read_text() and script.stat().st_mode & 0o100
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert main([job, "--plan"]) == 0
        assert f"plan: {job}" in capsys.readouterr().out
        assert job in usage({"X": "y"})
    assert main(["finetune_duet_hf"]) == 2  # its data is missing
