"""The public names, signatures and flags as they are now. `python tests/structure/interfaces.py` freezes them again.

The frozen copy lies in `frozen.json` next to this file, so a change of an interface is a visible line in a diff.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

FROZEN = Path(__file__).with_name("frozen.json")

# LLaVA's public names that other people's code imports, by module.
LLAVA_NAMES: dict[str, tuple[str, ...]] = {
    "llava": ("LlavaLlamaForCausalLM",),
    "llava.constants": (
        "IGNORE_INDEX",
        "IMAGE_TOKEN_INDEX",
        "DEFAULT_IMAGE_TOKEN",
        "DEFAULT_IMAGE_PATCH_TOKEN",
        "DEFAULT_IM_START_TOKEN",
        "DEFAULT_IM_END_TOKEN",
        "IMAGE_PLACEHOLDER",
        "LOGDIR",
        "CONTROLLER_HEART_BEAT_EXPIRATION",
        "WORKER_HEART_BEAT_INTERVAL",
    ),
    "llava.conversation": ("SeparatorStyle", "Conversation", "conv_templates", "default_conversation"),
    "llava.mm_utils": (
        "select_best_resolution",
        "resize_and_pad_image",
        "divide_to_patches",
        "get_anyres_image_grid_shape",
        "process_anyres_image",
        "load_image_from_base64",
        "expand2square",
        "process_images",
        "tokenizer_image_token",
        "get_model_name_from_path",
        "KeywordsStoppingCriteria",
    ),
    "llava.model": ("LlavaLlamaForCausalLM", "LlavaConfig", "LlavaMistralForCausalLM", "LlavaMistralConfig"),
    "llava.model.builder": ("load_pretrained_model",),
    "llava.model.llava_arch": ("LlavaMetaModel", "LlavaMetaForCausalLM", "unpad_image"),
    "llava.model.language_model.llava_llama": ("LlavaConfig", "LlavaLlamaModel", "LlavaLlamaForCausalLM"),
    "llava.model.language_model.llava_mistral": (
        "LlavaMistralConfig",
        "LlavaMistralModel",
        "LlavaMistralForCausalLM",
    ),
    "llava.model.multimodal_encoder.builder": ("build_vision_tower",),
    "llava.model.multimodal_encoder.clip_encoder": ("CLIPVisionTower",),
    "llava.model.multimodal_projector.builder": ("build_vision_projector", "IdentityMap"),
    "llava.utils": ("disable_torch_init", "build_logger", "rank0_print"),
    "llava.train.train": (
        "ModelArguments",
        "DataArguments",
        "TrainingArguments",
        "LazySupervisedDataset",
        "DataCollatorForSupervisedDataset",
        "make_supervised_data_module",
        "preprocess",
        "preprocess_multimodal",
        "preprocess_v1",
        "preprocess_plain",
        "find_all_linear_names",
        "safe_save_model_for_hf_trainer",
        "get_peft_state_maybe_zero_3",
        "get_peft_state_non_lora_maybe_zero_3",
        "get_mm_adapter_state_maybe_zero_3",
        "smart_tokenizer_and_embedding_resize",
        "train",
    ),
    "llava.train.llava_trainer": (
        "LLaVATrainer",
        "LengthGroupedSampler",
        "get_modality_length_grouped_indices",
        "get_length_grouped_indices",
        "split_to_even_chunks",
        "get_mm_adapter_state_maybe_zero_3",
        "maybe_zero_3",
    ),
    "llava.eval.run_llava": ("eval_model", "load_image", "load_images", "image_parser"),
}

PARSERS = {
    "python -m duet.bench": ("duet.bench", "make_parser"),
    "python -m llava.eval": ("llava.eval.__main__", "make_parser"),
    "python -m llava.eval.compare": ("llava.eval.compare", "make_parser"),
    "python -m llava.eval.judge": ("llava.eval.judge", "make_parser"),
    "python -m llava.eval.report": ("llava.eval.report", "make_parser"),
}


def signature_of(thing: Any) -> str:
    """Names, kinds and defaults of the parameters, without annotations."""
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(thing).parameters.values()]
    return str(inspect.Signature(parameters))


def default_of(field: dataclasses.Field) -> Any:
    """A field's default in JSON's terms."""
    value = field.default if field.default is not dataclasses.MISSING else None
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if isinstance(value, enum.Enum):
        value = value.value
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def dataclass_flags(cls: type, without: type | None = None) -> dict[str, Any]:
    """Flags that a dataclass adds to (or changes in) its base, with their defaults."""
    base = {f.name: default_of(f) for f in dataclasses.fields(without)} if without else {}
    own = {f.name: default_of(f) for f in dataclasses.fields(cls) if f.init}
    return {name: value for name, value in sorted(own.items()) if name not in base or base[name] != value}


def current() -> dict[str, Any]:
    """All frozen interfaces as the code has them now."""
    import transformers

    import duet
    from llava.reduction import ReductionArguments
    from llava.train import arguments

    public = {name: getattr(duet, name) for name in duet.__all__}
    methods = {
        f"DuetConfig.{name}": signature_of(member)
        for name, member in inspect.getmembers(duet.DuetConfig, callable)
        if not name.startswith("_")
    }
    flags: dict[str, Any] = {
        "training: model": dataclass_flags(arguments.ModelArguments),
        "training: data": dataclass_flags(arguments.DataArguments),
        "training: beyond transformers": dataclass_flags(arguments.TrainingArguments, transformers.TrainingArguments),
        "reduction": dataclass_flags(ReductionArguments),
    }
    for title, (module, function) in PARSERS.items():
        parser = getattr(importlib.import_module(module), function)()
        options = [action for action in parser._actions if action.dest != "help"]
        flags[title] = {"/".join(a.option_strings) or a.dest: str(a.default) for a in options}
    return {
        "duet": {name: signature_of(thing) for name, thing in sorted(public.items())} | methods,
        "llava": {module: sorted(names) for module, names in LLAVA_NAMES.items()},
        "flags": flags,
    }


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(current(), indent=1) + "\n", encoding="utf-8")
