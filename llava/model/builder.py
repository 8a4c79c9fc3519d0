"""`load_pretrained_model`: open whatever a LLaVA user has, by what is in the folder and not by its name."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_bitsandbytes_available, is_flash_attn_2_available

from duet import DuetConfig
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.checkpoints import (
    NON_LORA_FILES,
    PROJECTOR_FILES,
    load_partial,
    load_projector_weights,
    read_tensors,
    strip_non_lora_prefix,
    tensor_sizes,
)
from llava.model.hf_layout import OWN_KEYS, hf_model_type, is_hf_llava
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.language_model.llava_mpt import LlavaMptForCausalLM
from llava.model.loading import make_config, read_config_dict
from llava.reduction import ReductionArguments, preset_for
from llava.tokenization import load_tokenizer

logger = logging.get_logger(__name__)

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Clients written for other LLaVA versions pass these; they mean nothing here.
_IGNORED = ("multimodal", "customized_config", "offload_folder")
# Parts that stay in full precision under 4 and 8 bits: a quantised projector or tower costs accuracy and breaks dtypes.
# transformers matches a pattern from the start of a name, or as its end.
KEPT_PRECISE = [r".*\bmm_projector", r".*\bvision_tower", "lm_head"]


@dataclass(frozen=True)
class Checkpoint:
    """What lies at a path.

    Attributes:
        path: Folder or hub name.
        config: config.json as a dict, or None.
        adapter: adapter_config.json as a dict, or None.
        projector: Path of a projector file, or None.
        has_weights: Whether there are whole model weights.
    """

    path: str
    config: dict | None
    adapter: dict | None
    projector: str | None
    has_weights: bool

    @property
    def multimodal(self) -> bool:
        """Whether its config describes a model with a vision tower."""
        return self.config is not None and (bool(self.config.get("mm_vision_tower")) or is_hf_llava(self.config))


def inspect_checkpoint(path: str) -> Checkpoint:
    """Look at what a folder or hub repository has.

    Raises:
        FileNotFoundError: The path looks local and is not there, or is a folder without anything loadable.
    """
    path = os.path.expanduser(path)
    if not os.path.isdir(path) and (os.path.isabs(path) or path.startswith(".") or path.count("/") != 1):
        raise FileNotFoundError(
            f"model path {path!r} does not exist; give a checkpoint folder or a hub name (owner/name)"
        )
    config, adapter = _read_json(path, "config.json"), _read_json(path, "adapter_config.json")
    projector = next((found for name in PROJECTOR_FILES if (found := _locate(path, name))), None)
    weights = any(_locate(path, name) for name in WEIGHT_FILES)
    if not (weights or adapter or projector):
        raise FileNotFoundError(
            f"{path}: no model weights ({', '.join(WEIGHT_FILES)}), no LoRA adapter and no mm_projector file in it"
        )
    return Checkpoint(path, config, adapter, projector, weights)


def _locate(path: str, name: str) -> str | None:
    if os.path.isdir(path):
        found = os.path.join(path, name)
        return found if os.path.isfile(found) else None
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False)


def _read_json(path: str, name: str) -> dict | None:
    found = _locate(path, name)
    if found is None:
        return None
    with open(found, encoding="utf-8") as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{found} is not valid JSON: {error}") from error


def stored_dtype(path: str) -> torch.dtype | str:
    """Return the dtype that most of a checkpoint's weights have in their file, whatever its config.json says.

    Args:
        path: Folder or hub name. Of several files the first one is read.

    Returns:
        The dtype, or "auto" (what the config says) where there is no weight file.
    """
    file = next((found for name in WEIGHT_FILES if (found := _locate(path, name))), None)
    if file is not None and file.endswith(".index.json"):
        names = _read_json(path, os.path.basename(file))["weight_map"].values()  # type: ignore[index]
        file = _locate(path, min(names))
    if file is None:
        return "auto"
    sizes: Counter[torch.dtype] = Counter()
    for dtype, count in tensor_sizes(file):
        if dtype.is_floating_point:
            sizes[dtype] += count
    return sizes.most_common(1)[0][0] if sizes else "auto"


def model_class(config: dict, name: str = "") -> Any:
    """Choose the LLaVA class for a config dict.

    Args:
        config: config.json of a multimodal model, or of the language model that one is built on.
        name: Model name, looked at only when the config does not say.

    Raises:
        ValueError: A backbone that is not supported.
    """
    kind = hf_model_type(config) if is_hf_llava(config) else str(config.get("model_type", ""))
    said = " ".join([kind, *(config.get("architectures") or [])]).lower() or name.lower()
    for word, cls in (("mistral", LlavaMistralForCausalLM), ("mpt", LlavaMptForCausalLM)):
        if word in said:
            return cls
    if "llama" in said or kind == "llava":
        return LlavaLlamaForCausalLM
    raise ValueError(f"model_type {kind!r} is no supported LLaVA backbone; supported: Llama (Vicuna) and Mistral")


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    duet_config: DuetConfig | ReductionArguments | str | None = None,
    **kwargs,
) -> tuple[Any, Any, Any, int]:
    """Load a model for inference, whatever form it was saved in.

    Full checkpoints in LLaVA's or llava-hf's layout, LoRA folders (merged on the fly), projector-only folders, and
    plain language models are told apart by their files.

    Args:
        model_path: Checkpoint folder or hub name.
        model_base: Language model below a LoRA or projector folder. A LoRA adapter usually names its base itself.
        model_name: Used only when the files do not say which backbone it is.
        load_8bit: Quantise to 8 bits.
        load_4bit: Quantise to 4 bits (nf4, double quantisation).
        device_map: As in `transformers`; ignored where there is no accelerator.
        device: Device when it is not "cuda"; the CPU is used when there is no accelerator.
        use_flash_attn: Ask for FlashAttention 2; without it installed SDPA is used, with a notice.
        duet_config: A reduction, flags for one, "none" to switch off what the checkpoint says, or None to keep that.
        **kwargs: `torch_dtype`/`dtype` (default: fp16 on an accelerator, fp32 on the CPU), `attn_implementation`,
            `overwrite_config` (dict of config values), single reduction flags, and what `from_pretrained` takes.

    Returns:
        `(tokenizer, model, image_processor, context_len)`; `image_processor` is None for a plain language model.

    Raises:
        FileNotFoundError: Nothing loadable at the path.
        ValueError: Weights are missing or unexpected, a base is missing, or options contradict each other.
        NotImplementedError: An MPT model.
    """
    kwargs = {key: value for key, value in kwargs.items() if key not in _IGNORED}
    flags = {item.name: kwargs.pop(item.name) for item in fields(ReductionArguments) if item.name in kwargs}
    overrides = dict(kwargs.pop("overwrite_config", None) or {})
    if isinstance(duet_config, str | DuetConfig):
        overrides["duet"] = None  # what the checkpoint says is not asked for, so it may be of a method unknown here
    options = _loading_options(load_8bit, load_4bit, device_map, device, use_flash_attn, kwargs)
    found = inspect_checkpoint(model_path)
    model: Any
    if found.adapter is not None and not found.has_weights:
        model, tokenizer = _load_adapter(found, model_base, model_name, overrides, options)
    elif found.multimodal:
        model, tokenizer = _load_multimodal(found, model_base, model_name, overrides, options)
    elif found.has_weights:
        model = AutoModelForCausalLM.from_pretrained(found.path, **options)
        tokenizer = _load_tokenizer(found.path)
    else:
        raise ValueError(
            f"{found.path} has a projector file, but no config.json that says which vision tower it belongs to; copy "
            "the config.json of the run that made it into the folder"
        )
    model.eval()
    image_processor = None
    if hasattr(model, "get_vision_tower") and model.get_vision_tower() is not None:
        image_processor = _finish_multimodal(model, tokenizer)
        _apply_reduction(model, duet_config, flags)
    context_len = getattr(model.config, "max_sequence_length", None) or 2048
    return tokenizer, model, image_processor, context_len


def _loading_options(load_8bit, load_4bit, device_map, device, use_flash_attn, kwargs) -> dict[str, Any]:
    options = dict(kwargs)
    accelerated = torch.cuda.is_available()
    if str(device).startswith("cuda") and not accelerated:
        logger.warning_once("no accelerator: the model is loaded on the CPU")
        device = "cpu"
    dtype = options.pop("torch_dtype", None)
    dtype = options.pop("dtype", None) or dtype or (torch.float32 if str(device) == "cpu" else torch.float16)
    options["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if str(device) == "cpu" and options["dtype"] == torch.float16:
        logger.warning_once(
            "float16 was asked for on a CPU: the model computes in float16 there, slowly; the default is float32"
        )
    on_cpu_anyway = not accelerated and not _names_cpu(device_map)
    options["device_map"] = {"": device} if str(device) != "cuda" or on_cpu_anyway else device_map
    if use_flash_attn:
        options["attn_implementation"] = "flash_attention_2"
    if options.get("attn_implementation") == "flash_attention_2" and not is_flash_attn_2_available():
        logger.warning("flash_attention_2 was asked for but flash-attn is not installed: using sdpa")
        options["attn_implementation"] = "sdpa"
    if load_8bit or load_4bit:
        options["quantization_config"] = _quantization(load_8bit, load_4bit, options["dtype"])
    return options


def _names_cpu(device_map: Any) -> bool:
    return isinstance(device_map, dict) or str(device_map) == "cpu"


def _quantization(load_8bit: bool, load_4bit: bool, dtype):
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other; give one")
    if not is_bitsandbytes_available():
        raise ValueError("4-bit and 8-bit loading need bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if load_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT_PRECISE)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float16 if dtype == "auto" else dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=KEPT_PRECISE,
    )


def _load_multimodal(found: Checkpoint, base: str | None, name: str, overrides: dict, options: dict) -> tuple[Any, Any]:
    assert found.config is not None
    cls = model_class(found.config, name)
    if found.has_weights:
        if base is not None:
            logger.warning("%s holds a whole model, so model_base %s is not used", found.path, base)
        model = cls.from_pretrained(found.path, config_overrides=overrides, **options)
        return model, _load_tokenizer(found.path)
    if base is None:
        raise ValueError(
            f"{found.path} has a projector but no language model: pass model_base, the model that it was trained for"
        )
    model = _load_on_base(cls, found, base, overrides, options)
    load_projector_weights(model, found.projector or found.path)
    return model, _load_tokenizer(base)


def _load_on_base(cls, found: Checkpoint, base: str, overrides: dict, options: dict) -> Any:
    """Put the multimodal config of `found` around the weights of `base`."""
    assert found.config is not None
    # QLoRA's config.json says how the base was held in training; its weights are what they are.
    said = {key: value for key, value in found.config.items() if key != "quantization_config"}
    config = make_config(cls.config_class, said | overrides, {})
    config._name_or_path = found.path
    wanted = config.vocab_size
    raw = read_config_dict(base)
    config.vocab_size = raw.get("vocab_size", wanted)
    config.mm_vision_tower = _absolute_tower(config.mm_vision_tower, found.path)
    model = cls.from_pretrained(base, config=None if is_hf_llava(raw) else config, **options)
    if is_hf_llava(raw):
        # What the run on top of it changed: tiles, a reduction, the template.
        for key in (key for key in OWN_KEYS if key != "mm_vision_tower" and hasattr(config, key)):
            setattr(model.config, key, getattr(config, key))
        model.get_model().match_newline()
    if wanted != model.config.vocab_size:
        model.resize_token_embeddings(wanted, mean_resizing=False)
    return model


def _absolute_tower(name: str, folder: str) -> str:
    """A tower path that is relative to the adapter's folder must survive loading from the base's folder."""
    local = os.path.join(folder, name)
    return os.path.abspath(local) if os.path.isdir(local) else name


def _load_adapter(found: Checkpoint, base: str | None, name: str, overrides: dict, options: dict) -> tuple[Any, Any]:
    """Base model + non-LoRA weights + adapter, merged."""
    if "quantization_config" in options:
        raise ValueError(
            f"{found.path} is a LoRA folder: merging into quantised weights loses accuracy. Merge it first with "
            "`python -m llava.convert --from LORA --base BASE --to llava --out DIR`, then load that in 4 or 8 bits"
        )
    from peft import PeftConfig, PeftModel

    assert found.adapter is not None
    base = base or found.adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{found.path} is a LoRA adapter that does not name its base model: pass model_base")
    below = inspect_checkpoint(base)
    if found.config is None or not found.multimodal:
        found = Checkpoint(found.path, below.config, found.adapter, found.projector, False)
    peft_config: Any = PeftConfig.from_pretrained(found.path)
    model: Any
    if not found.multimodal:
        model = AutoModelForCausalLM.from_pretrained(base, **options)
    else:
        assert found.config is not None
        model = _load_on_base(model_class(found.config, name), found, base, overrides, options)
        _load_non_lora(model, found, below)
        # Targets are leaf names such as q_proj, which the tower's layers have, too.
        if not isinstance(peft_config.target_modules, str) and not getattr(peft_config, "exclude_modules", None):
            peft_config.exclude_modules = r".*(vision_tower|mm_projector).*"
    model = PeftModel.from_pretrained(model, found.path, config=peft_config).merge_and_unload()
    return model, _load_tokenizer(base)


def _load_non_lora(model, found: Checkpoint, below: Checkpoint) -> None:
    file = next((path for name in NON_LORA_FILES if (path := _locate(found.path, name))), None)
    if file is not None:
        load_partial(model, strip_non_lora_prefix(read_tensors(file)), file)
    elif found.projector is not None:
        load_projector_weights(model, found.projector)
    elif not below.multimodal:
        raise ValueError(
            f"{found.path} has an adapter but neither {NON_LORA_FILES[1]} nor a projector file, and its base "
            f"{below.path} has no projector: this is an incomplete checkpoint. Copy mm_projector.bin (or "
            "non_lora_trainables.bin) of the same run into the folder"
        )


def _load_tokenizer(path: str):
    files = ("tokenizer.model", "tokenizer.json", "vocab.json")
    if os.path.isdir(path) and not any(os.path.isfile(os.path.join(path, name)) for name in files):
        raise FileNotFoundError(f"{path} has no tokenizer ({', '.join(files)}); copy the base model's files into it")
    return load_tokenizer(path)


def _finish_multimodal(model, tokenizer):
    """Add the image tokens that the config asks for; return the tower's image processor."""
    config = model.config
    if getattr(config, "mm_use_im_patch_token", True):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    rows = model.get_input_embeddings().num_embeddings
    uses_tokens = getattr(config, "mm_use_im_patch_token", True) or getattr(config, "mm_use_im_start_end", False)
    if uses_tokens and len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    elif tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        # llava-hf's <pad> lies behind the vocabulary that is left after its padding rows are cut off.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tower = model.get_vision_tower()
    left = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    if left and not getattr(model, "hf_device_map", None):
        raise ValueError(f"{config._name_or_path}: {len(left)} weights were never loaded, among them {left[0]}")
    return tower.image_processor


def _apply_reduction(model, duet_config, flags: dict) -> None:
    if duet_config == "none":
        model.set_reduction(None)
    elif isinstance(duet_config, ReductionArguments):
        model.set_reduction(duet_config.to_config(model.reduction, preset_for(model.config)))
    elif isinstance(duet_config, DuetConfig):
        model.set_reduction(duet_config)
    elif duet_config is not None:
        raise ValueError(f"duet_config={duet_config!r}: pass a DuetConfig, ReductionArguments, 'none' or None")
    else:
        model.check_reduction(model.reduction)
    if flags:
        model.set_reduction(ReductionArguments(**flags).to_config(model.reduction, preset_for(model.config)))
