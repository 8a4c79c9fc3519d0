#!/usr/bin/env bash
# MMBench, development split: answers for the evaluation server (needs pandas and openpyxl).
# bash scripts/v1_5/eval/mmbench.sh [--model-path MODEL] [flags of llava.eval.model_vqa_mmbench]
set -euo pipefail
MODEL_PATH=${MODEL_PATH:-liuhaotian/llava-v1.5-13b}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

split=mmbench_dev_20230712
data=$EVAL_ROOT/mmbench
"$python" -m llava.eval.model_vqa_mmbench --model-path "$MODEL_PATH" \
    --question-file "$data/$split.tsv" --answers-file "$data/answers/$split/$CKPT.jsonl" \
    --single-pred-prompt --temperature 0 --conv-mode vicuna_v1 "$@"
"$python" scripts/convert_mmbench_for_submission.py --annotation-file "$data/$split.tsv" \
    --result-dir "$data/answers/$split" --upload-dir "$EVAL_ROOT/mmbench/answers_upload/$split" --experiment "$CKPT"
