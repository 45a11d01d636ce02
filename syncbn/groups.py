# SPDX-License-Identifier: BSD-3-Clause
"""What a module stores instead of a communicator: a specification that copies, pickles and travels.

A live handle (a torch ProcessGroup, an mpi4py communicator) is turned into a :class:`GroupSpec` when it is
given to a layer, and is kept here, per process, so that the first use of the layer finds it again. A process
that has never seen the handle, for example after loading a checkpoint, makes an equal group from the ranks: one for
each label.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class GroupSpec:
    """Some ranks of the job, and who connects them."""

    kind: str
    """"mpi" or "torch"; "blocks", which every rank resolves to its own; "alone"."""
    ranks: tuple[int, ...]
    """The members, by their rank in the whole job."""
    label: str = ""
    """Tells apart two groups of the same ranks. Empty for the one that syncbn makes of them."""
    size: int = 0
    """Of blocks, the number of consecutive ranks in each."""

    def __str__(self) -> str:
        if self.kind == "blocks":
            return f"group of {self.size} consecutive ranks"
        return f"{self.kind} group of ranks {', '.join(map(str, self.ranks))}"

    def __getstate__(self) -> dict[str, Any]:
        """Pickles the label that no other job has, if the group has been used, see :func:`agree_on_label`."""
        return vars(_pickled_as.get(self, self)).copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Returns to the label that this process has for the group, if it knows the group."""
        vars(self).update(state)
        vars(self).update(vars(_unpickled_as.get(self, self)))


ALONE = GroupSpec("alone", ())
"""This process by itself, in any job."""


_handles: dict[GroupSpec, Callable[[], Any | None]] = {}
_pickled_as: dict[GroupSpec, GroupSpec] = {}
_unpickled_as: dict[GroupSpec, GroupSpec] = {}


def specify(group: Any) -> GroupSpec | None:
    """Turns what a user calls a process group into a specification.

    Args:
        group: None for everyone, a torch ProcessGroup, an mpi4py intracommunicator, or a GroupSpec, which
            is what ``World.subgroup`` returns.

    Raises:
        TypeError: for anything else.
        ValueError: where this process is not a member; on such processes alone, since they take no part.
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
    # torch owns its groups, and one kept alive here would outlive destroy_process_group(). MPI's are kept.
    _handles[spec] = weakref.ref(group) if spec.kind == "torch" else lambda: group
    return spec


def specify_blocks(group: Any, size: int | None) -> GroupSpec | None:
    """Turns ``process_group`` or ``group_size``, of which one at most is given, into a specification.

    Raises:
        ValueError: if both are given, or ``size`` is not a number of ranks.
    """
    if size is None:
        return specify(group)
    if group is not None:
        raise ValueError(
            f"group_size and process_group exclude each other; received group_size={size} and a process_group. "
            "Give the one that names the ranks."
        )
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"group_size must be an integer >= 1; received {size!r}. None synchronises over every rank.")
    return GroupSpec("blocks", (), size=size)


def require_divisor(size: int, ranks: int, what: str) -> None:
    """Raises unless groups of ``size`` use every rank.

    Raises:
        ValueError: with the sizes that do; on every rank, since all know the same two numbers.
    """
    if size < 1 or ranks % size:
        divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
        raise ValueError(
            f"{what} needs a size that divides {ranks} ranks; received {size}. "
            f"Choose one of {', '.join(map(str, divisors))}."
        )


def handle(spec: GroupSpec) -> Any | None:
    """Returns the live handle that this process has for a specification, if it has seen one."""
    found = _handles.get(spec)
    return None if found is None else found()


def forget_handle(spec: GroupSpec) -> None:
    """Drops the handle of a specification: its owner has freed it."""
    _handles.pop(spec, None)


def agree_on_label(spec: GroupSpec, group_id: int) -> None:
    """Gives a specification the label under which it is pickled: the number on which its members agreed at first use.

    Within the process the label stays what it was. That one is a mere count, which another job, or a rank whose threads
    made their groups in another order, has for another group.
    """
    pickled = _pickled_as.setdefault(spec, replace(spec, label=label_of_id(group_id)))
    _unpickled_as.setdefault(pickled, spec)


def label_of_id(group_id: int) -> str:
    """Writes the number that no other group has as a label."""
    return f"{group_id:x}"


def _specify_torch(group: Any) -> GroupSpec | None:
    import torch.distributed as dist

    if not dist.is_available():
        return None
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(_not_a_member("the torch process group (it is GroupMember.NON_GROUP_MEMBER)"))
    if not isinstance(group, dist.ProcessGroup):
        return None
    if dist.get_rank(group) < 0:
        raise ValueError(_not_a_member(f"the torch process group of ranks {dist.get_process_group_ranks(group)}"))
    return GroupSpec("torch", tuple(dist.get_process_group_ranks(group)), group.group_name)


def _specify_mpi(group: Any) -> GroupSpec | None:
    MPI = sys.modules.get("mpi4py.MPI")  # whoever holds a communicator has imported it
    if MPI is None or not isinstance(group, MPI.Comm):
        return None
    if group == MPI.COMM_NULL:
        raise ValueError(_not_a_member("the communicator (it is MPI.COMM_NULL)"))
    if group.Is_inter():
        return None
    from syncbn.transports.mpi import spec_of

    return spec_of(group)


def _describe(group: Any) -> str:
    """Names the type, and the value of a plain one; the address of an object would differ between ranks."""
    plain = isinstance(group, str | int | float | list | tuple)
    return f"{type(group).__name__}: {group!r}" if plain else type(group).__name__


def _not_a_member(what: str) -> str:
    return (
        f"process_group must contain the calling process; this process is not part of {what}. "
        "Build the layer only on the members, or pass each process its own group."
    )
