"""Cut the projector out of a checkpoint: LLaVA's script with LLaVA's flags.

python scripts/extract_mm_projector.py --model-path MODEL --output mm_projector.bin
"""

from __future__ import annotations

import argparse
import functools

from duet.errors import main_guard
from llava.command import exit_status
from llava.convert import extract_projector


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Cut the projector out of a checkpoint.")
    parser.add_argument("--model-path", required=True, help="checkpoint folder")
    parser.add_argument("--output", required=True, help="file to write: .safetensors, or what torch.save writes")
    return parser.parse_args(argv)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_args(argv)
    return exit_status(functools.partial(extract_projector, args.model_path, args.output))


if __name__ == "__main__":
    raise SystemExit(main())
