# SPDX-License-Identifier: BSD-3-Clause
"""Finds out from the environment which launcher started this process. Imports and contacts nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple


class Launch(NamedTuple):
    """What the launcher's variables say about this process."""

    name: str
    """One of torchrun, openmpi, mpich, slurm, env, none."""
    rank: int
    size: int
    local_rank: int
    speaks_mpi: bool
    """Whether MPI_Init joins this job. A plain ``srun`` may start processes that it cannot connect."""
    evidence: str
    """The variable that identified the launcher."""
    local_size: int = 1
    """Processes on this host. If the launcher does not say, the number known: local rank + 1."""


MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def detect(environ: Mapping[str, str] = os.environ) -> Launch:
    """Recognises torchrun, mpirun (Open MPI, MPICH and MPIs derived from it), srun, RANK/WORLD_SIZE, or no launcher.

    The innermost launcher wins: torchrun inside srun is torchrun, and mpirun that starts its daemons
    through srun is mpirun.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return _read(environ, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "OMPI_COMM_WORLD_SIZE" in environ:
        names = (f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        return _read(environ, "openmpi", *names, speaks_mpi=True)
    if "PMI_SIZE" in environ and "MPI_LOCALRANKID" in environ:
        return _read(environ, "mpich", *MPICH, speaks_mpi=True)
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        pmi = "PMIX_RANK" in environ or "PMI_RANK" in environ
        found = _read(environ, "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", speaks_mpi=pmi)
        return found._replace(local_size=_tasks_of_this_node(environ) or found.local_size)
    if "PMI_SIZE" in environ:
        return _read(environ, "mpich", *MPICH, speaks_mpi=True)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _read(environ, "env", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Launch("none", 0, 1, 0, speaks_mpi=False, evidence="")


def _read(
    environ: Mapping[str, str],
    name: str,
    rank: str,
    size: str,
    local_rank: str,
    local_size: str = "",
    *,
    speaks_mpi: bool = False,
) -> Launch:
    values = number(environ, rank, 0), number(environ, size), number(environ, local_rank, 0)
    _require_place(rank, values[0], size, values[1])
    processes_here = number(environ, local_size, values[2] + 1)
    place = Launch(name, *values, speaks_mpi=speaks_mpi, evidence=f"{size}={environ[size]}")
    return place._replace(local_size=processes_here)


def _tasks_of_this_node(environ: Mapping[str, str]) -> int:
    """Reads Slurm's number of tasks on this node, from a text such as ``2(x3),1``; 0 if it does not say."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        count, _, times = part.removesuffix(")").partition("(x")
        if not count.isdecimal() or not (times or "1").isdecimal():
            return 0
        counts += [int(count)] * int(times or 1)
    node = number(environ, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 0


def number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Reads a variable that holds a whole number.

    Raises:
        ValueError: if it holds something else, or if it is not set and there is no default.
    """
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdecimal():
        received = "nothing" if text is None else repr(text)
        raise ValueError(
            f"{name} must be a whole number; received {received}. A launcher sets it: unset it if no launcher started "
            "this process, or correct what exports it."
        )
    return int(text)


def _require_place(rank: str, own: int, size: str, total: int) -> None:
    if not 0 <= own < total:
        raise ValueError(
            f"{rank} must be below {size}; received {rank}={own} and {size}={total}. Give each process a number of its "
            f"own from 0 to {size} - 1."
        )
