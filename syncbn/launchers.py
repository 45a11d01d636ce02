# SPDX-License-Identifier: BSD-3-Clause
"""Who started this process, read from the environment alone. Nothing is imported, nothing is contacted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple


class Launch(NamedTuple):
    """What a launcher says about this process."""

    name: str
    """One of torchrun, openmpi, mpich, slurm, env, none."""
    rank: int
    size: int
    local_rank: int
    speaks_mpi: bool
    """Whether importing MPI joins this job: a plain ``srun`` may start processes that MPI_Init cannot wire up."""
    evidence: str
    """The variable that gave it away."""


def detect(environ: Mapping[str, str] = os.environ) -> Launch:
    """Recognises torchrun, mpirun of Open MPI and of MPICH and its kin, srun, a hand-made RANK/WORLD_SIZE, or none.

    The innermost launcher wins: torchrun inside srun is torchrun, and mpirun that starts its daemons
    through srun is mpirun.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return _read(environ, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "OMPI_COMM_WORLD_SIZE" in environ:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        return _read(environ, "openmpi", *names, speaks_mpi=True)
    if "PMI_SIZE" in environ and "MPI_LOCALRANKID" in environ:
        return _read(environ, "mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", speaks_mpi=True)
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        pmi = "PMIX_RANK" in environ or "PMI_RANK" in environ
        return _read(environ, "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", speaks_mpi=pmi)
    if "PMI_SIZE" in environ:
        return _read(environ, "mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", speaks_mpi=True)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _read(environ, "env", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    return Launch("none", 0, 1, 0, speaks_mpi=False, evidence="")


def _read(
    environ: Mapping[str, str], name: str, rank: str, size: str, local_rank: str, *, speaks_mpi: bool = False
) -> Launch:
    values = int(environ.get(rank, 0)), int(environ[size]), int(environ.get(local_rank, 0))
    return Launch(name, *values, speaks_mpi=speaks_mpi, evidence=f"{size}={environ[size]}")
