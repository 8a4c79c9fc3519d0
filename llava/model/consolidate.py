"""Write a checkpoint anew, in fp16 and in as few files as possible: LLaVA's entry point with LLaVA's flags.

python -m llava.model.consolidate --src llava-7b --dst llava-7b-consolidated
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from duet.errors import main_guard
from llava.command import exit_status
from llava.model.utils import auto_upgrade
from llava.model.weight_folders import folder_of, read_weights, write_weights


def consolidate_ckpt(src_path: str, dst_path: str) -> None:
    """Write a checkpoint anew.

    Args:
        src_path: folder or hub name.
        dst_path: folder to write.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a file cannot be read, or the target folder holds a model.
    """
    auto_upgrade(src_path)
    source = folder_of(src_path)
    write_weights(read_weights(source), Path(dst_path).expanduser(), like=source)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava.model.consolidate", description="Write a checkpoint anew.")
    parser.add_argument("--src", required=True, help="checkpoint")
    parser.add_argument("--dst", required=True, help="folder to write")
    args = parser.parse_args(argv)
    return exit_status(functools.partial(consolidate_ckpt, args.src, args.dst))


if __name__ == "__main__":
    raise SystemExit(main())
