# SPDX-License-Identifier: BSD-3-Clause
"""What a call in which ranks wait means: whose fault it is, in a sentence, and what to do."""

from __future__ import annotations

from typing import NamedTuple

from syncbn.waits import limits, ranks
from syncbn.waits.diagnosis import Blocked, Member
from syncbn.waits.processes import STOPPED
from syncbn.waits.status import ENDED, is_cut_off

STUCK = 2.0
"""Seconds after which ranks in different calls of a group wait for each other."""


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


def early(one: Blocked) -> Finding | None:
    """Returns a finding that no further waiting can change, or None."""
    ended = [member for member in one.missing if member.has_ended]
    if ended:
        return _finding("ended", one, *_of_ended(one, ended))
    failed = any((own := m.wait(one.group)) and own.failed and own.begun == one.number for m in one.missing)
    stuck = max((own.waited for m in one.waiting if (own := one.wait_of(m)).failed is None), default=0.0)
    if (one.differ or failed) and stuck >= STUCK:
        return _finding("order", one, *_of_order(one))
    return None


def late(one: Blocked) -> Finding:
    """Returns what is known at the limit."""
    return _finding("limit", one, *_at_limit(one))


def of_lost_hosts(members: list[Member]) -> Finding | None:
    """Returns a finding if a host has not answered for the limit: ranks may wait for it in calls of other libraries."""
    lost = [member for member in members if member.is_unreachable]
    if not lost or max(m.unanswered for m in lost) < min(m.status.limit for m in members):
        return None
    waited = max(member.unanswered for member in lost)
    sentence, remedy = f"{_unreachable(lost)}.", _LOST_REMEDY
    return Finding("limit", "", [], [member.rank for member in lost], waited, sentence, remedy)


_LOST_REMEDY = (
    "That host is down or cut off from the network: look at its console and its cable. What still runs there of the "
    "job ends at the limit too."
)


def _unreachable(lost: list[Member]) -> str:
    """Says which hosts do not answer."""
    hosts = list(dict.fromkeys(member.host for member in lost))
    seconds = limits.spoken(max(member.unanswered for member in lost))
    if len(hosts) == 1:
        return f"Host {hosts[0]} of {_ranks(lost)} has not answered for {seconds}"
    each = [f"{host} of {_ranks([m for m in lost if m.host == host])}" for host in hosts[:10]]
    return f"Hosts {', '.join(each)}{', ...' if len(hosts) > 10 else ''} have not answered for {seconds}"


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
    gone = "processes of {} are" if len(ended) > 1 else "process of {} is"
    return (
        f"the {gone.format(_by_host(ended))} gone, {waits}",
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
    waits, suspects = _while_others_wait(one), one.suspects
    first = suspects[0]
    some = [member for member in suspects if member.is_unreachable]
    if some:
        return f"{_unreachable(some)}, {waits}", _LOST_REMEDY
    some = [member for member in suspects if member.state == STOPPED]
    if some:
        return f"{_are(some)} stopped by a signal, {waits}", "Continue with kill -CONT, or look for who stopped it."
    some = [member for member in suspects if member.silent]
    if some:
        return (
            f"{_are(some)} without a sign of life, {waits}",
            "Its host answers, but the process is stopped by a signal, or so busy that no thread of it runs. Continue "
            "it there with kill -CONT, or end it with kill -9."
            if some[0].host
            else "Its host is down, cut off, or so busy that no thread of the process runs.",
        )
    if first.waits_itself:
        return _of_waiting(one, first)
    some = [member for member in suspects if member.status.evaluates]
    if some:
        return f"{_are(some)} in eval mode, or froze layers ({_layers(some[0])}), {waits}", _EVAL_REMEDY
    busy = first.status.busy
    if busy is not None:
        some = [member for member in suspects if member.status.busy == busy]
        return (
            f"{_are(some)} {busy.removeprefix('is ')}, {waits}",
            f"If it needs that long, raise the limit: {limits.TIMEOUT}=3600, or syncbn.init(timeout=3600).",
        )
    lines = {member.status.line for member in suspects}
    line = lines.pop() if len(lines) == 1 else None
    at = "" if line is None else f", at {place(line)}"
    return (
        f"{_are(suspects)} in no call of syncbn{at}, {waits}",
        "It sleeps, waits for something else (data, a lock, another library's collective), left this call out, or "
        f"needs longer than the limit. If it may, raise that by {limits.TIMEOUT} or syncbn.init(timeout=...).",
    )


def _of_waiting(one: Blocked, first: Member) -> tuple[str, str]:
    """Returns what it means if all missing ranks wait for others, the first of them in the call that is named."""
    who, waits, own = _are(one.suspects), _while_others_wait(one), first.wait(one.group)
    if own is not None and own.current is not None:
        return (
            f"{who} in {own.current}, behind by {one.number - own.begun}, {waits}",
            "Find out what that call waits for.",
        )
    if any(wait.current is not None for wait in first.status.waits):
        return (
            f"{who} in {first.elsewhere} of another group, {waits}",
            "Ranks use their groups in different orders. Use them in one order on every rank.",
        )
    return (
        f"{who} in {first.elsewhere}, {waits}",
        "That waits for other ranks, too. Ranks use it and syncbn in different orders: look for code that depends on "
        "the rank, such as a backward pass that one of them leaves out.",
    )


def _are(members: list[Member]) -> str:
    return f"{named(members)} {'are' if len(members) > 1 else 'is'}"


def place(line: tuple[str, int, str]) -> str:
    """Returns a line of code as ``file:line in function``."""
    file, number, function = line
    return f"{file}:{number} in {function}"


def named(members: list[Member]) -> str:
    """Returns ``rank 1`` or ``ranks 0, 2-63``, and ``on h2`` if there are several hosts and all of these are on one."""
    hosts = {member.host for member in members}
    return _ranks(members) + (f" on {hosts.pop()}" if len(hosts) == 1 and "" not in hosts else "")


def _by_host(members: list[Member]) -> str:
    """Returns ``rank 1 on h1 and ranks 2, 3 on h2``; the ranks alone if there is one host, or if there are many."""
    hosts = list(dict.fromkeys(member.host for member in members))
    if len(hosts) > 3:
        return named(members)
    return " and ".join(named([member for member in members if member.host == host]) for host in hosts)


def _ranks(members: list[Member]) -> str:
    return ranks.named([member.rank for member in members])


def by_call(pairs: list[tuple[str, int]]) -> str:
    """Returns ``forward of 'a' on rank 0 and forward of 'b' on ranks 1, 2``."""
    calls: dict[str, list[int]] = {}
    for call, rank in pairs:
        calls.setdefault(call, []).append(rank)
    return " and ".join(f"{call} on {ranks.named(who)}" for call, who in calls.items())
