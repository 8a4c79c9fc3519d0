#!/usr/bin/env bash
# POPE: the mean of the three F1 scores.
# bash scripts/v1_5/eval/pope.sh [--model-path MODEL] [flags of python -m llava.eval]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" pope "$@"
