"""Merge a LoRA folder into its base model: LLaVA's script with LLaVA's flags.

python scripts/merge_lora_weights.py --model-path LORA --model-base BASE --save-model-path MERGED
"""

from __future__ import annotations

import argparse
import functools

from duet.errors import main_guard
from llava.command import exit_status
from llava.convert import convert


def merge_lora(args: argparse.Namespace) -> None:
    """Write the merged model.

    Args:
        args: `model_path`, `model_base` (None: what the adapter names) and `save_model_path`.

    Raises:
        ValueError: the folder holds no adapter, or the target holds a model.
    """
    convert(args.model_path, "llava", args.save_model_path, args.model_base)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Merge a LoRA folder into its base model.")
    parser.add_argument("--model-path", required=True, help="LoRA folder; its name may be anything")
    parser.add_argument("--model-base", help="base model (default: what the adapter names)")
    parser.add_argument("--save-model-path", required=True, help="folder to write")
    return exit_status(functools.partial(merge_lora, parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
