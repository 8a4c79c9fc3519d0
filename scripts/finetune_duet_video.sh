#!/usr/bin/env bash
# Video-LLaVA with DUET on images and videos; without an accelerator the tiny video world, end to end. See --help.
exec bash "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh" finetune_duet_video "$@"
