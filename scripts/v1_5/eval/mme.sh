#!/usr/bin/env bash
# MME: perception + cognition.
# bash scripts/v1_5/eval/mme.sh [--model-path MODEL] [flags of python -m llava.eval]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" mme "$@"
