# SPDX-License-Identifier: BSD-3-Clause
"""From the status of all ranks: who waits for whom, and what that means. Sends nothing, and looks at no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from syncbn.waits import limits
from syncbn.waits.processes import GONE, RUNS, STOPPED
from syncbn.waits.status import DEBUGGED, ENDED, Status, Wait, is_cut_off

SURE = 0.5
"""Seconds of waiting after which a rank that has ended is missed."""
STUCK = 2.0
"""Seconds after which ranks in different calls of a group wait for each other."""
SILENT = 20.0
"""Seconds without a new status after which a rank gives no sign of life."""


@dataclass
class Member:
    """A rank, as the one that looks sees it."""

    rank: int
    status: Status
    state: str = "runs"
    """runs, stopped or gone, of its process."""
    silent: bool = False

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes from it."""
        return self.status.ended is not None or self.state == GONE

    def wait(self, group: int) -> Wait | None:
        """Returns what it does in a group; None before its first call there."""
        return next((each for each in self.status.waits if each.group == group), None)


class Finding(NamedTuple):
    """Why ranks wait."""

    kind: str
    """ended, order, limit."""
    call: str
    """The call in which ranks wait."""
    waiting: list[int]
    missing: list[int]
    waited: float
    sentence: str
    remedy: str


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
        return [m for m in self.missing if m.status.elsewhere is None or m.state != RUNS or m.silent] or self.missing

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
        inside = [m for m in within if (wait := waits[m.rank]) and wait.current is not None and not m.has_ended]
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
    """Returns the first call that somebody is missing in, or that all are in.

    A rank in a call that all others have completed is about to leave it, or stopped: they wait for it in a later one.
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


def early(one: Blocked) -> Finding | None:
    """Returns a finding that no further waiting can change, or None."""
    ended = [member for member in one.missing if member.has_ended]
    if ended:
        return _finding("ended", one, *_of_ended(one, ended))
    failed = any((own := m.wait(one.group)) and own.failed and own.begun == one.number for m in one.missing)
    if (one.differ or failed) and one.waited >= STUCK:
        return _finding("order", one, *_of_order(one))
    return None


def late(one: Blocked) -> Finding:
    """Returns what is known at the limit."""
    return _finding("limit", one, *_at_limit(one))


def excused(one: Blocked) -> str | None:
    """Returns what all ranks that are waited for do, if it is no fault; else None."""
    busy = {member.status.busy for member in one.suspects}
    return busy.pop() if len(busy) == 1 else None


def is_unlimited(reason: str | None) -> bool:
    """Whether a rank may keep the others waiting for as long as it likes."""
    return reason == DEBUGGED


def _finding(kind: str, one: Blocked, sentence: str, remedy: str) -> Finding:
    waiting, missing = ([member.rank for member in some] for some in (one.waiting, one.missing))
    sentence = f"{sentence[0].upper()}{sentence[1:]}."
    return Finding(kind, one.call, waiting, missing, one.waited, sentence, remedy)


def _while_others_wait(one: Blocked) -> str:
    verb = "wait" if len(one.waiting) > 1 else "waits"
    calls = [(str(one.wait_of(member).current), member.rank) for member in one.waiting]
    if len({call for call, _ in calls}) > 1:
        return f"while {named(one.waiting)} {verb} in different calls: {by_call(calls)}"
    return f"while {named(one.waiting)} {verb} in {one.call}"


def _of_ended(one: Blocked, ended: list[Member]) -> tuple[str, str]:
    ended = [member for member in ended if not is_cut_off(member.status.ended)] or ended
    raised = [member for member in ended if member.status.ended not in (None, ENDED)]
    ended = raised or [member for member in ended if member.status.ended] or ended
    who, waits, own = named(ended), _while_others_wait(one), ended[0].wait(one.group)
    after = "" if own is None or own.completed is None else f" after {own.completed}"
    if own is not None and own.failed is not None:
        after = f", which it got in {own.failed}"
    if raised:
        return (
            f"{who} {ended[0].status.ended}{after}, {waits}",
            "Mend that error: the others only wait. World.raise_together(error) ends a step on all ranks alike.",
        )
    if ended[0].status.ended:
        return (
            f"{who} came to the end of the program{after}, {waits}",
            "Give every rank the same number of steps, or put the loop in `with syncbn.join(model, optimizer):`. If a "
            "condition ended the loop, let all ranks decide alike, for example by World.average.",
        )
    return (
        f"the process of {who} is gone, {waits}",
        "It was killed (kill -9, or the system for want of memory: see dmesg), crashed, or called os._exit. The "
        'launcher knows its exit status. If gloo has printed "op.preamble.length", it was in another call than the '
        "others: look for code that depends on the rank or on its data.",
    )


def _of_order(one: Blocked) -> tuple[str, str]:
    received = by_call([(str(one.wait_of(member).current), member.rank) for member in one.waiting])
    errors = [(f"an error in {own.failed}", m.rank) for m in one.missing if (own := m.wait(one.group)) and own.failed]
    other, what = (f", and {by_call(errors)}", "are") if errors else ("", "wait for each other")
    remedy = (
        "Ranks took different branches, ran backward passes in another order, or one of them left a call out. Look for "
        "code that depends on the rank or on its data."
    )
    members = [*one.waiting, *one.missing]
    evaluate = [m for m in members if m.status.evaluates]
    if 0 < len(evaluate) < len(members):
        verb = "are" if len(evaluate) > 1 else "is"
        other += f"; {named(evaluate)} {verb} in eval mode, or froze layers ({_layers(evaluate[0])})"
        remedy = _EVAL_REMEDY
    return f"ranks {what} in different calls: {received}{other}", remedy


_EVAL_REMEDY = "A layer in eval mode sends nothing. Call train(), eval(), freeze and unfreeze on all ranks alike."


def _layers(member: Member) -> str:
    names = member.status.evaluates
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _at_limit(one: Blocked) -> tuple[str, str]:
    if not one.missing:
        return (
            f"all ranks are in {one.call}, and it does not end",
            "The library below, or the network, has lost a message. Run `syncbn doctor` on the same hosts.",
        )
    suspects = one.suspects
    first, several = suspects[0], len(suspects) > 1
    who, waits = f"{named(suspects)} {'are' if several else 'is'}", _while_others_wait(one)
    if first.state == STOPPED:
        return f"{who} stopped by a signal, {waits}", "Continue it with kill -CONT, or look for who stopped it."
    if first.silent:
        return (
            f"{who} without a sign of life, {waits}",
            "Its host is down, cut off, or so busy that no thread of the process runs.",
        )
    found = _in_another_wait(one, first, who, waits)
    if found is not None:
        return found
    if first.status.evaluates:
        return f"{who} in eval mode, or froze layers ({_layers(first)}), {waits}", _EVAL_REMEDY
    if first.status.busy is not None:
        return (
            f"{named(suspects)} {first.status.busy}, {waits}",
            f"If it needs that long, raise the limit: {limits.TIMEOUT}=3600, or syncbn.init(timeout=3600).",
        )
    at = "" if first.status.line is None else f", at {place(first.status.line)}"
    return (
        f"{who} in no call of syncbn{at}, {waits}",
        "It sleeps, waits for something else (data, a lock, another library's collective), left this call out, or "
        f"needs longer than the limit. If it may, raise that by {limits.TIMEOUT} or syncbn.init(timeout=...).",
    )


def _in_another_wait(one: Blocked, first: Member, who: str, waits: str) -> tuple[str, str] | None:
    elsewhere = next((w for w in first.status.waits if w.current is not None and w.group != one.group), None)
    if elsewhere is not None:
        return (
            f"{who} in {elsewhere.current} of another group, {waits}",
            "Ranks use their groups in different orders. Use them in one order on every rank.",
        )
    if first.status.elsewhere is not None:
        return (
            f"{who} in {first.status.elsewhere}, {waits}",
            "That waits for other ranks, too. Ranks use it and syncbn in different orders: look for code that depends "
            "on the rank, such as a backward pass that one of them leaves out.",
        )
    own = first.wait(one.group)
    if own is not None and own.current is not None:
        return (
            f"{who} in {own.current}, {one.number - own.begun} calls behind, {waits}",
            "Find out what that call waits for.",
        )
    return None


def place(line: tuple[str, int, str]) -> str:
    """Returns a line of code as ``file:line in function``."""
    file, number, function = line
    return f"{file}:{number} in {function}"


def named(members: list[Member]) -> str:
    """Returns ``rank 1`` or ``ranks 0, 2-63``."""
    return f"rank{'s' if len(members) > 1 else ''} {ranks_of([member.rank for member in members])}"


def ranks_of(ranks: list[int]) -> str:
    """Returns ``0, 2-63``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(", ".join(map(str, run)) if len(run) < 3 else f"{run[0]}-{run[-1]}" for run in runs)


def by_call(pairs: list[tuple[str, int]]) -> str:
    """Returns ``forward of 'a' on rank 0 and forward of 'b' on ranks 1, 2``."""
    calls: dict[str, list[int]] = {}
    for call, rank in pairs:
        calls.setdefault(call, []).append(rank)
    return " and ".join(
        f"{call} on rank{'s' if len(ranks) > 1 else ''} {ranks_of(ranks)}" for call, ranks in calls.items()
    )


def limit_of(one: Blocked, members: list[Member]) -> float:
    """Returns the seconds that a call may wait: its own limit, or the least one of any rank."""
    if one.patience is not None:
        return one.patience
    return min((member.status.limit for member in members), default=math.inf)
