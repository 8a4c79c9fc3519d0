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

if [ -n "${DUET_PYTHON:-}" ]; then
    python=$DUET_PYTHON
elif ready python3; then
    python=python3
else
    python=.venv/bin/python
    ready "$python" || {
        echo "setup: needed once; set DUET_PYTHON to use an environment of your own"
        bash scripts/lib/setup.sh .venv train,demo
    } >&2
fi
# ninja and deepspeed call programs by name
PATH="$(dirname "$(command -v "$python")"):$PATH"
export PATH
# On a CPU: MKL's reproducible mode. The same bits whatever the memory alignment, and no slower.
export MKL_CBWR=${MKL_CBWR:-AUTO}
exec "$python" -m llava.train.plan "$@"
