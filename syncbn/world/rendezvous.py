# SPDX-License-Identifier: BSD-3-Clause
"""How torch.distributed finds its peers. On one host, this module listens on loopback only."""

from __future__ import annotations

import atexit
import itertools
import os
import secrets
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from syncbn.transports import interfaces, over_mpi
from syncbn.transports.identity import Identity, of_job
from syncbn.transports.launchers import Launch
from syncbn.waits.channel import LOOPBACK
from syncbn.world import listening, meeting
from syncbn.world.gate import Seat
from syncbn.world.meeting import Place

TIMEOUT = timedelta(minutes=5)
# The agent's store outlives a process group, and with --max-restarts the processes too: a second group, or a second
# round of processes, needs a new prefix, or it gets the addresses of the first.
_connections = itertools.count()
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_met: list[Any] = []
"""The store that is open, and not yet used for a connection."""


def connect_torch(launch: Launch, limit: timedelta | None = None) -> None:
    """Initialises torch.distributed once, with NCCL if each process has a GPU. Ends it when Python exits.

    Args:
        launch: the place of this process.
        limit: of each collective; None for torch's default.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        return
    atexit.register(_disconnect_torch)  # a gloo thread that is alive at exit can abort the process
    own = torch.cuda.is_available() and not shares_gpus(launch)  # NCCL refuses two ranks on one GPU
    backend = "cpu:gloo,cuda:nccl" if own else "gloo"
    store = meet(launch, TIMEOUT)
    _met.clear()
    listening.settle(store, launch.rank, launch.size, TIMEOUT)
    dist.init_process_group(backend, timeout=limit, store=store, rank=launch.rank, world_size=launch.size)


def meet(launch: Launch, timeout: timedelta) -> Any:
    """Opens the key-value store through which ``connect_torch`` connects the processes, once for each connection.

    Communication:
        Collective over all processes of the job.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    if not _met:
        agent = launch.name == "torchrun" or listening.agent_serves()
        store = listening.agent_store(timeout) if agent else _store(launch, timeout)[1]
        part = f"{os.environ.get(RESTARTS, '0')}/{launch.size}"  # a node that joins is no restart to torchrun
        _met.append(PrefixStore(f"syncbn/{part}/{next(_connections)}", store))
    return _met[0]


def shares_gpus(launch: Launch) -> bool:
    """Whether a host has more processes than GPUs. A launcher may assign one visible GPU to each process."""
    handed_out = torch.cuda.device_count() == 1 and bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return launch.local_size > torch.cuda.device_count() and not handed_out


def placed(launch: Launch) -> Launch:
    """Returns a launch with the place of this process in torch.distributed, if no launcher told it.

    torch.multiprocessing.spawn, or a fork, and init_process_group(rank=...) leave no variables. The ranks of one host
    then count themselves.

    Communication:
        In the case above each rank writes the name of its host to torch's store, and reads those of the others.
    """
    import torch.distributed as dist

    if launch.name != "none" or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return launch
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()  # torch has no public name for it
    store.set(f"syncbn/host/{rank}", host())
    hosts = [store.get(f"syncbn/host/{other}").decode() for other in range(size)]
    mine = [other for other in range(size) if hosts[other] == hosts[rank]]
    return launch._replace(
        rank=rank, size=size, local_rank=mine.index(rank), local_size=len(mine), evidence="init_process_group"
    )


def host() -> str:
    """Returns a name of this host that no other has. Containers with a name of their own count as hosts."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _disconnect_torch() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _store(launch: Launch, timeout: timedelta = TIMEOUT) -> tuple[str, Any]:
    """Opens the store where no launcher has one. Returns its address too."""
    identity = of_job(launch)
    if launch.size == 1:
        place = _place_of(meeting.listen(LOOPBACK, 0), LOOPBACK)
    elif listening.ADDRESS in os.environ and listening.PORT in os.environ:
        place = _at(os.environ[listening.ADDRESS], (listening.port(),))
    elif launch.speaks_mpi:
        place, identity = _place_over_mpi(launch, identity)
    elif launch.name == "slurm" and listening.ADDRESS in os.environ:
        place = _at(os.environ[listening.ADDRESS], meeting.ports_of(identity))
    elif os.environ.get("SLURM_STEP_NUM_NODES") == "1":
        place = _at(LOOPBACK, meeting.ports_of(identity))
    else:
        remedy = "Export them, the same on every rank"
        if launch.name == "slurm":
            remedy = (
                'Export MASTER_ADDR, the first host of the job, or use srun --mpi=pmix with pip install "syncbn[mpi]"'
            )
        raise RuntimeError(
            f"torch.distributed needs the address of rank 0 under {launch.name} ({launch.evidence}); MASTER_ADDR and "
            f"MASTER_PORT are not set. {remedy}."
        )
    if launch.rank:
        listening.require_answer(place.address, place.ports[0])
    return place.address, meeting.meet(place, Seat(identity, launch.rank, launch.size), timeout)


def _at(name: str, ports: tuple[int, ...]) -> Place:
    """Returns a place. Rank 0 listens at the address by which the others come."""
    address = listening.address_of(name)
    # In the place of a loopback address another host may find another one of this host's under that name.
    same = name == address or interfaces.of_name(name)[:1] == [address]
    return Place(address, ports, bind=address if same and listening.is_own(address) else "")


def _place_of(listener: socket.socket, address: str) -> Place:
    return Place(address, (int(listener.getsockname()[1]),), listener)


def _place_over_mpi(launch: Launch, identity: Identity) -> tuple[Place, Identity]:
    """Rank 0 listens on a free port, at the address by which the others come. MPI makes that and a secret known."""
    transport = over_mpi()
    address = listening.address_over(transport)
    listener, told = None, torch.zeros(2, dtype=torch.int64, device="cpu")
    if launch.rank == 0:
        listener = meeting.listen(address, 0)
        told[:] = torch.tensor([listener.getsockname()[1], secrets.randbits(62)])
    transport.broadcast(told)
    port, secret = told.tolist()
    listening.require_answer_of_all(address, port, transport)
    return Place(address, (port,), listener), identity._replace(secret=f"{identity.secret}{secret}")
