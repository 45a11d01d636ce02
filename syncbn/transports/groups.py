# SPDX-License-Identifier: BSD-3-Clause
"""What a module stores instead of a communicator: a specification that can be copied and pickled.

A live handle (a torch ProcessGroup, an mpi4py communicator) becomes a ``GroupSpec`` when it is given to a layer.
The handle is kept here, per process, and the first use of the layer finds it. A process that has never seen the
handle, for example after loading a checkpoint, makes an equal group from the ranks, one for each label.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from syncbn.waits.limits import shown
from syncbn.waits.ranks import named

NODE = "node"
"""The kind of the group of the ranks of one host, and what ``group_size`` calls it."""
PARTS = ("blocks", NODE)
"""Kinds of which every rank uses its own group."""


@dataclass(frozen=True)
class GroupSpec:
    """Some ranks of the job, and the library that connects them."""

    __module__ = "syncbn"

    kind: str
    """"mpi" or "torch"; "blocks" or "node", of which every rank uses its own; or "alone"."""
    ranks: tuple[int, ...]
    """The members, by their rank in the whole job."""
    label: str = ""
    """Distinguishes groups of the same ranks. Empty for the group that syncbn makes of them."""
    size: int = 0
    """For "blocks", the number of consecutive ranks in each."""

    def __post_init__(self) -> None:
        """Refuses what no group of ranks is."""
        ranks: object = self.ranks
        if not isinstance(ranks, tuple) or not all(type(rank) is int and rank >= 0 for rank in ranks):
            raise TypeError(
                f"syncbn.GroupSpec needs a tuple of ranks, integers >= 0; received {shown(ranks)}. "
                "World.subgroup(size) makes one; a layer takes a ProcessGroup or a communicator as it is."
            )

    def __str__(self) -> str:
        if self.kind == "blocks":
            return f"group of {self.size} consecutive ranks"
        if self.kind == NODE:
            return "group of the ranks of one host"
        if not self.ranks:
            return "group of this process alone"
        return f"{self.kind} group of {named(self.ranks)}"

    def __getstate__(self) -> dict[str, Any]:
        """Pickles a label that is unique over all jobs, if the group has been used, see ``agree_on_label``."""
        return vars(pickled_as.get(self, self)).copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the label that this process uses for the group, if it knows the group."""
        vars(self).update(state)
        vars(self).update(vars(unpickled_as.get(self, self)))


ALONE = GroupSpec("alone", ())
"""This process by itself, in any job."""


handles: dict[GroupSpec, Callable[[], Any | None]] = {}
"""What returns the live handle of each group that this process was given, see ``keep_handle``."""
pickled_as: dict[GroupSpec, GroupSpec] = {}
"""Each group that has been used, and with which label it is pickled, see ``agree_on_label``."""
unpickled_as: dict[GroupSpec, GroupSpec] = {}
"""The reverse."""


def require_divisor(size: int, ranks: int, what: str) -> None:
    """Raises unless ``size`` divides the number of ranks.

    Raises:
        ValueError: with the sizes that do; on every rank, since all compare the same two numbers.
    """
    if size < 1 or ranks % size:
        divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
        raise ValueError(
            f"{what} needs a size that divides {ranks} ranks; received {size}. "
            f"Choose one of {', '.join(map(str, divisors))}."
        )


def keep_handle(spec: GroupSpec, group: Any) -> None:
    """Keeps the live handle of a specification. torch owns its groups, so of those only a weak reference is kept."""
    handles[spec] = weakref.ref(group) if spec.kind == "torch" else lambda: group


def handle(spec: GroupSpec) -> Any | None:
    """Returns the live handle of a specification, or None if this process has not seen one."""
    found = handles.get(spec)
    return None if found is None else found()


def forget_handle(spec: GroupSpec) -> None:
    """Drops the handle of a specification, after its owner has freed it."""
    handles.pop(spec, None)


def agree_on_label(spec: GroupSpec, group_id: int) -> None:
    """Sets the label under which a specification is pickled: the number on which its members agreed at first use.

    Within the process the label stays a count. Another job has the same count for another group, and so has a rank
    whose threads made their groups in another order.
    """
    pickled = pickled_as.setdefault(spec, replace(spec, label=label_of_id(group_id)))
    unpickled_as.setdefault(pickled, spec)


def label_of_id(group_id: int) -> str:
    """Returns the label for the unique number of a group."""
    return f"{group_id:x}"
