#!/usr/bin/env bash
# Q-Bench in Chinese, perception: answers for its evaluator.
# bash scripts/v1_5/eval/qbench_zh.sh [dev|test] [--model-path MODEL] [flags of llava.eval.model_vqa_qbench]
set -euo pipefail
MODEL_PATH=${MODEL_PATH:-liuhaotian/llava-v1.5-13b}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

split=dev
case ${1:-} in dev | test) split=$1 && shift ;; esac
data=$EVAL_ROOT/qbench
[ "$split" = dev ] && part=验证集 || part=测试集
"$python" -m llava.eval.model_vqa_qbench --model-path "$MODEL_PATH" \
    --questions-file "$data/质衡-问答-$part.json" --image-folder "$data/images_llvisionqa" \
    --answers-file "$data/llvisionqa_zh_${split}_answers.jsonl" --conv-mode llava_v1 --lang zh "$@"
