"""Shared by all tests."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from PIL import ImageFile

if not torch.cuda.is_available():  # Triton reads it once, when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # the models here are tiny: more threads cost more than they give


@pytest.fixture(autouse=True)
def truncated_pictures_are_errors(monkeypatch):
    """lmms-eval tells PIL at import to accept pictures that end early; other tests of the process must not notice."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
