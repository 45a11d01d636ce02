# SPDX-License-Identifier: BSD-3-Clause
"""The report of a wait: a table with a row a rank, what it means and what to do; and the same as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
from pathlib import Path
from typing import Any

from syncbn.waits.diagnosis import Member
from syncbn.waits.findings import Finding, place
from syncbn.waits.limits import spoken
from syncbn.waits.processes import GONE, RUNS, STOPPED
from syncbn.waits.ranks import ranks_of
from syncbn.waits.status import Wait

ROWS = 16
"""Up to so many ranks each have a row of their own; beyond, ranks with equal rows share one."""
_PAGE = 'See "It hangs" in the documentation (docs/clusters/hangs.md).'
_COLUMNS = ("rank", "host", "is in", "for", "last completed", "at")


def text(finding: Finding, members: list[Member], status: int) -> str:
    """Returns the report for people.

    Args:
        finding: why ranks wait.
        members: every rank.
        status: with which the job ends.
    """
    if finding.kind == "ended" and "KeyboardInterrupt" in finding.sentence:
        return f"\nsyncbn: {finding.sentence}\n"  # Ctrl-C: nothing is to be found
    rows = [_COLUMNS, *_merged(members)]
    if not any(member.host for member in members):
        rows = [(row[0], *row[2:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if i == 0 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    table = "\n".join(line.rstrip() for line in lines)
    return (
        f"\n{_wrapped(f'syncbn: {finding.sentence}')}\n\n{table}\n\n{_wrapped(finding.remedy)}\n"
        f"All ranks end now, with status {status}. {_PAGE}\n"
    )


def write(text: str) -> None:
    """Writes to stderr, past Python: the main thread may hold Python's stream. A stderr that is closed gets nothing."""
    data = text.encode(errors="replace")
    with contextlib.suppress(OSError):  # the launcher that read it is gone
        while data:
            data = data[os.write(2, data) :]


def warning(finding: Finding, limit: float) -> str:
    """Returns one line about a wait that has come to a part of its limit."""
    after = f"the job ends after {spoken(limit)}" if limit < float("inf") else "it waits without a limit"
    return f"syncbn: after {spoken(finding.waited)}: {finding.sentence[:-1]}; {after}.\n"


def as_json(finding: Finding, members: list[Member], status: int) -> str:
    """Returns the report for programs."""
    found: dict[str, Any] = {**finding._asdict(), "status": status, "ranks": [_entry(member) for member in members]}
    return json.dumps(found, indent=2) + "\n"


def write_json(path: str, content: str) -> str:
    """Writes a report. Returns what went wrong, or an empty string."""
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        return f"syncbn: the report could not be written to {path}: {error}\n"
    return ""


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False))


def _entry(member: Member) -> dict[str, Any]:
    status, line = member.status, member.status.line
    waits = sorted(status.waits, key=lambda wait: (wait.current is None, -wait.begun))  # what it is in comes first
    names = ("group", "begun", "current", "completed", "failed")
    calls = [{**{name: getattr(wait, name) for name in names}, "waited": round(wait.waited, 1)} for wait in waits]
    return {
        "rank": member.rank,
        "host": member.host,
        "process": member.state,
        "silent": member.silent,
        "ended": status.ended,
        "busy": status.busy,
        "elsewhere": status.elsewhere,
        "evaluates": status.evaluates,
        "line": None if line is None else {"file": line[0], "line": line[1], "function": line[2]},
        "calls": calls,
    }


def _row(member: Member) -> tuple[str, ...]:
    status = member.status
    current = _current(member)
    inside = current is not None and current.current is not None
    if status.ended is not None:
        state = f"has {textwrap.shorten(status.ended, 60, placeholder=' ...')}"
    elif member.state == GONE:
        state = "its process is gone"
    elif member.state == STOPPED:
        state = "stopped by a signal"
    elif member.is_unreachable:
        state = "its host does not answer"
    elif member.silent:
        state = "gives no sign of life"
    elif inside and current is not None:
        state = str(current.current)
    else:
        state = "not in a call"
        if status.busy or status.elsewhere:
            state += f": {status.busy or f'in {status.elsewhere}'}"
        elif status.evaluates:
            state += ": layers in eval mode"
    lost = member.has_ended or member.is_unreachable
    waited = spoken(current.waited) if inside and current is not None and not lost else ""
    completed = (current.completed if current is not None else None) or "nothing"
    line = "" if status.line is None or status.ended is not None else place(status.line)
    if (member.state != RUNS and status.ended is None) or member.silent:  # its last words may be half a second old
        line, completed = line and f"last heard of at {line}", f"{completed}, or later"
    return str(member.rank), member.host, state, waited, completed, line


def _current(member: Member) -> Wait | None:
    """Returns the call in which a rank has waited longest, else what it did last."""
    return max(member.status.waits, key=lambda w: (w.current is not None, w.waited, w.begun), default=None)


def _merged(members: list[Member]) -> list[tuple[str, ...]]:
    """Returns the rows. Of many ranks, those with equal rows share that of the one that has waited longest."""
    if len(members) <= ROWS:
        return [_row(member) for member in members]
    alike: dict[tuple[str, ...], list[Member]] = {}
    for member in members:
        _, host, state, _, completed, line = _row(member)
        alike.setdefault((host, state, completed, line), []).append(member)
    longest = [max(some, key=lambda m: 0.0 if (w := _current(m)) is None else w.waited) for some in alike.values()]
    ranks = [ranks_of([member.rank for member in some]) for some in alike.values()]
    return [(who, *_row(member)[1:]) for who, member in zip(ranks, longest, strict=True)]
