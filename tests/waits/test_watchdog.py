# SPDX-License-Identifier: BSD-3-Clause
"""The thread, as far as one process can see it."""

import os
import time

import pytest

from syncbn.waits import limits, processes, watchdog
from syncbn.waits.channel import Channel
from syncbn.waits.judge import ENDED_STATUS, LIMIT_STATUS
from syncbn.waits.processes import GONE, RUNS, STOPPED
from syncbn.waits.watchdog import GRACE, Watchdog
from tests.waits.test_status import Group

LIMIT = 5.0


class Ended(BaseException):
    """Instead of the end of this process."""


@pytest.fixture
def said(monkeypatch):
    found = []
    monkeypatch.setattr(watchdog.report, "write", found.append)
    return found


@pytest.fixture
def dog(monkeypatch, said):
    def exit_now(status):
        raise Ended(status)

    monkeypatch.setattr(watchdog, "exit_now", exit_now)
    monkeypatch.setattr(limits, "_given", [LIMIT])
    made = Watchdog(3, "openmpi")
    made.group = Group(7, (3, 4))
    made.reader.add(made.group)
    return made


class Far:
    """A link to a hub that answers as the test says."""

    def __init__(self):
        self.is_heard, self.is_sent, self.verdict, self.posted = True, True, "", []
        self.is_dead, self.unanswered = False, 0.0

    def count(self, seconds):
        pass

    def post(self, text):
        self.posted.append(text)


def with_link(dog, *others):
    own = processes.own()
    link = Far()
    channel = Channel(tuple(range(1 + len(others))), len(others), [*others, own], None, [link])
    channel.register = lambda selector: None
    dog.channels = [channel]
    return link


def look_for(dog, seconds):
    for _ in range(round(seconds / limits.TICK)):
        dog._look(limits.TICK)


def test_a_rank_that_reaches_nobody_ends_by_itself_a_little_after_its_limit(dog, said):
    with_link(dog).is_heard = False
    dog.group.enter("World.average")
    look_for(dog, LIMIT + GRACE)
    assert said == []
    with pytest.raises(Ended) as ended:
        dog._look(limits.TICK)
    assert ended.value.args == (LIMIT_STATUS,)
    assert len(said) == 1
    assert said[0].startswith("syncbn: rank 3 has waited for 8.0 s in ")
    assert "World.average" in said[0]
    assert "no rank that could say for whom answers. It ends with status 124." in said[0]


def dead(dog, *ranks):
    """All hubs are served by these ranks, which have died; the group of the test's calls has others and this one."""
    link = with_link(dog, *[processes.own()] * len(ranks))
    dog.channels[0].ranks = (*ranks, 3)
    link.is_heard, link.is_dead = False, True
    return link


def test_a_rank_that_waits_for_dead_ranks_that_could_report_ends_soon(dog, said):
    dead(dog, 2, 4)
    dog.group.enter("World.average")
    look_for(dog, watchdog.ORPHANED - limits.TICK)
    assert said == []
    with pytest.raises(Ended) as ended:
        look_for(dog, 2 * limits.TICK)
    assert ended.value.args == (ENDED_STATUS,)
    assert said[0].startswith("syncbn: rank 3 has waited for 1.5 s in ")
    assert said[0].endswith(
        "and the process of rank 4 is gone, with all ranks that could report. It ends with status 1.\n"
    )


def test_dead_ranks_that_nobody_waits_for_end_nothing(dog, said):
    dead(dog, 1, 2)
    dog.group.enter("World.average")
    look_for(dog, LIMIT + GRACE)
    assert said == []


def test_a_group_that_is_given_up_while_it_is_looked_at_does_not_end_the_thread(dog, said):
    dead(dog, 2, 4)
    dog.group.enter("World.average")
    own = dog.reader.read(limits.TICK, LIMIT)
    dog.reader.groups = list
    dog._look_alone(own)
    assert said == []


def test_a_rank_that_has_said_goodbye_is_not_dead(dog, said):
    dead(dog, 1, 4).is_dead = False
    dog.group.enter("World.average")
    look_for(dog, LIMIT + GRACE)
    assert said == []


def test_a_rank_that_reaches_a_judge_leaves_it_the_verdict(dog, said):
    link = with_link(dog)
    dog.group.enter("World.average")
    look_for(dog, 4 * LIMIT)
    assert said == []
    link.is_heard = False
    with pytest.raises(Ended):
        dog._look(limits.TICK)


def test_a_rank_alone_waits_as_long_as_its_call_may(dog, said):
    with_link(dog).is_heard = False
    dog.group.enter("World.barrier", patience=4 * LIMIT)
    look_for(dog, 4 * LIMIT + GRACE)
    assert said == []
    with pytest.raises(Ended):
        dog._look(limits.TICK)


def test_a_rank_alone_that_is_in_no_call_goes_on(dog, said):
    with_link(dog).is_heard = False
    look_for(dog, 10 * LIMIT)
    assert said == []


def test_a_verdict_ends_this_process(dog, said):
    link = with_link(dog)
    dog._look(limits.TICK)
    link.verdict = '{"status": 77}'
    with pytest.raises(Ended) as ended:
        dog._look(limits.TICK)
    assert ended.value.args == (77,)
    assert said == []


def test_with_the_verdict_stopped_ranks_of_this_host_are_killed(dog, monkeypatch):
    killed = []
    monkeypatch.setattr(processes, "kill_stopped", killed.append)
    own = processes.own()
    here, far = own._replace(pid=1), own._replace(pid=2, host=own.host ^ 1)
    with_link(dog, here, far).verdict = '{"status": 1}'
    with pytest.raises(Ended):
        dog._look(limits.TICK)
    assert killed == [here]


def test_the_status_is_posted_at_every_look(dog):
    link = with_link(dog)
    dog.group.enter("World.average")
    look_for(dog, 1.5)
    assert len(link.posted) == 3
    assert '"rank": 3' in link.posted[-1]
    assert "World.average" in link.posted[-1]
    assert '"waited": 1.0' in link.posted[-1]


@pytest.mark.parametrize(
    ("states", "seen"),
    [
        ([RUNS, RUNS], {}),
        ([STOPPED, GONE], {0: STOPPED, 1: GONE}),
        ([GONE, RUNS], {}),  # rank 1 tells it
        ([RUNS, GONE], {}),
    ],
)
def test_the_first_rank_of_a_host_that_runs_tells_of_the_others(dog, monkeypatch, states, seen):
    own = processes.own()
    others = [own._replace(pid=1 + rank) for rank in range(2)]
    with_link(dog, *others)
    monkeypatch.setattr(processes, "state", lambda process: states[process.pid - 1])
    assert watchdog._sees(dog.channels[0]) == seen


def test_ranks_of_other_hosts_are_not_looked_at(dog, monkeypatch):
    own = processes.own()
    with_link(dog, own._replace(host=own.host ^ 1, pid=1))
    monkeypatch.setattr(processes, "state", lambda process: GONE)
    assert watchdog._sees(dog.channels[0]) == {}


def test_a_rank_whose_launcher_is_gone_ends(dog, said, monkeypatch):
    with_link(dog)
    dog._look(limits.TICK)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(Ended) as ended:
        dog._look(limits.TICK)
    assert ended.value.args == (ENDED_STATUS,)
    assert said == [f"syncbn: rank 3 ends, as its launcher (process {dog._parent}) is gone.\n"]


def test_without_a_launcher_the_parent_may_go(said, monkeypatch):
    shell = Watchdog(0, "none")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    shell._look(limits.TICK)
    assert said == []


def test_a_process_that_was_suspended_has_not_waited_meanwhile(dog, said, monkeypatch):
    """Between two looks the clock jumps by a day, as after SIGSTOP or on a laptop that slept."""
    link, clock, looks = with_link(dog), [0.0], []
    dog.group.enter("World.average")

    def look(seconds):
        looks.append(seconds)
        clock[0] += 86400.0 if len(looks) == 3 else limits.TICK
        if len(looks) == 6:
            dog._ends.set()

    monkeypatch.setattr(dog, "_look", look)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(dog._selector, "select", lambda timeout: [])
    dog.run()
    assert looks[0] == 0.0
    assert max(looks) <= 2 * limits.TICK
    assert link.posted == []


def test_many_ranks_are_looked_at_less_often(dog):
    assert dog._pause() == limits.TICK
    with_link(dog)
    dog.channels[0].ranks = tuple(range(1024))
    assert dog._pause() == watchdog.LONGEST_PAUSE * limits.TICK
    dog.reader.ended = "ended"
    assert dog._pause() == 0.05


def test_a_thread_of_its_own_looks_and_ends_with_the_program(dog):
    link = with_link(dog)
    dog.start()
    dog.wake()
    end = time.monotonic() + 5
    while not link.posted and time.monotonic() < end:
        time.sleep(0.01)
    began = time.monotonic()
    dog.farewell("ended")
    assert time.monotonic() - began < 1.5
    assert not dog.is_alive()
    assert '"ended": "ended"' in link.posted[-1]


def test_one_that_ends_by_an_exception_lets_the_others_report_it(dog):
    link = with_link(dog)
    dog.start()
    began = time.monotonic()
    dog.farewell("ended with KeyError: 3")
    assert time.monotonic() - began >= watchdog.QUIET
    assert '"ended": "ended with KeyError: 3"' in link.posted[-1]


def test_a_rank_that_is_cut_off_from_all_hosts_that_look_says_so(dog, said, monkeypatch):
    own, ended = processes.own(), []
    monkeypatch.setattr(processes, "end_daemon", lambda: ended.append(True))
    link = with_link(dog, own._replace(host=1), own._replace(host=2))
    [channel] = dog.channels
    channel.hosts = ["h1", "h2", "h3"]
    link.is_heard, link.unanswered = False, LIMIT
    look_for(dog, 2 * LIMIT)
    assert said == [], "it waits for nobody, and it may come back"
    dog.group.enter("World.average")
    with pytest.raises(Ended):
        look_for(dog, 2 * LIMIT)
    assert "in World.average (call 1), and hosts h1, h2 have not answered for 5.0 s: down, or this host, " in said[0]
    assert ended == [True], "no order of mpirun reaches this host"


def test_a_rank_that_is_cut_off_for_the_limit_may_wait_in_another_library(dog, said):
    own = processes.own()
    link = with_link(dog, own._replace(host=1), own._replace(host=2))
    dog.channels[0].hosts = ["h1", "h2", "h3"]
    link.is_heard, link.unanswered = False, LIMIT + GRACE
    with pytest.raises(Ended):
        dog._look(limits.TICK)
    assert said[0].startswith("syncbn: rank 3: hosts h1, h2 have not answered for 8.0 s")
