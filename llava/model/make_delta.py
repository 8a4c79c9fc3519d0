"""Write the difference of a model to its base: LLaVA's entry point with LLaVA's flags.

python -m llava.model.make_delta --base-model-path llama-7b --target-model-path llava-7b --delta-path llava-7b-delta
"""

from __future__ import annotations

import argparse
import functools
import operator
from pathlib import Path

from huggingface_hub import HfApi

from duet.errors import main_guard
from llava.command import exit_status
from llava.model.utils import auto_upgrade
from llava.model.weight_folders import combine, folder_of, read_weights, write_weights


def make_delta(base_model_path: str, target_model_path: str, delta_path: str, hub_repo_id: str | None) -> None:
    """Write model - base, in fp16, and put it on the hub if a name is given.

    Args:
        base_model_path: the language model: folder or hub name.
        target_model_path: the model: folder or hub name.
        delta_path: folder to write.
        hub_repo_id: name on the hub, or None.

    Raises:
        FileNotFoundError: a checkpoint is not there.
        ValueError: the two do not belong together, or the folder to write holds a model.
    """
    auto_upgrade(target_model_path)
    target, folder = folder_of(target_model_path), Path(delta_path).expanduser()
    weights = combine(read_weights(target), read_weights(folder_of(base_model_path)), operator.sub)
    write_weights(weights, folder, like=target)
    if hub_repo_id:
        api = HfApi()
        api.create_repo(hub_repo_id, exist_ok=True)
        api.upload_folder(repo_id=hub_repo_id, folder_path=folder)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava.model.make_delta", description="Model - base = difference.")
    parser.add_argument("--base-model-path", required=True, help="language model")
    parser.add_argument("--target-model-path", required=True, help="model")
    parser.add_argument("--delta-path", required=True, help="folder to write")
    parser.add_argument("--hub-repo-id", default=None, help="also put it on the hub under this name")
    args = parser.parse_args(argv)
    work = functools.partial(
        make_delta, args.base_model_path, args.target_model_path, args.delta_path, args.hub_repo_id
    )
    return exit_status(work)


if __name__ == "__main__":
    raise SystemExit(main())
