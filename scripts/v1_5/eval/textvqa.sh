#!/usr/bin/env bash
# TextVQA, validation split, with OCR tokens in the prompt: soft accuracy.
# bash scripts/v1_5/eval/textvqa.sh [--model-path MODEL] [flags of python -m llava.eval]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" textvqa "$@"
