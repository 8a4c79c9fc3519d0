"""What clients import, on a machine without the optional packages, and the small helpers of llava.utils."""

import ast
import asyncio
import inspect
import logging
import subprocess
import sys

import pytest
import torch

from llava import constants, utils
from llava.train import labels, sampler

OPTIONAL = ("flash_attn", "bitsandbytes", "deepspeed", "peft", "wandb", "datasets", "torchvision", "av", "gradio")
CLIENT_LINES = """
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.train.dataset import make_supervised_data_module
"""


def test_client_imports_need_no_optional_package():
    check = (
        f"import sys\n{CLIENT_LINES}\nprint(sorted(set({OPTIONAL!r}) & {{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == []


def test_constants():
    assert constants.IGNORE_INDEX == -100 and constants.IMAGE_TOKEN_INDEX == -200
    assert (constants.DEFAULT_IMAGE_TOKEN, constants.DEFAULT_IMAGE_PATCH_TOKEN) == ("<image>", "<im_patch>")
    assert (constants.DEFAULT_IM_START_TOKEN, constants.DEFAULT_IM_END_TOKEN) == ("<im_start>", "<im_end>")
    assert constants.IMAGE_PLACEHOLDER == "<image-placeholder>" and constants.LOGDIR == "."
    assert (constants.CONTROLLER_HEART_BEAT_EXPIRATION, constants.WORKER_HEART_BEAT_INTERVAL) == (30, 15)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (labels.preprocess, ["sources", "tokenizer", "has_image"]),
        (labels.preprocess_v1, ["sources", "tokenizer", "has_image"]),
        (labels.preprocess_llama_2, ["sources", "tokenizer", "has_image"]),
        (labels.preprocess_mpt, ["sources", "tokenizer", "has_image"]),
        (labels.preprocess_plain, ["sources", "tokenizer"]),
        (labels.preprocess_multimodal, ["sources", "data_args"]),
        (sampler.split_to_even_chunks, ["indices", "lengths", "num_chunks"]),
        (sampler.get_length_grouped_indices, ["lengths", "batch_size", "world_size", "generator", "merge"]),
        (sampler.get_modality_length_grouped_indices, ["lengths", "batch_size", "world_size", "generator"]),
        (sampler.LengthGroupedSampler, ["batch_size", "world_size", "lengths", "generator", "group_by_modality"]),
    ],
)
def test_signatures_start_as_in_llava(function, names):
    assert list(inspect.signature(function).parameters)[: len(names)] == names


def test_disable_torch_init_leaves_torch_alone():
    before = torch.nn.Linear.reset_parameters
    utils.disable_torch_init()
    assert torch.nn.Linear.reset_parameters is before


def test_rank0_print(capsys, monkeypatch):
    utils.rank0_print("loss", 0.5)
    assert capsys.readouterr().out == "loss 0.5\n"
    monkeypatch.setenv("RANK", "1")
    utils.rank0_print("hidden")
    assert capsys.readouterr().out == ""


def test_build_logger_writes_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stdout = sys.stdout
    logger = utils.build_logger("test-worker", "worker.log")
    assert utils.build_logger("test-worker", "worker.log") is logger
    logger.info("hello")
    for handler in logger.handlers:
        handler.flush()
    assert (tmp_path / "worker.log").read_text().count("hello") == 1
    assert sys.stdout is stdout
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)


def test_semaphore_text():
    assert utils.pretty_print_semaphore(None) == "None"
    assert utils.pretty_print_semaphore(asyncio.Semaphore(3)) == "Semaphore(value=3, locked=False)"


def test_moderation_without_an_answer(monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise TimeoutError

    monkeypatch.setattr(utils.urllib.request, "urlopen", refuse)
    with caplog.at_level(logging.WARNING):
        assert utils.violates_moderation("text") is False
    assert "no answer" in caplog.text
