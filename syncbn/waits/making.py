# SPDX-License-Identifier: BSD-3-Clause
"""Watches the making of a group: its first call, before it has a transport that could be watched."""

from __future__ import annotations

from collections import deque
from typing import Any

from syncbn.waits import watchdog


class Making:
    """A group that is being made: the call that all members must come to. Later uses of the group have a record there.

    Args:
        what: the group, for reports.
        group_id: the same number on all members.
        ranks: the members, by their rank in the whole job.
    """

    patience: float | None = None
    completed: str | None = None
    failed: Any = None
    recent: deque[tuple[int, Any]] | None = None

    def __init__(self, what: str, group_id: int, ranks: tuple[int, ...]) -> None:
        self.group_id, self.ranks, self.begun = group_id, ranks, 1
        self.current: str | None = f"the first use of the {what}"

    def __enter__(self) -> None:
        """Begins the call."""

    def __exit__(self, *raised: object) -> None:
        """Ends the call. The watchdog knows it from now on as completed, so that nobody waits for this rank."""
        self.completed, self.current = self.current, None


def watch_making(what: str, group_id: int, ranks: tuple[int, ...], rank: int, launcher: str) -> Making:
    """Watches the making of a group, and returns it to be entered. For the arguments see ``Making``, ``Watchdog``."""
    group, dog = Making(what, group_id, ranks), watchdog.started(rank, launcher)
    dog.made.append(group)
    dog.reader.add(group)
    return group
