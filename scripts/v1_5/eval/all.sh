#!/usr/bin/env bash
# The six picture benchmarks of the paper.
# bash scripts/v1_5/eval/all.sh [--model-path MODEL] [flags of python -m llava.eval]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" all "$@"
