"""The DUET flags, and the two inference commands on the golden model."""

import argparse
import io
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from model_helpers import GOLDEN, LLAVA
from transformers import HfArgumentParser

from duet import DuetConfig
from llava.eval import run_llava
from llava.reduction import ReductionArguments, parse_list, parse_queries, parse_schedule
from llava.serve import cli

PICTURE = str(GOLDEN / "images" / "coffee.png")


def parse(*argv):
    (hf,) = HfArgumentParser(ReductionArguments).parse_args_into_dataclasses(list(argv))
    parser = argparse.ArgumentParser()
    ReductionArguments.add_arguments(parser)
    assert ReductionArguments.from_namespace(parser.parse_args(list(argv))) == hf  # one group, the same everywhere
    return hf


def test_nothing_given_keeps_the_default():
    assert parse().to_config() is None
    default = DuetConfig(dominant=10, contextual=2)
    assert parse().to_config(default) is default


def test_released_spelling():
    flags = ["--layer_list", "[16,24]", "--image_token_ratio_list", "[0.5,0.0]", "--cluster_width", "4"]
    released = parse("--dominant_num", "300", "--context_num", "7", *flags, "--use_salient_tokens", "True")
    ours = parse("--dominant", "300", "--contextual", "7", *flags, "--queries", "salient")
    assert released.to_config() == ours.to_config()
    assert ours.to_config().schedule == {16: 0.5, 24: 0.0} and ours.to_config().depth is None
    assert parse("--compute_salient_tokens").to_config().queries == "salient"
    assert parse("--dominant", "100", "--use_salient_tokens", "False").to_config().queries == "last"
    assert parse("--use_salient_tokens", "False").to_config() is None


def test_budgets_scale_with_the_depth():
    config = parse("--duet_tokens", "192", "--variant", "release").to_config()
    assert config.variant == "release" and config.for_depth(8).schedule == {4: 0.5, 6: 0.0}
    assert parse("--duet_tokens", "0").to_config(DuetConfig()) is None
    with pytest.raises(ValueError, match="has no effect"):
        parse("--duet_tokens", "0", "--dominant", "3").to_config()
    with pytest.raises(ValueError, match="not 193"):
        parse("--duet_tokens", "193").to_config()


def test_a_whole_reduction_from_a_file(tmp_path):
    config = DuetConfig(dominant=9, contextual=3, schedule={2: 0.5}, salient_tokens=2, depth=4, queries=(0, -1), seed=5)
    alone, inside = tmp_path / "reduction.json", tmp_path / "config.json"
    alone.write_text(json.dumps(config.to_dict()))
    inside.write_text(json.dumps({"model_type": "llava_llama", "duet": config.to_dict()}))
    assert parse("--reduction_config", str(alone)).to_config(DuetConfig()) == config
    assert parse("--reduction_config", str(inside)).to_config() == config
    changed = parse("--reduction_config", str(alone), "--reduction_seed", "6").to_config()
    assert changed == replace(config, seed=6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as JSON.*No such file"),
        ("{", "cannot be read as JSON"),
        ("[1]", "reduction.json: "),
        ('{"dominnat": 3}', r"reduction.json: unknown field\(s\) dominnat"),
        ('{"model_type": "llava"}', "a model's configuration without a reduction"),
    ],
)
def test_a_wrong_reduction_file(tmp_path, content, message):
    path = tmp_path / "reduction.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse("--reduction_config", str(path)).to_config()
    with pytest.raises(ValueError, match="give one of them"):
        parse("--reduction_config", str(path), "--duet_tokens", "64").to_config()


def test_flags_change_only_what_they_name():
    default = DuetConfig(dominant=10, contextual=2, schedule={3: 0.5}, queries="all")
    changed = parse("--contextual", "4", "--queries", "[0,-1]").to_config(default)
    assert changed == DuetConfig(dominant=10, contextual=4, schedule={3: 0.5}, queries=(0, -1))
    assert parse("--stage1", "none", "--layer_list", "[]", "--image_token_ratio_list", "[]").to_config().is_noop(576)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layer_list", "[16,24]"], "--image_token_ratio_list is not given"),
        (["--image_token_ratio_list", "[0.5]"], "--layer_list is not given"),
        (["--layer_list", "[16,24]", "--image_token_ratio_list", "[0.5]"], "one ratio per layer"),
        (["--layer_list", "16;24", "--image_token_ratio_list", "[0.5]"], "no list of numbers"),
        (["--layer_list", "[24,16]", "--image_token_ratio_list", "[0.5,0]"], "must rise"),
        (["--layer_list", "[1.5]", "--image_token_ratio_list", "[0.5]"], "whole numbers"),
        (["--layer_list", "[2]", "--image_token_ratio_list", "[1.5]"], "1.5"),
        (["--layer_list", "[2,3]", "--image_token_ratio_list", "[0.2,0.5]"], "ratio"),
        (["--queries", "some"], "queries"),
        (["--queries", "[a]"], "no list of numbers"),
        (["--queries", "all", "--use_salient_tokens"], "contradicts"),
        (["--variant", "mine"], "variant"),
        (["--dominant", "-1"], "dominant"),
    ],
)
def test_bad_flags_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv).to_config()


def test_list_parsing():
    assert parse_list("layer_list", " [16, 24] ") == [16, 24] == parse_list("layer_list", "(16,24)")
    assert parse_list("layer_list", "16") == [16] and parse_list("layer_list", "16,24") == [16, 24]
    assert parse_schedule(None, None) is None and parse_queries("last") == "last"
    with pytest.raises(ValueError, match="in quotes"):
        parse_list("layer_list", "__import__('os')")


def test_template_choice():
    config = SimpleNamespace()
    for name, template in [
        ("llava-llama-2-13b", "llava_llama_2"), ("LLaVA-v1.6-Mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"), ("llava-v1.5-7b", "llava_v1"), ("llava-mpt-7b", "mpt"), ("t", "llava_v0"),
    ]:  # fmt: skip
        assert run_llava.choose_template(name, config) == template
    assert run_llava.choose_template("tiny", SimpleNamespace(conv_version="v1")) == "v1"
    assert run_llava.choose_template("llava-v1.5-7b", config, "vicuna_v1") == "vicuna_v1"
    with pytest.raises(ValueError, match="unknown conversation template"):
        run_llava.choose_template("x", config, "nope")


def test_where_pictures_go_in_a_question():
    plain, wrapped = SimpleNamespace(), SimpleNamespace(mm_use_im_start_end=True)
    assert run_llava.place_images("what?", 2, plain) == "<image>\n<image>\nwhat?"
    assert run_llava.place_images("a <image-placeholder> b", 1, plain) == "a <image> b"
    assert run_llava.place_images("what?", 1, wrapped) == "<im_start><image><im_end>\nwhat?"


def model_args(**kwargs):
    return SimpleNamespace(
        model_path=str(LLAVA), model_base=None, query="Describe the image concisely.", conv_mode="vicuna_v1",
        image_file=str(GOLDEN / "images" / "flower_tall.png"), sep=",", temperature=0, top_p=None, num_beams=1,
        max_new_tokens=6, device="cpu", **kwargs,
    )  # fmt: skip


def test_eval_model_gives_the_golden_answer(capsys):
    from model_helpers import tensors

    from llava.tokenization import load_tokenizer

    text = run_llava.eval_model(model_args())
    expected = tensors("llava_single_flower_tall")["greedy_ids"][0, :6]
    assert text == load_tokenizer(str(LLAVA)).decode(expected, skip_special_tokens=True).strip()
    assert capsys.readouterr().out.strip() == text
    assert run_llava.eval_model(model_args(duet_tokens=64)) != ""


def test_pictures_that_cannot_be_opened(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for path in (str(tmp_path / "broken.png"), str(tmp_path / "nope.png")):
        with pytest.raises(ValueError, match="cannot be read"):
            run_llava.load_image(path)
    assert run_llava.image_parser(SimpleNamespace(image_file="a.png, b.png", sep=",")) == ["a.png", "b.png"]
    assert run_llava.load_images([PICTURE])[0].mode == "RGB"


def test_run_llava_reports_errors(capsys):
    assert run_llava.main(["--model-path", str(LLAVA), "--image-file", "nope.png", "--query", "x"]) == 1
    assert "nope.png" in capsys.readouterr().err


def test_chat_from_a_pipe_streams_and_remembers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\nAnd <image> now?\n\nnever asked\n"))
    argv = ["--model-path", str(LLAVA), "--image-file", PICTURE, "--conv-mode", "vicuna_v1", "--temperature", "0"]
    assert cli.main([*argv, "--max-new-tokens", "4", "--duet_tokens", "192", "--debug", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert len(out.strip().splitlines()) == 2 and "USER" not in out
    assert "576 patches -> 307 visual tokens" in err and "191.75 on average" in err
    second = err.split("'prompt'")[2]
    assert second.count("<image>") == 1 and "And  now? ASSISTANT:" in second and "</s>USER" in second


def test_chat_takes_parsed_arguments_as_llavas_main_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\n"))
    names = {"model_path": str(LLAVA), "model_base": None, "image_file": PICTURE, "device": "cpu", "debug": False}
    more = {"conv_mode": "vicuna_v1", "temperature": 0.0, "max_new_tokens": 4, "load_8bit": False, "load_4bit": False}
    assert cli.main(argparse.Namespace(**names, **more)) == 0
    assert capsys.readouterr().out.strip()
    with pytest.raises(ValueError, match=r"nope\.png"):
        cli.main(SimpleNamespace(**(names | more | {"image_file": "nope.png"})))


def test_chat_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "llava.serve.cli", "--model-path", str(LLAVA), "--image-file", PICTURE,
         "--num_beams", "2", "--max_new_tokens", "3", "--temperature", "0"],
        input="Hi\n", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "no token reduction" in done.stderr
