#!/usr/bin/env bash
# Stage 2 without reduction, the baseline: trains language model and projector. See --help.
exec bash "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh" finetune "$@"
