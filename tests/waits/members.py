# SPDX-License-Identifier: BSD-3-Clause
"""Statuses made by hand."""

from syncbn.waits import diagnosis
from syncbn.waits.diagnosis import SURE, Member
from syncbn.waits.status import Status, Wait

GROUP = 7
CALL = "forward 5 of 'bn1'"
BEFORE = "backward 4 of 'bn1'"
AT = ("train.py", 12, "main")


def inside(rank, waited=1.0, *, call=CALL, number=5, patience=None, group=GROUP, **said):
    """A rank in a call."""
    waits = [Wait(group, number, call, BEFORE, waited, patience)]
    return Member(rank, Status(rank, limit=30.0, waits=waits, line=AT, **said))


def outside(rank, done=4, *, state="runs", silent=False, group=GROUP, completed=BEFORE, **said):
    """A rank that is in no call; done=None before its first one."""
    waits = [] if done is None else [Wait(group, done, None, completed)]
    return Member(rank, Status(rank, limit=30.0, waits=waits, line=AT, **said), state, silent)


def groups(size, **more):
    return {GROUP: tuple(range(size)), **more}


def only(members, ranks=None, least=SURE):
    """The one call in which members wait."""
    (one,) = diagnosis.blocked(members, ranks or groups(len(members)), least)
    return one


def numbers(members):
    return [member.rank for member in members]
