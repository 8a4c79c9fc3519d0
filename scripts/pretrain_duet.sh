#!/usr/bin/env bash
# Stage 1 with DUET. See --help.
exec bash "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh" pretrain_duet "$@"
