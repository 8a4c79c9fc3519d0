"""Load weights into a LLaVA class: any layout, strictly, with the vision tower from the right place."""

from __future__ import annotations

import re
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from duet import DuetConfig
from llava.model.checkpoints import HF_KEY_MAPPING, TOWER_PREFIX, report_mismatch
from llava.model.hf_layout import base_vocabulary, config_from_hf, is_hf_llava

logger = logging.get_logger(__name__)

# Arguments of from_pretrained that a config attribute of the same name must not swallow.
_LOADER_ARGUMENTS = {
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "quantization_config",
    "name_or_path",
    "generation_config",
}
# Arguments that say where files are; the config is read with the same ones.
_SOURCE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
PROJECTOR_KEYS = r"^model\.(mm_projector\.|image_newline$)"


def read_config_dict(path: str, **kwargs) -> dict:
    """Read a checkpoint's config.json.

    Raises:
        OSError: There is none.
    """
    source = {key: kwargs[key] for key in _SOURCE_ARGUMENTS if kwargs.get(key) is not None}
    config, _ = PreTrainedConfig.get_config_dict(path, **source)
    return config


def make_config(config_class, raw: dict, kwargs: dict):
    """Build the config object. Keyword arguments that are config attributes override it and leave `kwargs`."""
    raw = {
        key: value for key, value in raw.items() if key not in ("model_type", "architectures", "transformers_version")
    }
    config = config_class(**raw)
    for key in [key for key in kwargs if key not in _LOADER_ARGUMENTS and hasattr(config, key)]:
        setattr(config, key, kwargs.pop(key))
    return config


def load_pretrained(
    cls, parent, path, *model_args, config=None, output_loading_info=False, config_overrides=None, **kwargs
) -> Any:
    """`from_pretrained` for LLaVA classes; see `LlavaCausalLM.from_pretrained`.

    Args:
        cls: The LLaVA class.
        parent: The host class's bound `from_pretrained`.
        path: Folder or hub name; None with `state_dict=` in kwargs goes straight to the host.
        *model_args: Passed on.
        config: Config object of a multimodal model to put around a plain language model's weights. Then the
            projector may be missing, with a warning, because it comes from a file of its own.
        output_loading_info: Also return the host's report.
        config_overrides: Config values that replace what the checkpoint says, before the model is built.
        **kwargs: Passed on.

    Raises:
        ValueError: Weights do not belong to the model, or the config's entry "duet" is broken.
    """
    if path is None:
        return parent(path, *model_args, config=config, output_loading_info=output_loading_info, **kwargs)
    path = str(path)
    raw = read_config_dict(path, **kwargs) | (config_overrides or {})
    rows = None
    if is_hf_llava(raw):
        if config is None:
            config = make_config(cls.config_class, config_from_hf(raw, path, cls.config_class.model_type), kwargs)
        rows = base_vocabulary(raw)
        config.vocab_size = raw["text_config"].get("vocab_size", config.vocab_size)
        kwargs["key_mapping"] = HF_KEY_MAPPING | (kwargs.get("key_mapping") or {})
    elif config is None:
        config = make_config(cls.config_class, raw, kwargs)
    elif not isinstance(config, PreTrainedConfig):
        config = make_config(cls.config_class, read_config_dict(config, **kwargs), kwargs)
    _check_reduction(config)
    language_only = not is_hf_llava(raw) and not raw.get("mm_vision_tower")
    model, info = parent(path, *model_args, config=config, output_loading_info=True, **kwargs)
    _check(model, info, path, projector_may_be_missing=language_only)
    _finish_tower(model, info)
    if rows is not None and rows < model.config.vocab_size:
        model.resize_token_embeddings(rows)
        model.config.vocab_size = rows
    clean_generation_config(model.generation_config)
    return (model, info) if output_loading_info else model


def _check_reduction(config: Any) -> None:
    """Refuse a broken reduction before any weight is read, not when it is first used."""
    reduction = DuetConfig.from_model_config(config)
    if reduction is not None:
        reduction.validate(patches=None, num_layers=config.num_hidden_layers)


def _check(model, info: dict, path: str, projector_may_be_missing: bool) -> None:
    missing = [key for key in info["missing_keys"] if not key.startswith(TOWER_PREFIX)]
    if projector_may_be_missing:
        absent = [key for key in missing if re.match(PROJECTOR_KEYS, key)]
        if absent:
            logger.warning(
                "%s is a plain language model: the projector starts from random weights until one is loaded", path
            )
        missing = [key for key in missing if key not in absent]
    report_mismatch(sorted(missing), sorted(info["unexpected_keys"]), path)


def _finish_tower(model, info: dict) -> None:
    """Keep the tower weights that the checkpoint brought; fetch the stock ones if it brought none."""
    tower = model.get_vision_tower()
    if tower is None:
        return
    expected = {TOWER_PREFIX + key for key in tower.state_dict()}
    missing = expected & (set(info["missing_keys"]) | vars(model).pop("_absent_tower_keys", set()))
    if missing and missing != expected:
        report_mismatch(sorted(missing), [], f"{model.config._name_or_path} (vision tower)")
    if missing:
        tower.load_model()
    else:
        tower.mark_loaded()
    model.config.mm_vision_config = tower.config.to_diff_dict()


def clean_generation_config(config: GenerationConfig | None) -> None:
    """Drop sampling values that contradict greedy decoding.

    Vicuna ships temperature and top_p next to do_sample=False, which `transformers` refuses to save.
    """
    if config is None or config.do_sample:
        return
    for name in ("temperature", "top_p", "top_k", "typical_p", "min_p"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
