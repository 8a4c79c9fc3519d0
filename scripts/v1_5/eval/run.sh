#!/usr/bin/env bash
# Shared by the scripts next to it: BENCHMARKS FLAGS... -> python -m llava.eval, one process per accelerator.
# DUET_PYTHON: interpreter; EVAL_ROOT: where the benchmarks lie; NUM_DEVICES: processes; MODEL_PATH: the model, if no
# --model-path is given.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
python=${DUET_PYTHON:-$([ -x "$repo/.venv/bin/python" ] && echo "$repo/.venv/bin/python" || echo python3)}
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
devices=${NUM_DEVICES:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
model=${MODEL_PATH:-liuhaotian/llava-v1.5-13b}
command=(-m llava.eval --model-path "$model" --benchmarks "$1" --root "${EVAL_ROOT:-$repo/playground/data/eval}" "${@:2}")
if [ "$devices" -gt 1 ]; then
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$devices" "${command[@]}"
fi
exec "$python" "${command[@]}"
