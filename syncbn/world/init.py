# SPDX-License-Identifier: BSD-3-Clause
"""init() finds this process's place in the job, connects it to the others, and returns the World."""

from __future__ import annotations

import torch

from syncbn import transports
from syncbn.transports import gather, launchers
from syncbn.transports.base import AbstractTransport
from syncbn.transports.launchers import Launch
from syncbn.waits import limits
from syncbn.world import rendezvous
from syncbn.world.world import World


def init(
    *,
    torch_distributed: bool | None = None,
    device: torch.device | str | None = None,
    timeout: float | None = None,
) -> World:
    """Finds this process's place in the job and connects it to the others.

    Works under mpirun (Open MPI, MPICH and MPIs derived from it), srun, torchrun, and without a launcher. It may be
    called again, and then keeps the existing connections.

    Args:
        torch_distributed: True sets up torch.distributed too, so that DDP works under mpirun. None sets it up
            if nothing else connects the processes: under torchrun, and under srun without MPI.
        device: the device of this process. None takes the GPU of the local rank, else the CPU.
        timeout: seconds that a call may wait for other ranks, the same on every rank; ``float("inf")`` for no limit.
            Then all ranks end, with a report that says who waits for whom. None takes ``SYNCBN_TIMEOUT``, else 300.

    Communication:
        Collective over all processes of the job.

    Raises:
        RuntimeError: if the launcher speaks MPI and mpi4py is missing, with the install line; if there are more
            processes on a host than GPUs and no ``device`` is given.
        ValueError: on every rank, if ``timeout`` is not a number above 0, or differs between ranks.
    """
    launch = rendezvous.placed(launchers.detect())
    where = device_of(launch) if device is None else torch.device(device)
    if where.type == "cuda":
        where = where if where.index is not None else torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(where)  # NCCL and the kernels take the current one
    if torch_distributed is None:
        torch_distributed = launch.size > 1 and not launch.speaks_mpi
    if torch_distributed:
        rendezvous.connect_torch(launch, limits.of_libraries(timeout))
    elif launch.speaks_mpi and launch.size > 1:
        transports.over_mpi()
    transport = transports.choose(None, where.type)
    _agree_on_limit(timeout, transport)
    return World(transport.rank, transport.size, launch.local_rank, where, launch.name, transport)


def _agree_on_limit(timeout: float | None, transport: AbstractTransport) -> None:
    """Sets the limit of waits, or raises on every rank alike."""
    error: Exception | None = None
    try:
        seconds = limits.limit() if timeout is None else limits.checked(timeout, "syncbn.init(timeout)")
    except ValueError as wrong:
        seconds, error = limits.DEFAULT, wrong
    remedy = f"Give every rank the same one, by timeout or by {limits.TIMEOUT}."
    gather.require_equal({"timeout": seconds}, transport, "syncbn.init", remedy, error)
    limits.give(seconds)


def device_of(launch: Launch) -> torch.device:
    """Returns the GPU of the local rank, or the CPU where there is none. Raises alike on every rank of the host."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if rendezvous.shares_gpus(launch):
        raise RuntimeError(
            f"syncbn.init() needs a GPU for each process of a host; received {launch.local_size} processes and "
            f"{torch.cuda.device_count()} GPUs on the host of rank {launch.rank}. Start fewer processes, call "
            "syncbn.init(device='cpu'), or share a GPU knowingly with syncbn.init(device='cuda:0'): then MPI "
            "through host memory, or gloo, connects the "
            "processes, since NCCL refuses two ranks on one GPU."
        )
    return torch.device("cuda", launch.local_rank if torch.cuda.device_count() > 1 else 0)
