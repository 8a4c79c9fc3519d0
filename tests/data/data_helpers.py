"""Shared by the tests of this folder: golden files, tokenizers, a small annotation set."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

from transformers import CLIPImageProcessorPil

from llava.constants import IGNORE_INDEX
from llava.tokenization import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_json(name):
    """A missing golden file is an error, never a skip."""
    return json.loads((GOLDEN / "cases" / name).read_text(encoding="utf-8"))


@functools.cache
def tokenizer(name="tokenizer"):
    loaded = load_tokenizer(str(GOLDEN / name))
    loaded.pad_token = loaded.unk_token
    return loaded


@functools.cache
def image_processor():
    return CLIPImageProcessorPil.from_pretrained(GOLDEN / "clip_tiny")


def short_tokenizer(limit):
    loaded = load_tokenizer(str(GOLDEN / "tokenizer"), model_max_length=limit)
    loaded.pad_token = loaded.unk_token
    return loaded


def data_args(**changes):
    fields = {
        "data_path": None,
        "image_folder": str(GOLDEN / "images"),
        "image_aspect_ratio": "pad",
        "is_multimodal": True,
        "image_processor": image_processor(),
        "mm_use_im_start_end": False,
        "on_bad_sample": "error",
    }
    return SimpleNamespace(**{**fields, **changes})


def record(*texts, image=None, **fields):
    """A record whose turns alternate between human and gpt."""
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    made = {"id": "r", "conversations": turns, **fields}
    return {**made, "image": image} if image is not None else made


def write_json(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def supervised_runs(ids, labels):
    """The stretches of supervised ids, in order."""
    runs, last = [], None
    for position, label in enumerate(labels):
        if label != IGNORE_INDEX:
            assert label == ids[position]
            if last != position - 1:
                runs.append([])
            runs[-1].append(label)
            last = position
    return runs
