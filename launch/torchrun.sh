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

# glibc hands large freed tensors back to the system and then faults them in again, a page at a time, in every step.
# With these it keeps them: blocks of up to 32 MiB inside its heap, and up to 2 GB of freed memory at the end of it.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2000000000}

# All processes are on this host: gloo stays on loopback. torchrun's own store listens on every interface.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}

# A process that waits inside gloo ignores Ctrl-C. torchrun kills it after this many seconds (its default is 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-5}

# Without --local-addr the processes look up the name of the host. Where it has no address they wait 90 seconds and fail.
exec "$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$NPROC" "$@"
