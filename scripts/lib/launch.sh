#!/usr/bin/env bash
# Shared by all scripts: finds or makes a Python environment that can train, then hands over to llava.train.plan.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

ready() {
    command -v "$1" >/dev/null 2>&1 && "$1" - <<'PY' >/dev/null 2>&1
import importlib.util as find
import sys
needed = "torch transformers accelerate deepspeed ninja peft skimage sklearn matplotlib".split()
sys.exit(any(find.find_spec(name) is None for name in needed))
PY
}

install() {
    echo "making .venv (once; set DUET_PYTHON to use an environment of your own)" >&2
    python3 -m venv .venv
    if ! command -v nvidia-smi >/dev/null 2>&1 && ! command -v rocm-smi >/dev/null 2>&1; then
        .venv/bin/python -m pip install --quiet "torch==2.13.0" # the version that was tested without an accelerator
    fi
    .venv/bin/python -m pip install --quiet -e ".[train,demo]"
}

if [ -n "${DUET_PYTHON:-}" ]; then
    python=$DUET_PYTHON
elif ready python3; then
    python=python3
else
    python=.venv/bin/python
    ready "$python" || install >&2
fi
# ninja and deepspeed call programs by name
PATH="$(dirname "$(command -v "$python")"):$PATH"
export PATH
exec "$python" -m llava.train.plan "$@"
