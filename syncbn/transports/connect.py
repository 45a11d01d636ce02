# SPDX-License-Identifier: BSD-3-Clause
"""Connects the ranks of a group: finds the handle of its specification, or makes an equal group."""

from __future__ import annotations

import os
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from syncbn.transports import choices, gather, groups, launchers, shared_memory
from syncbn.transports.base import AbstractTransport
from syncbn.transports.groups import GroupSpec
from syncbn.transports.single import SingleTransport

if TYPE_CHECKING:
    from syncbn.transports.mpi import MPITransport


def connect_subset(spec: GroupSpec, device_type: str) -> AbstractTransport:
    """Finds the handle of a specification, or makes an equal group. Outside any job a process is its own group."""
    if spec.kind == "alone":
        return SingleTransport(launchers.detect().rank)
    handle = groups.handle(spec) or None  # a freed communicator is false
    if spec.kind == "mpi":
        launch = launchers.detect()
        if handle is None and not launch.speaks_mpi:
            return SingleTransport() if launch.size == 1 else _no_mpi_job(spec, launch)
        transport = _mpi(spec, handle)
        return _on_one_host(transport) if device_type != "cuda" else _on_gpus(transport)
    if choices.world_of_torch() is None and launchers.detect().size == 1:
        return SingleTransport()
    if handle is None or not _torch_knows(handle):
        if choices.world_of_torch() is None:
            over_torch(None, device_type)  # raises
        _check_ranks(spec, dist.get_rank(), dist.get_world_size())
        from syncbn.transports.torch_dist import group_of, limit_of

        limit = limit_of(choices.world_of_torch(), device_type)
        made = over_torch(group_of(spec.ranks, limit), device_type)
        _require_same_label(spec, made)
        return made
    return over_torch(handle, device_type)


def over_torch(group: Any, device_type: str) -> AbstractTransport:
    """Connects a torch ProcessGroup; None for one of all ranks."""
    if choices.world_of_torch() is None:
        raise RuntimeError(
            "The torch transport needs an initialised torch.distributed; it is not. "
            "Call syncbn.init() or torch.distributed.init_process_group() before the first training step."
        )
    from syncbn.transports.torch_dist import TorchTransport, group_of_everyone

    if group is None:  # gloo matches messages by order: in one group, DDP's buckets would meet ours
        apart = device_type == "cpu" or _goes_over_gloo(device_type)
        group = group_of_everyone(device_type) if apart else dist.group.WORLD
    transport = TorchTransport(group, device_type)
    if device_type != "cpu":
        return transport
    from syncbn.transports.nodes import by_nodes

    return by_nodes(transport, os.environ.get(choices.OVERRIDE, "auto"))


def _on_one_host(transport: AbstractTransport) -> AbstractTransport:
    return shared_memory.on_one_host(transport, os.environ.get(choices.OVERRIDE, "auto"))


def _mpi(spec: GroupSpec, handle: Any | None) -> MPITransport:
    """Connects an MPI group over a user's communicator, or over one made from the ranks."""
    from syncbn.transports import mpi

    if handle is not None:
        launch = launchers.detect()
        if mpi.world().Get_size() == 1 < launch.size and os.environ.get(choices.OVERRIDE) != "single":
            warnings.warn(choices.alone_in_mpi(launch), RuntimeWarning, stacklevel=5)
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

    return on_gpus(transport, os.environ.get(choices.OVERRIDE, "auto"))


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


def _torch_knows(group: Any) -> bool:
    """Whether torch.distributed still knows a group. After destroy_process_group it does not."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return False
    return True


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
