# SPDX-License-Identifier: BSD-3-Clause
"""Looks at the status of all ranks, warns, reports, and says when the job ends. On a rank that has a hub."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from typing import final

from syncbn.waits import diagnosis, findings, limits, processes, report
from syncbn.waits.channel import Channel, Hub
from syncbn.waits.diagnosis import Member
from syncbn.waits.findings import Finding
from syncbn.waits.status import Reader, Status

LIMIT_STATUS, ENDED_STATUS = 124, 1
"""The exit status of all ranks at the limit (as that of timeout(1)), and where a rank has ended."""
CONFIRMED = 0.9 * limits.TICK
"""Seconds for which the same must be found: the status of a rank may be that old."""
HURRIED = 0.15
"""The same after SIGTERM, which makes every rank tell its status at once."""


@final
class Judge:
    """Judges the waits of a channel.

    Args:
        channel: with a hub of this process.
        reader: knows the groups of this process.
    """

    def __init__(self, channel: Channel, reader: Reader) -> None:
        assert channel.hub is not None
        self._channel, self._reader = channel, reader
        self._hub: Hub = channel.hub
        self._silence: dict[int, tuple[int, float]] = {}
        self._warned: set[tuple[int, int]] = set()
        self._excused: dict[tuple[int, int], float] = {}
        self._debugged: dict[tuple[int, int], float] = {}
        self._found: dict[tuple[int, int], float] = {}

    def look(self, own: Status, seconds: float, end: Callable[[Channel, int], None]) -> None:
        """Looks at the last status of all ranks.

        Args:
            own: the status of this rank.
            seconds: since the last look.
            end: is called with the channel and the exit status if the job must end.
        """
        members = self._members(own, seconds)
        servers = self._channel.servers
        looks = _who_looks([members[server] for server in servers])
        if looks < 0 or servers[looks] != self._channel.rank:
            return
        least = 0.0 if own.terminated else diagnosis.SURE
        found: dict[tuple[int, int], float] = {}
        for one in diagnosis.blocked(members, self._groups(members), least):
            limit, key = diagnosis.limit_of(one, members), (one.group, one.number)
            reason = diagnosis.excused(one)
            unlimited = diagnosis.is_unlimited(reason)
            if reason is not None:
                self._excused[key] = self._excused.get(key, 0.0) + seconds
            if unlimited:
                self._debugged[key] = self._debugged.get(key, 0.0) + seconds
            waited = one.waited - self._excused.get(key, 0.0)
            most = limits.BUSY_FACTOR * limit + self._debugged.get(key, 0.0)
            finding = findings.early(one)
            if finding is None and not unlimited and (waited >= limit or one.waited >= most):
                finding = findings.late(one)
            if finding is not None:
                found[key] = self._found[key] + seconds if key in self._found else 0.0
                if found[key] >= (HURRIED if own.terminated else CONFIRMED):
                    self._report(finding, members, end)
            if key not in self._warned and waited >= _warns_at(limit, own):
                self._warned.add(key)
                report.write(report.warning(findings.late(one), limit))
        lost = findings.of_lost_hosts(members)
        if lost is not None and not found:
            self._report(lost, members, end)
        self._found = found

    def _members(self, own: Status, seconds: float) -> list[Member]:
        """Returns all ranks. One that has said nothing yet has just begun."""
        ranks, texts = self._channel.ranks, self._hub.texts
        all_of_them = [Status.of_text(texts[i]) if i in texts else Status(rank) for i, rank in enumerate(ranks)]
        all_of_them[self._channel.rank] = own
        sees = {rank: state for status in all_of_them for rank, state in status.sees.items()}
        unanswered = self._hub.unanswered()
        members = []
        for i, status in enumerate(all_of_them):
            beat, silence = self._silence.get(i, (0, 0.0))
            silence = silence + seconds if beat == status.beat else 0.0
            self._silence[i] = status.beat, silence
            state = processes.GONE if i in self._hub.lost else sees.get(status.rank, processes.RUNS)
            if i in unanswered and state != processes.GONE:
                state = processes.UNREACHABLE
            silent = silence >= diagnosis.silent_after(own.limit)
            host = self._channel.host(i)
            members.append(Member(status.rank, status, state, silent, host, unanswered.get(i, 0.0)))
        return members

    def _groups(self, members: list[Member]) -> dict[int, tuple[int, ...]]:
        """Returns the ranks of every group. Of one that this rank is not in, those that have begun a call there."""
        used: dict[int, list[int]] = {}
        for member in members:
            for wait in member.status.waits:
                used.setdefault(wait.group, []).append(member.rank)
        known = {g.group_id: g.ranks for g in self._reader.groups()}
        return {group: known.get(group, tuple(ranks)) for group, ranks in used.items() if self._covers(known, group)}

    def _covers(self, known: dict[int, tuple[int, ...]], group: int) -> bool:
        return group not in known or self._channel.covers(known[group])

    def _report(self, finding: Finding, members: list[Member], end: Callable[[Channel, int], None]) -> None:
        status = LIMIT_STATUS if finding.kind == "limit" else ENDED_STATUS
        report.write(report.text(finding, members, status))
        path = os.environ.get(limits.REPORT)
        if path:
            report.write(report.write_json(path, report.as_json(finding, members, status)))
        self._hub.say_verdict(json.dumps({"status": status}))
        time.sleep(0.2)  # the others hear of it before the launcher ends them
        if any(member.is_unreachable for member in members):
            processes.end_daemon()
        end(self._channel, status)


def _who_looks(servers: list[Member]) -> int:
    """Returns the first one that goes on, else the first one that still runs, although its program has ended."""
    running = [i for i, member in enumerate(servers) if member.state == processes.RUNS and not member.silent]
    return next((i for i in running if servers[i].status.ended is None), running[0] if running else -1)


def _warns_at(limit: float, own: Status) -> float:
    return limits.WARNS_AT * (own.limit if math.isinf(limit) else limit)
