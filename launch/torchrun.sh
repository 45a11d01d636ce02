#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Start a Python program on NPROC processes of this host under torchrun; torchrun ends all when one fails.
#
#     NPROC=4 launch/torchrun.sh train.py --epochs 3
set -euo pipefail
NPROC=${NPROC:-2}
PYTHON=${PYTHON:-python}

# One thread a process: more processes than cores with several threads each are slower, not faster.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# --standalone listens on a free port of this host; gloo is told to stay on loopback too.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$@"
