# SPDX-License-Identifier: BSD-3-Clause
"""Which transport a group gets, and why.

A library is imported when it is chosen, never before: importing ``mpi4py.MPI`` runs MPI_Init.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
import weakref
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from syncbn.transports import gather, groups, launchers
from syncbn.transports.base import AbstractTransport
from syncbn.transports.groups import GroupSpec
from syncbn.transports.single import SingleTransport

if TYPE_CHECKING:
    from syncbn.transports.mpi import MPITransport


CHOICES = ("auto", "single", "mpi", "nccl", "torch")
OVERRIDE = "SYNCBN_TRANSPORT"
_HAS_DISTRIBUTED = dist.is_available()


class Choice(NamedTuple):
    """Which transport, and why. ``unsynchronized`` is a warning if no group connects the processes of the job."""

    name: str
    reason: str
    unsynchronized: str = ""


class _Live(NamedTuple):
    """A transport, and the torch world at the time of the choice: None for no world, a string for any."""

    torch_world: weakref.ref[Any] | str | None
    transport: AbstractTransport


made: dict[tuple[GroupSpec | None, str], _Live] = {}
_locks: dict[tuple[GroupSpec | None, str], threading.Lock] = {}
_locking = threading.Lock()


def choose(spec: GroupSpec | None, device_type: str = "cpu") -> AbstractTransport:
    """Resolves a group specification to a live transport.

    Args:
        spec: the group, or None for every rank of the job.
        device_type: the device type of the tensors to be reduced.

    Communication:
        At the first use of a group, on every member: the communicator is duplicated and a number is
        broadcast. Later calls are a dictionary look-up, until torch.distributed's world changes.
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
        transport = connect_everyone(device_type) if spec is None else connect_subset(spec, device_type)
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
        raise RuntimeError(
            f"{launch.name} started {launch.size} processes ({launch.evidence}), but the MPI library joined {joined}: "
            "mpirun and the library that mpi4py loaded belong to different MPI installations. "
            "Run `syncbn doctor`, and start with the mpirun of that library."
        )
    return choose(GroupSpec("mpi", mpi.world_ranks(mpi.world())), device_type)


def adopt(transport: AbstractTransport, device_type: str) -> GroupSpec | None:
    """Keeps a transport that ``split`` made. Returns the specification by which ``choose`` finds it."""
    made[transport.spec, device_type] = _Live(_epoch(transport.spec), transport)
    return transport.spec


def discard(transport: AbstractTransport, device_type: str) -> None:
    """Forgets a transport that :func:`adopt` kept."""
    made.pop((transport.spec, device_type), None)


def explain(device_type: str = "cpu") -> Choice:
    """Says which transport ``process_group=None`` gets in this process, and why. Imports nothing."""
    override = os.environ.get(OVERRIDE, "auto")
    if override not in CHOICES:
        raise ValueError(f"{OVERRIDE} must be one of {', '.join(CHOICES)}; received {override!r}. Correct or unset it.")
    if override != "auto":
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


def _lock_of(spec: GroupSpec | None, device_type: str) -> threading.Lock:
    """Returns the lock of a group. With a single lock, threads in another order on another rank would deadlock."""
    with _locking:
        return _locks.setdefault((spec, device_type), threading.Lock())


def connect_everyone(device_type: str) -> AbstractTransport:
    """Makes the transport of all ranks."""
    choice = explain(device_type)
    if choice.unsynchronized:
        warnings.warn(choice.unsynchronized, RuntimeWarning, stacklevel=5)
    if choice.name in ("mpi", "nccl"):
        return over_mpi(device_type)
    if choice.name == "torch":
        return _torch(None, device_type)
    return SingleTransport(launchers.detect().rank)


def connect_subset(spec: GroupSpec, device_type: str) -> AbstractTransport:
    """Finds the handle of a specification, or makes an equal group. Outside any job a process is its own group."""
    if spec.kind == "alone":
        return SingleTransport(launchers.detect().rank)
    if spec.kind == "blocks":
        return _block(spec.size, device_type)
    handle = groups.handle(spec) or None  # a freed communicator is false
    if spec.kind == "mpi":
        launch = launchers.detect()
        if handle is None and not launch.speaks_mpi:
            return SingleTransport() if launch.size == 1 else _no_mpi_job(spec, launch)
        transport = _mpi(spec, handle)
        return transport if device_type != "cuda" else _on_gpus(transport)
    if world_of_torch() is None and launchers.detect().size == 1:
        return SingleTransport()
    if handle is None or not _torch_knows(handle):
        if world_of_torch() is None:
            _torch(None, device_type)  # raises
        _check_ranks(spec, dist.get_rank(), dist.get_world_size())
        from syncbn.transports.torch_dist import group_of

        made = _torch(group_of(spec.ranks), device_type)
        _require_same_label(spec, made)
        return made
    return _torch(handle, device_type)


def _block(size: int, device_type: str) -> AbstractTransport:
    """Makes this rank's group of ``size`` consecutive ranks. Collective over every rank of the job."""
    everyone = choose(None, device_type)
    if everyone.size == 1:
        return everyone
    gather.require_equal({"group_size": size}, everyone, "SyncBatchNorm", "Build the same model on every rank.")
    groups.require_divisor(size, everyone.size, "group_size")
    return everyone.split(everyone.rank // size)


def _mpi(spec: GroupSpec, handle: Any | None) -> MPITransport:
    """Connects an MPI group over a user's communicator, or over one made from the ranks."""
    from syncbn.transports import mpi

    if handle is not None:
        transport = mpi.MPITransport(handle, spec)
        groups.agree_on_label(spec, transport.group_id)
        return transport
    _check_ranks(spec, mpi.world().Get_rank(), mpi.world().Get_size())
    transport = mpi.MPITransport(mpi.comm_of(spec), spec)
    if spec.label:
        _require_same_label(spec, transport)
    return transport


def _on_gpus(transport: MPITransport) -> AbstractTransport:
    from syncbn.transports.nccl import on_gpus

    return on_gpus(transport, os.environ.get(OVERRIDE, "auto"))


def _torch(group: Any, device_type: str) -> AbstractTransport:
    if world_of_torch() is None:
        raise RuntimeError(
            "The torch transport needs an initialised torch.distributed; it is not. "
            "Call syncbn.init() or torch.distributed.init_process_group() before the first training step."
        )
    from syncbn.transports.torch_dist import TorchTransport

    if group is None:  # gloo matches messages by order: in one group, DDP's buckets would meet ours
        group = dist.new_group() if device_type == "cpu" or _goes_over_gloo(device_type) else dist.group.WORLD
    return TorchTransport(group, device_type)


def _require_same_label(spec: GroupSpec, transport: AbstractTransport) -> None:
    """Raises on every member if a group made from ranks connects layers of different groups.

    torch names such a group by a count, so ranks that make their groups in another order would join the wrong one.
    """
    label = {"checksum of process_group's label": zlib.crc32(spec.label.encode())}
    remedy = "Use layers of another job for the first time in one order on every rank, before they go to threads."
    gather.require_equal(label, transport, "SyncBatchNorm", remedy)


def _goes_over_gloo(device_type: str) -> bool:
    """Whether gloo reduces tensors of this device type. It reduces CUDA tensors if ranks share a GPU."""
    return f"{device_type}:gloo" in str(dist.get_backend_config()).split(",")


def world_of_torch() -> Any | None:
    """Returns torch's default process group, or None. A new one has another identity."""
    return dist.group.WORLD if _HAS_DISTRIBUTED and dist.is_initialized() else None


def _epoch(spec: GroupSpec | None) -> weakref.ref[Any] | str | None:
    """Returns the torch world for which a choice holds.

    A transport over MPI lives as long as the process. Any other choice is made again when the world of
    torch.distributed changes, for example after destroy_process_group(). The reference is weak, since a gloo group that
    is alive at the end of the interpreter can abort the process.
    """
    if spec is not None and spec.kind == "mpi":
        return "any"
    torch_world = world_of_torch()
    return None if torch_world is None else weakref.ref(torch_world)


def _holds(live: _Live) -> bool:
    then = live.torch_world
    if then is None:
        return world_of_torch() is None
    return isinstance(then, str) or (then() is not None and then() is world_of_torch())


def _torch_knows(group: Any) -> bool:
    """Whether torch.distributed still knows a group. After destroy_process_group it does not."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return False
    return True


def _mpi_agrees(size: int, torch_world: Any | None, device_type: str) -> bool:
    """Whether ``None`` means the MPI job. A torch world of another size is more explicit and wins."""
    if torch_world is not None and (torch_world.size() != size or device_type != "cpu"):
        return False
    return importlib.util.find_spec("mpi4py") is not None


def _check_ranks(spec: GroupSpec, rank: int, size: int) -> None:
    if rank not in spec.ranks:
        raise ValueError(
            f"process_group must contain the calling process; received the {spec} on rank {rank} of {size}. "
            "The layer was saved by another rank: set layer.process_group to this one's group, or to None."
        )
    if max(spec.ranks) >= size:
        raise ValueError(
            f"process_group must be made of ranks of this job; received the {spec} in a job of {size}. "
            "The layer comes from a larger job: set layer.process_group to a group of this one, or to None."
        )


def _no_mpi_job(spec: GroupSpec, launch: launchers.Launch) -> AbstractTransport:
    raise RuntimeError(
        f"The {spec} needs a launcher that connects MPI processes; received {launch.name} "
        f"({launch.evidence}). Start with mpirun, or srun --mpi=pmix, or set layer.process_group."
    )


def _unconnected(launch: launchers.Launch) -> str:
    remedy = (
        'Install MPI for Python with: pip install "syncbn[mpi]"'
        if launch.speaks_mpi
        else "Call syncbn.init() or torch.distributed.init_process_group() before the first training step"
    )
    return (
        f"SyncBatchNorm is NOT synchronised: {launch.name} started {launch.size} processes ({launch.evidence}), "
        f"but no group connects them, so each uses the statistics of its local batch. {remedy}, or silence this "
        f"with {OVERRIDE}=single."
    )
