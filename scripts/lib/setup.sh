#!/usr/bin/env bash
# Makes a virtual environment with both packages: bash scripts/lib/setup.sh FOLDER EXTRAS
# PYTHON names the interpreter to start from; TORCH is what to install as torch (pip options are allowed).
# With an accelerator, a torch that already works with it is kept (the environment sees the system's packages).
# Without one, a pinned torch goes in first, so that no other requirement can pull a larger build.
# Everything else comes in the versions of locked-PLATFORM-pyX.Y.txt, which the tests passed with (lock.sh writes it).
# LATEST=1 takes the newest versions that pyproject.toml declares instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=$1 extras=$2 base=${PYTHON:-python3} torch=${TORCH:-} site=""

fail() {
    echo "setup: $1" >&2
    exit 1
}
command -v "$base" >/dev/null || fail "no '$base'; pass PYTHON=<interpreter, 3.10 or newer>"
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$base is older than 3.10; pass PYTHON=<interpreter, 3.10 or newer>"
range=$(sed -n 's/^ *"\(torch[<>=].*\)",$/\1/p' pyproject.toml)

if nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/kfd ]; then
    if "$base" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; then
        site="--system-site-packages"
        echo "setup: keeping the installed torch, which sees the accelerator"
    else
        torch=${torch:-$range}
    fi
else
    torch=${torch:-torch==2.13.0} # the version that was tested without an accelerator
fi

echo "setup: making $venv"
"$base" -m venv ${site:+"$site"} "$venv"
pip() {
    "$venv/bin/python" -m pip "$@"
}
if [ -n "$torch" ]; then
    echo "setup: installing $torch"
    # shellcheck disable=SC2086  # pip options are allowed in TORCH
    pip install -q $torch
fi
# From here on no requirement may replace torch: the build for the accelerator is the user's choice.
held=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')
"$venv/bin/python" - "$held" "$range" <<'PY' || fail "torch $held is outside of the tested range $range; see make setup TORCH=..."
import re
import sys

# A local version, such as that of +rocm6.4, says how torch was built, not which torch it is.
numbers = re.findall(r"\d+\.\d+", f"{sys.argv[1].split('+')[0]} {sys.argv[2]}")
held, lowest, ceiling = (tuple(map(int, found.split("."))) for found in numbers)
sys.exit(not lowest <= held < ceiling)
PY
echo "torch==$held" >"$venv/torch.txt"
options=(-c "$venv/torch.txt")

place=$("$venv/bin/python" -c 'import sys; print("{}-py{}.{}".format(sys.platform, *sys.version_info))')
lock=scripts/lib/locked-$place.txt
if [ "${LATEST:-0}" != 0 ]; then
    echo "setup: the newest declared versions, as LATEST=$LATEST says"
    options+=(--upgrade --upgrade-strategy eager)
elif [ -f "$lock" ]; then
    echo "setup: the tested versions of $lock; LATEST=1 takes the newest declared ones"
    options+=(-c "$lock")
else
    echo "setup: there is no $lock, so the newest declared versions"
fi
echo "setup: installing -e .[$extras]"
pip install -q "${options[@]}" -e ".[$extras]"
# lmms-eval wants torchvision, which has no build for every torch; its tests need neither that nor the rest of its list.
case ",$extras," in *,dev,*) pip install -q "${options[@]}" --no-deps -r tests/eval/lmms_requirements.txt ;; esac
