#!/usr/bin/env bash
# Writes down the newest declared versions of everything, for this platform and Python: bash scripts/lib/lock.sh
# PYTHON and TORCH mean what they mean to setup.sh. torch, and what comes with its build, is left out: that is the
# user's, and one file serves every accelerator. The tests decide whether the file is worth a commit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

LATEST=1 bash scripts/lib/setup.sh "$scratch/venv" train,video,eval,demo,dev
python="$scratch/venv/bin/python"
place=$("$python" -c 'import sys; print("{}-py{}.{}".format(sys.platform, *sys.version_info))')
lock=scripts/lib/locked-$place.txt
{
    echo "# The versions that the tests passed with on $place; written by: make lock. Without torch, which depends on the"
    echo "# machine (tested: $("$python" -c 'from importlib.metadata import version; print(version("torch"))'))."
    "$python" -m pip freeze --local --exclude-editable |
        grep -Eiv '^(torch|torchvision|torchaudio|triton|pytorch-triton[a-z-]*|nvidia-[a-z0-9-]*|cuda-[a-z-]*|sympy|mpmath|networkx|setuptools)=='
} >"$scratch/lock"
mv "$scratch/lock" "$lock"
git --no-pager diff --stat -- "$lock"
echo "lock: wrote $lock; commit it if make check, make test and make test-sets pass after make setup"
