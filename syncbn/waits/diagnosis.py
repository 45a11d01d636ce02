# SPDX-License-Identifier: BSD-3-Clause
"""From the status of all ranks: who waits for whom. Sends nothing, and looks at no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from syncbn.waits.processes import GONE, RUNS, UNREACHABLE
from syncbn.waits.status import DEBUGGED, Status, Wait

SURE = 0.5
"""Seconds of waiting after which a rank that has ended is missed."""
SILENT = 20.0
"""Seconds without a new status after which a rank gives no sign of life; less where the limit is short."""


def silent_after(limit: float) -> float:
    """Returns the seconds without a new status after which a rank gives no sign of life, for a limit of waits."""
    return min(SILENT, max(3.0, limit / 2))


@dataclass
class Member:
    """A rank, as the one that looks sees it."""

    rank: int
    status: Status
    state: str = "runs"
    """runs, stopped or gone, of its process; or unreachable."""
    silent: bool = False
    host: str = ""
    """The name of its host; empty if all are on one."""
    unanswered: float = 0.0
    """Seconds for which its host has been unreachable."""

    @property
    def is_unreachable(self) -> bool:
        """Whether its host does not answer."""
        return self.state == UNREACHABLE

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes from it."""
        return self.status.ended is not None or self.state == GONE

    @property
    def elsewhere(self) -> str | None:
        """Returns the call in which it waits itself: of syncbn, or of another library."""
        own = next((wait.current for wait in self.status.waits if wait.current is not None), None)
        return own or self.status.elsewhere

    @property
    def waits_itself(self) -> bool:
        """Whether it keeps the others waiting only because it waits for others."""
        runs = self.state == RUNS and not self.silent and self.status.busy is None
        return runs and self.elsewhere is not None

    def wait(self, group: int) -> Wait | None:
        """Returns what it does in a group; None before its first call there."""
        return next((each for each in self.status.waits if each.group == group), None)


@dataclass
class Blocked:
    """A call of a group in which ranks wait for others."""

    group: int
    number: int
    call: str
    waiting: list[Member]
    missing: list[Member] = field(default_factory=list)
    differ: bool = False
    """Whether all members wait, in different calls."""

    @property
    def waited(self) -> float:
        """Seconds that the first of the ranks has waited."""
        return max(self.wait_of(member).waited for member in self.waiting)

    @property
    def patience(self) -> float | None:
        """The call's own limit, if it has one."""
        found = [p for member in self.waiting if (p := self.wait_of(member).patience) is not None]
        return min(found) if found else None

    @property
    def suspects(self) -> list[Member]:
        """Those of the missing ranks that do not wait for others themselves, as far as is known."""
        return [member for member in self.missing if not member.waits_itself] or self.missing

    def wait_of(self, member: Member) -> Wait:
        """Returns the wait of a rank that is in the call."""
        wait = member.wait(self.group)
        assert wait is not None
        return wait


def blocked(members: list[Member], groups: dict[int, tuple[int, ...]], least: float = SURE) -> list[Blocked]:
    """Returns the calls in which ranks wait, the longest wait first.

    Args:
        members: every rank of the channel.
        groups: the ranks of each group, by its number.
        least: seconds of waiting that count.
    """
    found = []
    for group, ranks in groups.items():
        within = [member for member in members if member.rank in ranks]
        waits = {member.rank: member.wait(group) for member in within}
        inside = [m for m in within if (wait := waits[m.rank]) and wait.current is not None]
        inside = [m for m in inside if not m.has_ended and not m.is_unreachable]
        inside = [m for m in inside if not m.status.terminated] or inside
        if not inside:
            continue
        number = _blocked_number(within, inside, waits)
        waiting = [m for m in inside if _wait(waits, m).begun == number]
        missing = [m for m in _missing(within, number, waits) if m not in waiting]
        calls = {_wait(waits, m).current for m in waiting}
        call = str(_wait(waits, waiting[0]).current)
        one = Blocked(group, number, call, waiting, missing, not missing and len(calls) > 1)
        if one.waited >= least:
            found.append(one)
    return sorted(found, key=lambda each: -each.waited)


def _blocked_number(within: list[Member], inside: list[Member], waits: dict[int, Wait | None]) -> int:
    """Returns the first call that somebody is missing in, or all are in.

    A rank in a call that all others have completed is about to leave it, unless it is stopped: then the others wait
    for it in a later call.
    """
    numbers = sorted({_wait(waits, m).begun for m in inside})
    for number in numbers:
        in_it = [m for m in inside if _wait(waits, m).begun == number]
        if len(in_it) == len(within) or any(m not in in_it for m in _missing(within, number, waits)):
            return number
    return numbers[0]


def _missing(within: list[Member], number: int, waits: dict[int, Wait | None]) -> list[Member]:
    return [m for m in within if _done(waits[m.rank]) < number and not m.status.terminated]


def _wait(waits: dict[int, Wait | None], member: Member) -> Wait:
    wait = waits[member.rank]
    assert wait is not None
    return wait


def _done(wait: Wait | None) -> int:
    return 0 if wait is None else wait.done


def excused(one: Blocked) -> str | None:
    """Returns what the ranks that are waited for do, if it is no fault of any; else None."""
    busy = {None if member.is_unreachable else member.status.busy for member in one.suspects}
    if not busy or None in busy:
        return None
    return DEBUGGED if DEBUGGED in busy else min(map(str, busy))


def is_unlimited(reason: str | None) -> bool:
    """Whether a rank may keep the others waiting for as long as it likes."""
    return reason == DEBUGGED


def limit_of(one: Blocked, members: list[Member]) -> float:
    """Returns the seconds that a call may wait: its own limit, or the least one of any rank."""
    if one.patience is not None:
        return one.patience
    return min((member.status.limit for member in members), default=math.inf)
