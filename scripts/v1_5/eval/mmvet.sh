#!/usr/bin/env bash
# MM-Vet: answers for its evaluator.
# bash scripts/v1_5/eval/mmvet.sh [--model-path MODEL] [flags of llava.eval.model_vqa]
set -euo pipefail
MODEL_PATH=${MODEL_PATH:-liuhaotian/llava-v1.5-13b}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

data=$EVAL_ROOT/mm-vet
"$python" -m llava.eval.model_vqa --model-path "$MODEL_PATH" \
    --question-file "$data/llava-mm-vet.jsonl" --image-folder "$data/images" --answers-file "$data/answers/$CKPT.jsonl" \
    --temperature 0 --conv-mode vicuna_v1 "$@"
"$python" scripts/convert_mmvet_for_eval.py --src "$data/answers/$CKPT.jsonl" --dst "$data/results/$CKPT.json"
