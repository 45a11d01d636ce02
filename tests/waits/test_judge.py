# SPDX-License-Identifier: BSD-3-Clause
"""Who judges, when a wait is a finding, and when it is none. Time is what the test says."""

import json
import math

import pytest

from syncbn.waits import diagnosis, findings, judge, limits, processes
from syncbn.waits.channel import LOOPBACK, Channel, Hub, listen
from syncbn.waits.judge import ENDED_STATUS, LIMIT_STATUS, Judge
from syncbn.waits.processes import GONE, STOPPED
from syncbn.waits.status import COMPILES, DEBUGGED, ENDED, Reader
from tests.waits.members import GROUP, inside, outside
from tests.waits.test_status import Group

LIMIT, TICK = 30.0, limits.TICK


class Bench:
    """A judge on one rank of a group, and what the others have said."""

    def __init__(self, monkeypatch, rank, size):
        self.rank, self.size, self.ended, self.beats = rank, size, [], 0
        self.said = []
        monkeypatch.setattr(judge.report, "write", self.said.append)
        monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
        self.hub = Hub(listen(LOOPBACK), "key", size)
        self.hub.listener.close()
        process = processes.own()
        self.channel = Channel(tuple(range(size)), rank, [process] * size, self.hub, [])
        self.reader, self.group = Reader(rank), Group(GROUP, tuple(range(size)))
        self.reader.add(self.group)
        self.judge = Judge(self.channel, self.reader)

    def look(self, *members, seconds=TICK):
        """One look at these members; each has a new beat, unless it says that it is silent."""
        self.beats += 1
        for member in members:
            if not member.silent:
                member.status.beat = self.beats
            self.hub.texts[member.rank] = member.status.text()
        if not self.ended:  # the process would have ended
            self.judge.look(members[self.rank].status, seconds, lambda channel, status: self.ended.append(status))
        return self.ended

    def wait(self, seconds, *others, rank=0, **said):
        """Lets a rank wait in the same call for so long, from its beginning."""
        done = 0.0
        while done < seconds and not self.ended:
            done += TICK
            self.look(*sorted([inside(rank, done, **said), *others], key=lambda member: member.rank))
        return done

    @property
    def warnings(self):
        return [each for each in self.said if each.startswith("syncbn: after")]

    @property
    def reports(self):
        return [each for each in self.said if "All ranks end now" in each]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.delenv(limits.REPORT, raising=False)
    return lambda rank=0, size=2: Bench(monkeypatch, rank, size)


def test_at_the_limit_all_ranks_end_and_one_reports(bench):
    b = bench()
    waited = b.wait(60.0, outside(1))
    assert LIMIT <= waited <= LIMIT + 2 * TICK
    assert b.ended == [LIMIT_STATUS]
    assert len(b.reports) == 1
    assert "Rank 1 is in no call of syncbn, at train.py:12 in main" in b.reports[0].replace("\n", " ")
    assert json.loads(b.hub.verdict) == {"status": LIMIT_STATUS}


def test_a_warning_comes_once_at_a_fifth(bench):
    b = bench()
    b.wait(LIMIT / 5 - TICK, outside(1))
    assert b.said == []
    b.wait(LIMIT - TICK, outside(1))
    assert b.said == b.warnings
    assert b.warnings[0].startswith("syncbn: after 6.0 s: Rank 1 is in no call of syncbn")
    assert len(b.warnings) == 1
    b.wait(LIMIT - TICK, outside(1, 5), number=6)
    assert len(b.warnings) == 2, "another call"


@pytest.mark.parametrize("state", ["ended", GONE, "lost"])
def test_a_rank_that_has_ended_is_reported_within_two_seconds(bench, state):
    b = bench()
    if state == "lost":
        b.hub.lost.add(1)
    other = outside(1, ended=ENDED if state == "ended" else None)
    waited = b.wait(10.0, other, sees={1: GONE} if state == GONE else {})
    assert waited <= 2.0
    assert b.ended == [ENDED_STATUS]
    assert len(b.reports) == 1


def test_a_finding_is_confirmed_by_a_second_look(bench):
    """The status of a rank is up to a tick old: it may have ended, and its last call be completed."""
    b = bench()
    b.look(inside(0, 1.0), outside(1, ended=ENDED))
    b.look(inside(0, 0.0, number=6, call="forward 6"), outside(1, 5, ended=ENDED))
    b.look(outside(0, 6), outside(1, 5, ended=ENDED))
    assert (b.ended, b.said) == ([], [])


def test_different_calls_are_reported_after_some_seconds(bench):
    b = bench()
    other = inside(1, 0.0, call="forward 5 of 'bn2'")
    waited = b.wait(20.0, other)
    assert findings.STUCK <= waited <= findings.STUCK + 2 * TICK
    assert b.ended == [ENDED_STATUS]


def test_nothing_is_reported_while_all_go_on(bench):
    b = bench()
    for number in range(1, 300):
        b.look(inside(0, 0.0, number=number), outside(1, number - 1))
    assert (b.ended, b.said) == ([], [])


def test_nothing_is_reported_for_a_rank_under_a_debugger(bench):
    b = bench()
    b.wait(100 * LIMIT, outside(1, busy=DEBUGGED))
    assert (b.ended, b.reports) == ([], [])


def test_after_the_debugger_a_rank_has_its_whole_limit(bench):
    b = bench()
    b.wait(20 * LIMIT, outside(1, busy=DEBUGGED))
    for k in range(int((LIMIT - 5) / TICK)):
        b.look(inside(0, 20 * LIMIT + k * TICK), outside(1))
    assert b.ended == []
    for k in range(int(10 / TICK)):
        b.look(inside(0, 21 * LIMIT - 5 + k * TICK), outside(1))
    assert b.ended == [LIMIT_STATUS]


def test_a_rank_that_compiles_has_ten_limits(bench):
    b = bench()
    waited = b.wait(20 * LIMIT, outside(1, busy=COMPILES))
    assert 10 * LIMIT <= waited <= 10 * LIMIT + 2 * TICK
    assert b.ended == [LIMIT_STATUS]
    assert "Rank 1 is compiling, while rank 0 waits" in b.reports[0]


def test_the_time_of_compiling_does_not_count_for_what_follows(bench):
    b = bench()
    b.wait(2 * LIMIT, outside(1, busy=COMPILES))
    for k in range(int((LIMIT - 2) / TICK)):
        b.look(inside(0, 2 * LIMIT + k * TICK), outside(1))
    assert b.ended == []


def test_a_call_without_a_limit_is_warned_of_once_and_never_ends(bench):
    b = bench()
    b.wait(20 * LIMIT, outside(1), patience=math.inf)
    assert b.ended == []
    assert [each.endswith("; it waits without a limit.\n") for each in b.warnings] == [True]
    assert b.reports == []


def test_a_call_with_a_limit_of_its_own(bench):
    b = bench()
    assert 2.0 <= b.wait(20 * LIMIT, outside(1), patience=2.0) <= 2.0 + 2 * TICK
    assert b.ended == [LIMIT_STATUS]


def test_the_deputy_keeps_silent_while_rank_zero_is_well(bench):
    b = bench(rank=1, size=3)
    b.wait(2 * LIMIT, outside(0), outside(2, ended=ENDED), rank=1)
    assert (b.ended, b.said) == ([], [])


@pytest.mark.parametrize("why", ["ended", GONE, STOPPED, "lost", "silent"])
def test_the_deputy_judges_when_rank_zero_cannot(bench, why):
    b = bench(rank=1, size=3)
    sees = {0: why} if why in (GONE, STOPPED) else {}
    if why == "lost":
        b.hub.lost.add(0)
    first = outside(0, ended=ENDED if why == "ended" else None, silent=why == "silent")
    b.wait(4 * LIMIT, first, outside(2), rank=1, sees=sees)
    early = why in ("ended", GONE, "lost")
    assert b.ended == [ENDED_STATUS if early else LIMIT_STATUS]
    assert len(b.reports) == 1
    said = {
        "ended": "Rank 0 came to the end",
        GONE: "The process of rank 0 is gone",
        "lost": "The process of rank 0 is gone",
        STOPPED: "Rank 0 is stopped by a signal",
        "silent": "Rank 0 is without a sign of life",
    }[why]
    assert said in b.reports[0]


def test_a_rank_is_silent_only_after_a_while(bench):
    b = bench()
    quiet = outside(1, silent=True)
    for _ in range(int(diagnosis.silent_after(LIMIT) / TICK) - 1):
        b.look(outside(0), quiet)
    assert b.judge._members(outside(0).status, 0.0)[1].silent is False
    b.look(outside(0), quiet)
    assert b.judge._members(outside(0).status, 0.0)[1].silent is True
    b.look(outside(0), outside(1))
    assert b.judge._members(outside(0).status, 0.0)[1].silent is False


def test_a_rank_that_has_said_nothing_yet_has_just_begun(bench):
    b = bench(size=3)
    b.look(inside(0, 1.0), outside(1))
    assert b.ended == []
    members = b.judge._members(inside(0, 1.0).status, TICK)
    assert (members[2].rank, members[2].has_ended, members[2].status.waits) == (2, False, [])


def test_when_the_launcher_ends_this_rank_it_reports_at_once(bench):
    b = bench()
    for waited in (0.1, 0.2, 0.3):  # the others are heard once more
        b.look(inside(0, waited, terminated=True), outside(1, ended="ended with KeyError: 3"), seconds=0.1)
    assert b.ended == [ENDED_STATUS]
    assert "Rank 1 ended with KeyError: 3" in b.reports[0]


def test_the_report_is_written_as_json_too(bench, monkeypatch, tmp_path):
    b = bench()
    monkeypatch.setenv(limits.REPORT, str(tmp_path / "report.json"))
    b.wait(10.0, outside(1, ended=ENDED))
    said = json.loads((tmp_path / "report.json").read_text())
    assert (said["kind"], said["missing"], said["status"]) == ("ended", [1], ENDED_STATUS)


def test_a_report_that_cannot_be_written_is_a_line_and_the_job_ends(bench, monkeypatch, tmp_path):
    b = bench()
    monkeypatch.setenv(limits.REPORT, str(tmp_path / "no" / "report.json"))
    b.wait(10.0, outside(1, ended=ENDED))
    assert b.ended == [ENDED_STATUS]
    assert [each for each in b.said if each.startswith("syncbn: the report could not be written to ")]


def test_a_group_of_others_is_judged_by_those_that_have_used_it(bench):
    """Rank 0 is not in the group of ranks 1 and 2."""
    b = bench(size=3)
    for k in range(8):
        b.look(outside(0), inside(1, k * TICK, group=9), outside(2, 4, group=9, ended=ENDED))
    assert b.ended == [ENDED_STATUS]
    assert "Rank 2 came to the end of the program" in b.reports[0]


def test_a_group_that_the_channel_does_not_cover_is_left_to_another_one(bench):
    b = bench()
    wide = Group(9, (0, 1, 2))
    b.reader.add(wide)
    for k in range(8):
        b.look(inside(0, k * TICK, group=9), outside(1, 4, group=9, ended=ENDED))
    assert b.ended == []


def test_a_host_that_does_not_answer_ends_the_job_at_the_limit(bench):
    b = several_hosts(bench(size=3))
    b.unanswered.update({2: 4.0})
    waited = b.wait(60.0, inside(1, 0.0), inside(2, 0.0))
    assert LIMIT <= waited <= LIMIT + 2 * TICK
    assert b.ended == [LIMIT_STATUS]
    told = b.reports[0].replace("\n", " ")
    assert "Host h2 of rank 2 has not answered for 4.0 s, while ranks 0, 1 on h1 wait in" in told
    assert "2  h2    its host does not answer" in told


def test_a_host_that_does_not_answer_for_the_limit_ends_a_job_that_waits_in_another_library(bench):
    b = several_hosts(bench(size=3))
    b.unanswered.update({2: LIMIT - 1.0})
    assert b.look(outside(0), outside(1), outside(2)) == []
    b.unanswered.update({2: LIMIT})
    assert b.look(outside(0), outside(1), outside(2)) == [LIMIT_STATUS]
    assert "syncbn: Host h2 of rank 2 has not answered for 30 s.\n" in b.reports[0]


def test_a_rank_of_another_host_looks_if_the_host_of_rank_0_does_not_answer(bench):
    b = several_hosts(bench(rank=2, size=3))
    assert b.channel.servers == (0, 2)
    b.wait(60.0, outside(0), outside(1), rank=2)
    assert b.ended == [], "rank 0 looks"
    b.unanswered.update({0: 4.0, 1: 4.0})
    b.wait(60.0, outside(0), outside(1), rank=2)
    assert b.ended == [LIMIT_STATUS]
    assert "Host h1 of ranks 0, 1 has not answered for 4.0 s" in b.reports[0].replace("\n", " ")


def several_hosts(b):
    """Ranks 0 and 1 on h1, the rest on h2."""
    own, b.unanswered = processes.own(), {}
    far = own._replace(host=own.host ^ 1)
    members = [own if rank < 2 else far for rank in range(b.size)]
    b.channel = Channel(b.channel.ranks, b.rank, members, b.hub, [], ["h1", "h1", *["h2"] * (b.size - 2)])
    b.hub.unanswered = lambda: b.unanswered
    b.judge = Judge(b.channel, b.reader)
    return b
