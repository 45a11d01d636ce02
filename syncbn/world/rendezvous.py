# SPDX-License-Identifier: BSD-3-Clause
"""How torch.distributed finds its peers. On one host, this module listens on loopback only."""

from __future__ import annotations

import atexit
import itertools
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from syncbn.transports import over_mpi
from syncbn.transports.launchers import Launch
from syncbn.waits.channel import LOOPBACK, listen
from syncbn.world import meeting

TIMEOUT = timedelta(minutes=5)
# The agent's store outlives a process group, and with --max-restarts the processes too: a second group, or a second
# round of processes, needs a new prefix, or it gets the addresses of the first.
_connections = itertools.count()
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_met: list[Any] = []
"""The store that is open, and not yet used for a connection."""


def connect_torch(launch: Launch) -> None:
    """Initialises torch.distributed once, with NCCL if each process has a GPU. Ends it when Python exits."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    atexit.register(_disconnect_torch)  # a gloo thread that is alive at exit can abort the process
    own = torch.cuda.is_available() and not shares_gpus(launch)  # NCCL refuses two ranks on one GPU
    backend = "cpu:gloo,cuda:nccl" if own else "gloo"
    store = meet(launch)
    _met.clear()
    meeting.settle(store, launch.rank, launch.size, TIMEOUT)
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size)


def meet(launch: Launch) -> Any:
    """Opens the key-value store through which :func:`connect_torch` connects the processes, once for each connection.

    Communication:
        Collective over all processes of the job.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    if not _met:
        store = meeting.open_store(launch.rank, launch.size, TIMEOUT) if _by_address(launch) else _store(launch)
        _met.append(PrefixStore(f"syncbn/{os.environ.get(RESTARTS, '0')}/{next(_connections)}", store))
    return _met[0]


def _by_address(launch: Launch) -> bool:
    """Whether the processes meet at MASTER_ADDR."""
    told = meeting.ADDRESS in os.environ and meeting.PORT in os.environ
    return launch.name in ("torchrun", "env") or (launch.size > 1 and told)


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


def _store(launch: Launch) -> Any:
    """Opens the store where nobody has told an address."""
    if launch.size == 1:
        listener = listen(LOOPBACK)
        return _on_loopback(launch, int(listener.getsockname()[1]), listener)
    if launch.speaks_mpi:
        return meeting.store_over_mpi(over_mpi(), TIMEOUT)
    if os.environ.get("SLURM_STEP_NUM_NODES") == "1":
        port = 20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000
        return _on_loopback(launch, port, listen(LOOPBACK, port) if launch.rank == 0 else None)
    raise RuntimeError(
        f"torch.distributed needs the address of rank 0 under {launch.name} on several hosts; MASTER_ADDR and "
        "MASTER_PORT are not set. Export them, as launch/slurm.sbatch does, or use srun --mpi=pmix with "
        'pip install "syncbn[mpi]".'
    )


def _on_loopback(launch: Launch, port: int, listener: socket.socket | None) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if listener is None:
        return TCPStore(LOOPBACK, port, launch.size, False, TIMEOUT)
    return TCPStore(LOOPBACK, port, launch.size, True, TIMEOUT, master_listen_fd=listener.detach())
