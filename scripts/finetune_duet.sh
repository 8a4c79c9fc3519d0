#!/usr/bin/env bash
# Both LLaVA stages with DUET; without an accelerator the tiny world, end to end. See --help.
exec bash "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh" finetune_duet "$@"
