#!/usr/bin/env bash
# Stage 1 without reduction: trains the projector. See --help.
exec bash "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh" pretrain "$@"
