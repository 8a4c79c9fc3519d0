#!/usr/bin/env bash
# ScienceQA, test split: accuracy over all questions, and over those with a picture.
# bash scripts/v1_5/eval/sqa.sh [--model-path MODEL] [flags of python -m llava.eval]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" scienceqa "$@"
