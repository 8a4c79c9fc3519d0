#!/usr/bin/env bash
# SEED-Bench: accuracy over image questions.
# bash scripts/v1_5/eval/seed.sh [--model-path MODEL] [flags of python -m llava.eval]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" seed_image "$@"
