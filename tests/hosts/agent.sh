#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
# A launch agent for mpirun, in the place of ssh: agent.sh [options] HOST WORDS...
while [ "${1#-}" != "$1" ]; do shift; done
exec "$(dirname "$0")/hosts.sh" login "$@"
