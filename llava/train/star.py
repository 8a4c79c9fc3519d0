"""What LLaVA's `from llava.train.train import *` brings besides that module's own names.

LLaVA's module has no `__all__`, so its star gives every public name it imports, and forks of its training script live
on them. They stand here, so that `train.py` imports only what it uses.
"""

import copy
import json
import logging
import os
import pathlib
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence  # noqa: UP035 - these very names

import tokenizers
import torch
import transformers
from packaging import version
from PIL import Image
from torch.utils.data import Dataset

from llava import conversation as conversation_lib
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.mm_utils import tokenizer_image_token
from llava.model import (
    LlavaConfig,
    LlavaLlamaForCausalLM,
    LlavaMistralConfig,
    LlavaMistralForCausalLM,
    LlavaMptConfig,
    LlavaMptForCausalLM,
)
from llava.train.legacy_labels import _add_speaker_and_signal, _mask_targets, _tokenize_fn
from llava.utils import rank0_print

IS_TOKENIZER_GREATER_THAN_0_14 = version.parse(tokenizers.__version__) >= version.parse("0.14")

__all__ = [
    "DEFAULT_IMAGE_TOKEN",
    "DEFAULT_IM_END_TOKEN",
    "DEFAULT_IM_START_TOKEN",
    "IGNORE_INDEX",
    "IMAGE_TOKEN_INDEX",
    "IS_TOKENIZER_GREATER_THAN_0_14",
    "Dataset",
    "Dict",
    "Image",
    "List",
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaMptConfig",
    "LlavaMptForCausalLM",
    "Optional",
    "Sequence",
    "_add_speaker_and_signal",
    "_mask_targets",
    "_tokenize_fn",
    "conversation_lib",
    "copy",
    "dataclass",
    "field",
    "json",
    "logging",
    "os",
    "pathlib",
    "rank0_print",
    "tokenizer_image_token",
    "tokenizers",
    "torch",
    "transformers",
    "version",
]
