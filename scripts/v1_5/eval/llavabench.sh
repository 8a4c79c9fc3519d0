#!/usr/bin/env bash
# LLaVA-Bench (in the wild): a chat model compares the answers with GPT-4's; its endpoint comes from the environment.
# bash scripts/v1_5/eval/llavabench.sh [--model-path MODEL] [flags of llava.eval.model_vqa]
set -euo pipefail
MODEL_PATH=${MODEL_PATH:-liuhaotian/llava-v1.5-13b}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# RULE: LLaVA's rule.json makes figures comparable with LLaVA's; ours asks for the same in other words. JUDGE: the judge.
data=$EVAL_ROOT/llava-bench-in-the-wild
"$python" -m llava.eval.model_vqa --model-path "$MODEL_PATH" \
    --question-file "$data/questions.jsonl" --image-folder "$data/images" --answers-file "$data/answers/$CKPT.jsonl" \
    --temperature 0 --conv-mode vicuna_v1 "$@"
mkdir -p "$data/reviews"
"$python" -m llava.eval.eval_gpt_review_bench --question "$data/questions.jsonl" --context "$data/context.jsonl" \
    --rule "${RULE:-llava/eval/table/rule.json}" --judge-model "${JUDGE:-gpt-4-0314}" \
    --answer-list "$data/answers_gpt4.jsonl" "$data/answers/$CKPT.jsonl" --output "$data/reviews/$CKPT.jsonl"
"$python" -m llava.eval.summarize_gpt_review -f "$data/reviews/$CKPT.jsonl"
