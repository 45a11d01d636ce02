# SPDX-License-Identifier: BSD-3-Clause
"""The live transport of a group: made at its first use, then looked up.

A library is imported when it is chosen, never before: importing ``mpi4py.MPI`` runs MPI_Init.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import Any, NamedTuple

from syncbn.transports import choices, launchers, watched
from syncbn.transports.base import AbstractTransport
from syncbn.transports.connect import connect_subset, over_torch
from syncbn.transports.groups import PARTS, GroupSpec
from syncbn.transports.parts import connect_part
from syncbn.transports.single import SingleTransport


class _Live(NamedTuple):
    """A transport, and the torch world at the time of the choice: None for no world, a string for any."""

    torch_world: weakref.ref[Any] | str | None
    transport: AbstractTransport


made: dict[tuple[GroupSpec | None, str], _Live] = {}
_locks: dict[tuple[GroupSpec | None, str], threading.Lock] = {}
_locking = threading.Lock()
_adopted: set[GroupSpec | None] = set()
"""Groups that ``adopt`` has kept. A layer may make one of them again after it was closed."""


def choose(spec: GroupSpec | None, device_type: str = "cpu") -> AbstractTransport:
    """Resolves a group specification to a live transport.

    Args:
        spec: the group, or None for every rank of the job.
        device_type: the device type of the tensors to be reduced.

    Communication:
        At the first use of a group, on every member: the communicator is duplicated, a number is broadcast, and the
        ranks meet in a side channel, see ``syncbn.transports.watched.watch``. Later calls are a dictionary look-up,
        until torch.distributed's world changes.
        Threads may use their groups for the first time in any order, with one exception: if this process has no handle,
        torch makes the group from ranks, and the order must be the same on every rank.

    Raises:
        ValueError: if ``SYNCBN_TRANSPORT`` is not one of ``CHOICES``, or the group's ranks are not in this job; on
            every member, if torch made groups from ranks in another order on another rank.
        RuntimeError: if the library that the group needs is missing or not initialised.
    """
    live = made.get((spec, device_type))
    if live is not None and _holds(live):
        return live.transport
    with _lock_of(spec, device_type):
        live = made.get((spec, device_type))
        if live is not None and _holds(live):  # another thread made it meanwhile
            return live.transport
        with watched.making(spec, device_type):
            if spec is None:
                transport = connect_everyone(device_type)
            elif spec.kind in PARTS:
                transport = connect_part(spec, choose(None, device_type))
            else:
                transport = connect_subset(spec, device_type)
            watched.watch(transport)
        made[spec, device_type] = _Live(_epoch(spec), transport)
    return transport


def over_mpi(device_type: str = "cpu") -> AbstractTransport:
    """Returns the transport of all ranks of the MPI job, even if training uses another. Collective at its first call.

    Raises:
        RuntimeError: if MPI joined another number of processes than the launcher started.
    """
    from syncbn.transports import mpi

    launch, joined = launchers.detect(), mpi.world().Get_size()
    if launch.speaks_mpi and joined != launch.size:
        what, with_ = (
            "mpirun and the library that mpi4py loaded belong to different MPI installations",
            "the mpirun of that library",
        )
        if launch.name == "slurm":
            what, with_ = "srun spoke another PMI than the library that mpi4py loaded", choices.SRUN
        raise RuntimeError(
            f"{launch.name} started {launch.size} processes ({launch.evidence}), but the MPI library joined {joined}: "
            f"{what}. Run `syncbn doctor`, and start with {with_}."
        )
    return choose(GroupSpec("mpi", mpi.world_ranks(mpi.world())), device_type)


def adopt(transport: AbstractTransport, device_type: str) -> GroupSpec | None:
    """Keeps a transport that ``split`` made. Returns the specification by which ``choose`` finds it."""
    made[transport.spec, device_type] = _Live(_epoch(transport.spec), transport)
    _adopted.add(transport.spec)
    return transport.spec


def discard(transport: AbstractTransport, device_type: str) -> None:
    """Forgets a transport that ``adopt`` kept."""
    made.pop((transport.spec, device_type), None)
    _adopted.discard(transport.spec)


def free(spec: GroupSpec) -> bool:
    """Closes a group that ``adopt`` kept. Returns whether there was one. By every rank of the group."""
    if spec not in _adopted:
        return False
    live = [made.pop(key) for key in list(made) if key[0] == spec]
    for each in live:
        if _holds(each):
            each.transport.close()
    return bool(live)


def _lock_of(spec: GroupSpec | None, device_type: str) -> threading.Lock:
    """Returns the lock of a group. With a single lock, threads in another order on another rank would deadlock."""
    with _locking:
        return _locks.setdefault((spec, device_type), threading.Lock())


def connect_everyone(device_type: str) -> AbstractTransport:
    """Makes the transport of all ranks."""
    choice = choices.explain(device_type)
    if choice.unsynchronized:
        warnings.warn(choice.unsynchronized, RuntimeWarning, stacklevel=5)
    if choice.name in ("mpi", "nccl"):
        return over_mpi(device_type)
    if choice.name == "torch":
        return over_torch(None, device_type)
    return SingleTransport(launchers.detect().rank)


def _epoch(spec: GroupSpec | None) -> weakref.ref[Any] | str | None:
    """Returns the torch world for which a choice holds.

    A transport over MPI lives as long as the process. Any other choice is made again when the world of
    torch.distributed changes, for example after destroy_process_group(). The reference is weak, since a gloo group that
    is alive at the end of the interpreter can abort the process.
    """
    if spec is not None and spec.kind == "mpi":
        return "any"
    torch_world = choices.world_of_torch()
    return None if torch_world is None else weakref.ref(torch_world)


def _holds(live: _Live) -> bool:
    then = live.torch_world
    if then is None:
        return choices.world_of_torch() is None
    return isinstance(then, str) or (then() is not None and then() is choices.world_of_torch())
