#!/usr/bin/env bash
# VQAv2, test-dev: answers for the evaluation server. One process for each device in CUDA_VISIBLE_DEVICES.
# bash scripts/v1_5/eval/vqav2.sh [--model-path MODEL] [flags of llava.eval.model_vqa_loader]
set -euo pipefail
MODEL_PATH=${MODEL_PATH:-liuhaotian/llava-v1.5-13b}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

data=$EVAL_ROOT/vqav2
split=llava_vqav2_mscoco_test-dev2015
answer_in_parts "$data/answers/$split/$CKPT" --question-file "$data/$split.jsonl" --image-folder "$data/test2015" "$@"
"$python" scripts/convert_vqav2_for_submission.py --dir "$data" --split "$split" --ckpt "$CKPT"
