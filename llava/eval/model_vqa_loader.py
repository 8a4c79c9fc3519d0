"""Answer a question file of a short-answer benchmark: LLaVA's entry point with LLaVA's flags.

python -m llava.eval.model_vqa_loader --model-path MODEL --question-file Q.jsonl --image-folder DIR \\
    --answers-file A.jsonl --temperature 0 --conv-mode vicuna_v1
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from duet.errors import main_guard
from llava.conversation import conv_templates
from llava.eval import vqa
from llava.eval.generate import mark_images
from llava.eval.run_llava import with_defaults
from llava.eval.vqa import get_chunk, split_list
from llava.mm_utils import process_images, tokenizer_image_token

__all__ = [
    "CustomDataset",
    "collate_fn",
    "create_data_loader",
    "eval_model",
    "get_chunk",
    "main",
    "make_parser",
    "split_list",
]

CONV_MODE = "llava_v1"
"""LLaVA's default template here; its scripts pass vicuna_v1."""


class CustomDataset(Dataset):
    """Questions as the model takes them, one by one, for clients that run their own loop.

    Args:
        questions: rows with `image` and `text`.
        image_folder: where the pictures are.
        tokenizer, image_processor: the model's.
        model_config: its config.
        conv_mode: name of the conversation template. LLaVA's class reads it from its script's flags.
    """

    def __init__(
        self,
        questions: Sequence[Mapping[str, Any]],
        image_folder: str,
        tokenizer: Any,
        image_processor: Any,
        model_config: Any,
        conv_mode: str = CONV_MODE,
    ) -> None:
        self.questions, self.image_folder = questions, image_folder
        self.tokenizer, self.image_processor, self.model_config = tokenizer, image_processor, model_config
        self.conv_mode = conv_mode

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """One question: ids [L] with the image's mark, pixels, and the picture's (width, height)."""
        row = self.questions[index]
        conversation = conv_templates[self.conv_mode].copy()
        conversation.append_message(conversation.roles[0], mark_images(row["text"], 1, self.model_config))
        conversation.append_message(conversation.roles[1], None)
        (image,) = vqa.open_rgb(Path(self.image_folder, row["image"]))
        pixels = process_images([image], self.image_processor, self.model_config)[0]
        return tokenizer_image_token(conversation.get_prompt(), self.tokenizer, return_tensors="pt"), pixels, image.size

    def __len__(self) -> int:
        return len(self.questions)


def collate_fn(batch: Sequence[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]]) -> tuple[Any, Any, Any]:
    """Stack questions of one length: ids [B, L], pixels [B, ...], and a tuple of (width, height)."""
    ids, pixels, sizes = zip(*batch, strict=True)
    return torch.stack(ids), torch.stack(pixels), sizes


def create_data_loader(
    questions: Sequence[Mapping[str, Any]],
    image_folder: str,
    tokenizer: Any,
    image_processor: Any,
    model_config: Any,
    batch_size: int = 1,
    num_workers: int = 4,
    conv_mode: str = CONV_MODE,
) -> DataLoader:
    """Load questions one by one, in order; see `CustomDataset`.

    Raises:
        ValueError: `batch_size` is not 1; prompts of several lengths need padding, which `eval_model` does itself.
    """
    if batch_size != 1:
        raise ValueError(f"batch_size must be 1, got {batch_size}; eval_model answers in batches by itself (--batch)")
    dataset = CustomDataset(questions, image_folder, tokenizer, image_processor, model_config, conv_mode)
    return DataLoader(dataset, batch_size=1, num_workers=num_workers, shuffle=False, collate_fn=collate_fn)


def make_parser() -> argparse.ArgumentParser:
    """LLaVA's flags with LLaVA's defaults, and ours."""
    parser = vqa.make_parser(
        "python -m llava.eval.model_vqa_loader", "Answer a question file.", "tables/question.jsonl", CONV_MODE
    )
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=128)
    return parser


def eval_model(args: Any) -> None:
    """Answer a question file.

    Args:
        args: LLaVA's flags as attributes; those that are missing get their defaults.

    Raises:
        BadEvalData: the question file or a picture is missing or wrong.
        ValueError: a wrong request.
    """
    args = with_defaults(make_parser(), args)
    vqa.run(args, vqa.read_questions, args.max_new_tokens)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return vqa.exit_status(functools.partial(eval_model, make_parser().parse_args(argv)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
