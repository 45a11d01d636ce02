# SPDX-License-Identifier: BSD-3-Clause
"""Which transport all ranks of a job get, and why. Imports no library of a transport."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import torch.distributed as dist

from syncbn.transports import launchers

CHOICES = ("auto", "single", "shm", "mpi", "nccl", "torch")
OVERRIDE = "SYNCBN_TRANSPORT"
SRUN = "srun --mpi=pmix, or another of `srun --mpi=list` that the MPI library of mpi4py was built for"
"""How Slurm's processes become one MPI job."""
_HAS_DISTRIBUTED = dist.is_available()


class Choice(NamedTuple):
    """Which transport, and why. ``unsynchronized`` is a warning if no group connects the processes of the job."""

    name: str
    reason: str
    unsynchronized: str = ""


def explain(device_type: str = "cpu") -> Choice:
    """Says which transport ``process_group=None`` gets in this process, and why. Imports nothing."""
    override = os.environ.get(OVERRIDE, "auto")
    if override not in CHOICES:
        raise ValueError(f"{OVERRIDE} must be one of {', '.join(CHOICES)}; received {override!r}. Correct or unset it.")
    if override not in ("auto", "shm"):  # shared memory is made known by the library that is chosen here
        return Choice(override, f"{OVERRIDE}={override}")
    launch = launchers.detect()
    torch_world = world_of_torch()
    if launch.size > 1 and launch.speaks_mpi and _mpi_agrees(launch.size, torch_world, device_type):
        name = "mpi" if device_type == "cpu" or importlib.util.find_spec("cupy") is None else "nccl"
        return Choice(name, f"a {device_type} tensor under {launch.name} ({launch.evidence})")
    if torch_world is not None:
        return Choice("torch", "torch.distributed is initialised")
    if launch.size == 1:
        return Choice("single", "no launcher started other processes" if launch.name == "none" else launch.evidence)
    return Choice("single", f"no group connects the {launch.size} processes", _unconnected(launch))


def world_of_torch() -> Any | None:
    """Returns torch's default process group, or None. A new one has another identity."""
    return dist.group.WORLD if _HAS_DISTRIBUTED and dist.is_initialized() else None


def _mpi_agrees(size: int, torch_world: Any | None, device_type: str) -> bool:
    """Whether ``None`` means the MPI job. A torch world of another size is more explicit and wins."""
    if torch_world is not None and (torch_world.size() != size or device_type != "cpu"):
        return False
    return importlib.util.find_spec("mpi4py") is not None


def _unconnected(launch: launchers.Launch) -> str:
    remedy = (
        'Install MPI for Python with: pip install "syncbn[mpi]"'
        if launch.speaks_mpi
        else "Call syncbn.init() or torch.distributed.init_process_group() before the first training step"
    )
    if launch.name == "slurm" and not launch.speaks_mpi:
        remedy += f", or let MPI connect them: {SRUN}"
    return _not_synchronised(launch, "no group connects them", remedy)


def alone_in_mpi(launch: launchers.Launch) -> str:
    """Returns the warning for a communicator of an MPI job of one process, of which the launcher started several."""
    remedy = f"Start with {SRUN}" if launch.name == "slurm" else "Start with the mpirun of the MPI that mpi4py loaded"
    return _not_synchronised(launch, "to MPI each is a job of its own", remedy)


def _not_synchronised(launch: launchers.Launch, why: str, remedy: str) -> str:
    return (
        f"SyncBatchNorm is NOT synchronised: {launch.name} started {launch.size} processes ({launch.evidence}), "
        f"but {why}, so each uses the statistics of its local batch. {remedy}, or silence this "
        f"with {OVERRIDE}=single."
    )
