#!/usr/bin/env bash
# GQA, testdev-balanced: accuracy.
# bash scripts/v1_5/eval/gqa.sh [--model-path MODEL] [flags of python -m llava.eval]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" gqa "$@"
