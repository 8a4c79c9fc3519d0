#!/usr/bin/env bash
# Any supported Hugging Face model with DUET on LLaVA-format data, full or LoRA; BASE_MODEL names it. See --help.
exec bash "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh" finetune_duet_hf "$@"
