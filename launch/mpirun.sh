#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Start a Python program on NPROC processes, under the mpirun of Open MPI or MPICH.
#
#     NPROC=4 launch/mpirun.sh train.py --epochs 3
#     NPROC=4 launch/mpirun.sh -m pytest --with-mpi tests
#     NPROC=8 MPIRUN="mpirun --hostfile hosts" launch/mpirun.sh train.py
set -euo pipefail
NPROC=${NPROC:-2}
PYTHON=${PYTHON:-python}
read -ra MPIRUN <<<"${MPIRUN:-mpirun}" # a command and its options, split at spaces

# One thread a process: more processes than cores with several threads each are slower, not faster.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# glibc hands large freed tensors back to the system and then faults them in again, a page at a time, in every step.
# With these it keeps them: blocks of up to 32 MiB inside its heap, and up to 2 GB of freed memory at the end of it.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2000000000}

# More processes than cores is allowed; Open MPI then yields instead of spinning. Two names: versions 4 and 5.
export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}
export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy:-slot:oversubscribe}

# A container runs as root, which Open MPI refuses without these two variables.
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

"$PYTHON" -c 'import mpi4py' 2>/dev/null || {
    echo "launch/mpirun.sh needs mpi4py in the Python that it starts; $PYTHON has none. Install it with:" \
        "pip install \"syncbn[mpi]\" (for an mpirun of MPICH: pip install mpi4py mpich)," \
        "or name another Python by PYTHON." >&2
    exit 1
}

# The runner of mpi4py ends all processes at once when one of them raises; without it the others hang. mpirun itself can
# hang, or end with status 0, when a host is lost: guard.py makes it end, and never with 0 where the job has failed.
exec "$PYTHON" "$(dirname "$0")/guard.py" "${MPIRUN[@]}" -n "$NPROC" "$PYTHON" -m mpi4py "$@"
