#!/usr/bin/env bash
# VizWiz, test split: answers for the evaluation server.
# bash scripts/v1_5/eval/vizwiz.sh [--model-path MODEL] [flags of llava.eval.model_vqa_loader]
set -euo pipefail
MODEL_PATH=${MODEL_PATH:-liuhaotian/llava-v1.5-13b}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

data=$EVAL_ROOT/vizwiz
"$python" -m llava.eval.model_vqa_loader --model-path "$MODEL_PATH" \
    --question-file "$data/llava_test.jsonl" --image-folder "$data/test" --answers-file "$data/answers/$CKPT.jsonl" \
    --temperature 0 --conv-mode vicuna_v1 "$@"
"$python" scripts/convert_vizwiz_for_submission.py --annotation-file "$data/llava_test.jsonl" \
    --result-file "$data/answers/$CKPT.jsonl" --result-upload-file "$data/answers_upload/$CKPT.json"
