#!/usr/bin/env bash
# Makes a virtual environment with both packages: bash scripts/lib/setup.sh FOLDER EXTRAS
# PYTHON names the interpreter to start from; TORCH is what to install as torch (pip options are allowed).
# With an accelerator, a torch that already works with it is kept (the environment sees the system's packages).
# Without one, a pinned torch goes in first, so that no other requirement can pull a larger build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=$1 extras=$2 base=${PYTHON:-python3} torch=${TORCH:-} site=""

fail() {
    echo "setup: $1; pass PYTHON=<interpreter, 3.10 or newer>" >&2
    exit 1
}
command -v "$base" >/dev/null || fail "no '$base'"
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$base is older than 3.10"

if nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/kfd ]; then
    if "$base" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; then
        site="--system-site-packages"
        echo "setup: keeping the installed torch, which sees the accelerator"
    else
        torch=${torch:-torch}
    fi
else
    torch=${torch:-torch==2.13.0} # the version that was tested without an accelerator
fi

echo "setup: making $venv"
"$base" -m venv ${site:+"$site"} "$venv"
if [ -n "$torch" ]; then
    echo "setup: installing $torch"
    # shellcheck disable=SC2086  # pip options are allowed in TORCH
    "$venv/bin/python" -m pip install -q $torch
fi
echo "setup: installing -e .[$extras]"
"$venv/bin/python" -m pip install -q -e ".[$extras]"
# lmms-eval wants torchvision, which has no build for every torch; its tests need neither that nor the rest of its list.
case ",$extras," in *,dev,*) "$venv/bin/python" -m pip install -q --no-deps -r tests/eval/lmms_requirements.txt ;; esac
