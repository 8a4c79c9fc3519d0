#!/usr/bin/env bash
# Stage 2 with DUET and LoRA adapters. See --help.
exec bash "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh" finetune_duet_lora "$@"
