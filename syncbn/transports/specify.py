# SPDX-License-Identifier: BSD-3-Clause
"""Turns what a user passes as a process group into the specification that a module stores."""

from __future__ import annotations

import sys
from typing import Any, Literal

from syncbn.transports import groups
from syncbn.transports.groups import NODE, GroupSpec
from syncbn.waits.limits import shown
from syncbn.waits.ranks import named


def specify(group: Any) -> GroupSpec | None:
    """Turns what a user passes as a process group into a specification.

    Args:
        group: None for everyone, a torch ProcessGroup, an mpi4py intracommunicator, or a GroupSpec, which
            is what ``World.subgroup`` returns.

    Raises:
        TypeError: for anything else.
        ValueError: if this process is not a member; on such processes alone, since they take no part.
    """
    if group is None or isinstance(group, GroupSpec):
        return group
    torch_spec = _specify_torch(group)
    spec = torch_spec or _specify_mpi(group)
    if spec is None:
        raise TypeError(
            "process_group must be None, a torch.distributed.ProcessGroup, an mpi4py intracommunicator, or the "
            f"result of World.subgroup(size); received {_describe(group)}. "
            "Pass None to synchronise over every rank."
        )
    groups.keep_handle(spec, group)
    return spec


def specify_blocks(group: Any, size: int | Literal["node"] | None) -> GroupSpec | None:
    """Turns ``process_group`` or ``group_size`` into a specification. At most one of them is given.

    Raises:
        ValueError: if both are given, or ``size`` is neither a number of ranks nor "node".
    """
    if size is None:
        return specify(group)
    if group is not None:
        raise ValueError(
            f"group_size and process_group exclude each other; received group_size={size} and a process_group. "
            "Give the one that names the ranks."
        )
    if isinstance(size, str) and size == NODE:
        return GroupSpec(NODE, ())
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"group_size must be an integer >= 1 or '{NODE}'; received {shown(size)}. "
            "None synchronises over every rank."
        )
    return GroupSpec("blocks", (), size=size)


def _specify_torch(group: Any) -> GroupSpec | None:
    import torch.distributed as dist

    if not dist.is_available():
        return None
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(_not_a_member("the torch process group (it is GroupMember.NON_GROUP_MEMBER)"))
    if not isinstance(group, dist.ProcessGroup):
        return None
    if dist.get_rank(group) < 0:
        raise ValueError(_not_a_member(f"the torch process group of {named(dist.get_process_group_ranks(group))}"))
    return GroupSpec("torch", tuple(dist.get_process_group_ranks(group)), group.group_name)


def _specify_mpi(group: Any) -> GroupSpec | None:
    MPI = sys.modules.get("mpi4py.MPI")  # imported, if the user holds a communicator
    if MPI is None or not isinstance(group, MPI.Comm):
        return None
    if group == MPI.COMM_NULL:
        raise ValueError(_not_a_member("the communicator (it is MPI.COMM_NULL)"))
    if group.Is_inter():
        return None
    from syncbn.transports.mpi import spec_of

    return spec_of(group)


def _describe(group: Any) -> str:
    """Names the type, and the value if it is plain: the address of an object would differ between ranks."""
    plain = isinstance(group, str | int | float | list | tuple)
    return f"{type(group).__name__}: {shown(group)}" if plain else type(group).__name__


def _not_a_member(what: str) -> str:
    return (
        f"process_group must contain the calling process; this process is not part of {what}. "
        "Build the layer only on the members, or pass each process its own group."
    )
