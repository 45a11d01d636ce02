# SPDX-License-Identifier: BSD-3-Clause
"""What a module stores instead of a communicator: a specification that copies, pickles and travels.

A live handle (a torch ProcessGroup, an mpi4py communicator) is turned into a :class:`GroupSpec` when it is
given to a layer, and is kept here, per process, so that the first use of the layer finds it again. A process
that has never seen the handle, for example after loading a checkpoint, makes an equal group from the ranks: one for
each label.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class GroupSpec:
    """Some ranks of the job, and who connects them."""

    __module__ = "syncbn"

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


def keep_handle(spec: GroupSpec, group: Any) -> None:
    """Keeps the live handle of a specification. torch owns its groups, and one kept alive here would outlive them."""
    _handles[spec] = weakref.ref(group) if spec.kind == "torch" else lambda: group


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
