#!/usr/bin/env bash
# TGIF-QA, scored by rules; python -m llava.eval.judge lets a chat model judge the answers.
# bash scripts/v1_5/eval/tgif.sh [--model-path MODEL] [flags of python -m llava.eval]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" tgif_qa "$@"
