"""Every name that LLaVA's modules define is here, and takes what LLaVA's takes.

`llava_names.json` lists them: modules of LLaVA 1.2.2.post1 (commit c121f04), their functions with parameters, classes
with the parameters of their methods, and variables (null). What differs on purpose is listed below, with the reason.
"""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

DATA = json.loads(Path(__file__).with_name("llava_names.json").read_text(encoding="utf-8"))
MODULES: dict[str, dict[str, Any]] = DATA["modules"]
STAR: list[str] = DATA["star of llava.train.train"]

NOT_YET = {
    f"llava.serve.{name}": "the demo's web services come with the serving part"
    for name in ("controller", "gradio_web_server", "model_worker", "register_worker", "sglang_worker", "test_message")
}
_REFUSED = "refuses whatever it is given"
OTHER_PARAMETERS = {
    "llava.model.language_model.llava_mpt.LlavaMptForCausalLM.__init__": _REFUSED,
    "llava.model.language_model.llava_mpt.LlavaMptModel.__init__": _REFUSED,
    "llava.model.multimodal_projector.builder.IdentityMap.__init__": "takes and ignores what a projector takes",
    "llava.train.llama_flash_attn_monkey_patch.forward": _REFUSED,
    "llava.train.llama_flash_attn_monkey_patch._prepare_decoder_attention_mask": _REFUSED,
    "llava.train.llama_xformers_attn_monkey_patch.xformers_forward": _REFUSED,
}
_MPT = "MPT is refused when a model is made"
_S2 = "the multi-scale tower is refused when it is made"
ABSENT = {
    f"llava.model.language_model.llava_mpt.LlavaMptForCausalLM.{name}": _MPT
    for name in ("get_model", "_set_gradient_checkpointing", "forward", "prepare_inputs_for_generation")
} | {
    "llava.model.language_model.llava_mpt.LlavaMptModel.embed_tokens": _MPT,
    "llava.model.multimodal_encoder.clip_encoder.CLIPVisionTowerS2.forward_feature": _S2,
}


def functions() -> list[tuple[str, str, list[str]]]:
    """(module, dotted name in it, LLaVA's parameters) of every function and method."""
    found = []
    for module, names in MODULES.items():
        for name, value in names.items():
            if isinstance(value, list):
                found.append((module, name, value))
            elif isinstance(value, dict):
                found += [(module, f"{name}.{method}", parameters) for method, parameters in value.items()]
    return [item for item in found if item[0] not in NOT_YET]


def find(module: str, dotted: str) -> Any:
    """The object by its dotted name in a module; properties and class methods as they are."""
    target: Any = importlib.import_module(module)
    for part in dotted.split("."):
        target = inspect.getattr_static(target, part) if inspect.isclass(target) else getattr(target, part)
    return target


def parameters_of(function: Any) -> list[str]:
    """Names of all parameters, stars included; `cls` of a class method too."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    function = function.__func__ if isinstance(function, classmethod) else function
    return [stars.get(item.kind, "") + item.name for item in inspect.signature(function).parameters.values()]


def has(module: str, dotted: str) -> bool:
    try:
        find(module, dotted)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("module", [name for name in MODULES if name not in NOT_YET])
def test_every_name_can_be_imported(module):
    missing = [
        name
        for name, value in MODULES[module].items()
        for dotted in [name, *(f"{name}.{method}" for method in (value if isinstance(value, dict) else ()))]
        if f"{module}.{dotted}" not in ABSENT and not has(module, dotted)
    ]
    assert not missing


@pytest.mark.parametrize(
    ("module", "name", "wanted"), functions(), ids=[f"{module}.{name}" for module, name, _ in functions()]
)
def test_parameters_begin_as_in_llava(module, name, wanted):
    """Ours may follow, with defaults, so that every call written for LLaVA means the same here."""
    full = f"{module}.{name}"
    if full in OTHER_PARAMETERS or full in ABSENT:
        return
    function = find(module, name)
    if isinstance(function, property):
        assert wanted == ["self"]
        return
    ours = [parameter for parameter in parameters_of(function) if not parameter.startswith("*")]
    plain = [parameter for parameter in wanted if not parameter.startswith("*")]
    assert ours[: len(plain)] == plain
    assert {parameter for parameter in wanted if parameter.startswith("*")} <= set(parameters_of(function))
    target = function.__func__ if isinstance(function, classmethod) else function
    further = list(inspect.signature(target).parameters.values())[len(plain) :]
    assert all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in further)


def test_the_exceptions_are_exceptions():
    """A reason outlives its case otherwise."""
    known = {f"{module}.{name}": (module, name, wanted) for module, name, wanted in functions()}
    assert set(OTHER_PARAMETERS) <= set(known) and set(ABSENT) <= set(known) and set(NOT_YET) <= set(MODULES)
    assert not [full for full in ABSENT if has(*known[full][:2])]
    for full in OTHER_PARAMETERS:
        module, name, wanted = known[full]
        assert parameters_of(find(module, name)) != wanted
    for module in NOT_YET:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(module)


def test_the_star_of_the_training_module_brings_what_llavas_brings():
    space: dict[str, Any] = {}
    exec("from llava.train.train import *", space)
    assert [name for name in STAR if name not in space] == []
    assert space["torch"].__name__ == "torch" and space["IGNORE_INDEX"] == -100


LINES = """
from llava import LlavaLlamaForCausalLM
from llava.eval.run_llava import eval_model
from llava.eval.model_vqa_loader import CustomDataset, create_data_loader, get_chunk, split_list
from llava.model import *
from llava.model.llava_arch import get_anyres_image_grid_shape, unpad_image
from llava.model.utils import auto_upgrade
from llava.serve.cli import load_image
from llava.train.llama_flash_attn_monkey_patch import replace_llama_attn_with_flash_attn
from llava.train.train import _add_speaker_and_signal, _mask_targets, _tokenize_fn, local_rank, rank0_print
"""


def test_lines_of_clients_need_no_warning():
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", LINES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("module", "replace", "forward"),
    [
        ("llama_flash_attn_monkey_patch", "replace_llama_attn_with_flash_attn", "forward"),
        ("llama_xformers_attn_monkey_patch", "replace_llama_attn_with_xformers_attn", "xformers_forward"),
    ],
)
def test_patches_of_old_versions_change_nothing_and_say_what_is_used(module, replace, forward):
    from transformers.models.llama.modeling_llama import LlamaAttention

    patch = importlib.import_module(f"llava.train.{module}")
    before = LlamaAttention.forward
    with pytest.warns(UserWarning, match="sdpa"):
        getattr(patch, replace)()
    assert LlamaAttention.forward is before
    with pytest.raises(NotImplementedError, match="transformers 4"):
        getattr(patch, forward)(None)


def test_importing_a_patch_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("llama_flash_attn_monkey_patch", "llama_xformers_attn_monkey_patch", "train_xformers"):
            importlib.reload(importlib.import_module(f"llava.train.{name}"))


def test_shortuuid_comes_with_the_package():
    """LLaVA depends on it, so that scripts copied from it import it."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"shortuuid' in text.split("[project.optional-dependencies]")[0]
