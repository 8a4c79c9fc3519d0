"""Add a published difference to its base model: LLaVA's entry point with LLaVA's flags.

python -m llava.model.apply_delta --base-model-path llama-7b --delta-path liuhaotian/LLaVA-7b-delta-v0 \\
    --target-model-path llava-7b
"""

from __future__ import annotations

import argparse
import functools
import operator
from pathlib import Path

from duet.errors import main_guard
from llava.command import exit_status
from llava.model.weight_folders import combine, folder_of, read_weights, write_weights


def apply_delta(base_model_path: str, target_model_path: str, delta_path: str) -> None:
    """Write base + difference, in fp16.

    Args:
        base_model_path: the language model: folder or hub name.
        target_model_path: folder to write.
        delta_path: the difference: folder or hub name.

    Raises:
        FileNotFoundError: a checkpoint is not there.
        ValueError: the two do not belong together, or the target folder holds a model.
    """
    delta = folder_of(delta_path)
    weights = combine(read_weights(delta), read_weights(folder_of(base_model_path)), operator.add)
    write_weights(weights, Path(target_model_path).expanduser(), like=delta)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava.model.apply_delta", description="Base + difference = model.")
    parser.add_argument("--base-model-path", required=True, help="language model")
    parser.add_argument("--target-model-path", required=True, help="folder to write")
    parser.add_argument("--delta-path", required=True, help="published difference")
    args = parser.parse_args(argv)
    return exit_status(functools.partial(apply_delta, args.base_model_path, args.target_model_path, args.delta_path))


if __name__ == "__main__":
    raise SystemExit(main())
