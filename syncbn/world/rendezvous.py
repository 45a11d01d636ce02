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

from syncbn.transports.identity import Identity, of_job
from syncbn.transports.launchers import Launch
from syncbn.world import meeting
from syncbn.world.gate import Seat
from syncbn.world.meeting import Place

LOOPBACK = "127.0.0.1"
TIMEOUT = timedelta(minutes=5)
# The agent's store outlives a process group, and with --max-restarts the processes too: a second group, or a second
# round of processes, needs a new prefix, or it gets the addresses of the first.
_connections = itertools.count()
RESTARTS = "TORCHELASTIC_RESTART_COUNT"


def connect_torch(launch: Launch) -> None:
    """Initialises torch.distributed once, with NCCL if each process has a GPU. Ends it when Python exits."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    atexit.register(_disconnect_torch)  # a gloo thread that is alive at exit can abort the process
    own = torch.cuda.is_available() and not shares_gpus(launch)  # NCCL refuses two ranks on one GPU
    backend = "cpu:gloo,cuda:nccl" if own else "gloo"
    if launch.name == "torchrun" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

        store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        store = PrefixStore(f"syncbn/{os.environ.get(RESTARTS, '0')}/{next(_connections)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        return
    address, store = _store(launch)
    if address == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size)


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


def _store(launch: Launch) -> tuple[str, Any]:
    """Opens the key-value store where the processes exchange their addresses."""
    identity = of_job(launch)
    if launch.size == 1:
        place = _place_of(meeting.listen(LOOPBACK, 0), LOOPBACK)
    elif "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        place = _chosen_place(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    elif launch.speaks_mpi:
        place, identity = _place_over_mpi(launch, identity)
    elif launch.name == "slurm" and "MASTER_ADDR" in os.environ:
        place = _at(os.environ["MASTER_ADDR"], meeting.ports_of(identity))
    elif os.environ.get("SLURM_STEP_NUM_NODES") == "1":
        place = _at(LOOPBACK, meeting.ports_of(identity))
    else:
        remedy = "Export them, the same on every rank"
        if launch.name == "slurm":
            remedy = (
                'Export MASTER_ADDR, as launch/slurm.sbatch does, or use srun --mpi=pmix with pip install "syncbn[mpi]"'
            )
        raise RuntimeError(
            f"torch.distributed needs the address of rank 0 under {launch.name} ({launch.evidence}); MASTER_ADDR and "
            f"MASTER_PORT are not set. {remedy}."
        )
    return place.address, meeting.meet(place, Seat(identity, launch.rank, launch.size), TIMEOUT)


def _at(address: str, ports: tuple[int, ...]) -> Place:
    """Returns a place. Rank 0 listens on loopback alone if the others come by it."""
    return Place(address, ports, bind=LOOPBACK if address in (LOOPBACK, "localhost") else "")


def _chosen_place(address: str, port: str) -> Place:
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"MASTER_PORT must be a port from 1 to 65535; received {port!r}. Set it to a free one.")
    return _at(address, (int(port),))


def _place_of(listener: socket.socket, address: str) -> Place:
    return Place(address, (int(listener.getsockname()[1]),), listener)


def _place_over_mpi(launch: Launch, identity: Identity) -> tuple[Place, Identity]:
    """Rank 0 listens on a free port, on loopback if all ranks are on its host. MPI broadcasts the port and a secret."""
    from syncbn.transports import mpi, over_mpi

    transport = over_mpi()
    on_one_host = mpi.ranks_on_this_host() == launch.size
    listener: socket.socket | None = None
    told = torch.zeros(2, dtype=torch.int64, device="cpu")
    address = LOOPBACK if on_one_host else mpi.host_of_rank_zero()
    if launch.rank == 0:
        listener = meeting.listen(LOOPBACK if on_one_host else "", 0)
        told[:] = torch.tensor([listener.getsockname()[1], secrets.randbits(62)])
    transport.broadcast(told)
    port, secret = told.tolist()
    return Place(address, (port,), listener), identity._replace(secret=f"{identity.secret}{secret}")
