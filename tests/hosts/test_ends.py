# SPDX-License-Identifier: BSD-3-Clause
"""Whatever happens to a rank, a host or a launcher, a job ends on all hosts, in time, and says where it happened.

SYNCBN_TEST_FAULTS=all runs every fault under every way of starting, one job after the other, and holds each to the
limit and five seconds. With some jobs at a time on few cores, launchers have more. It prints its times with -s.
"""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from tests.hosts import jobs, network

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(300)]
LIMIT = 5.0
SOON = 5.0
EVERY = os.environ.get("SYNCBN_TEST_FAULTS") == "all"
OF_LAUNCHER = dict.fromkeys(("plain", "torchrun", "mpirun", "ssh"), 0.0)
"""Seconds that a launcher may take in addition where jobs share the cores."""
if not EVERY:
    OF_LAUNCHER |= {"mpirun": 4.0, "ssh": 4.0, "torchrun": 8.0}
LIMIT_STATUS = 124
OF_PARENTS = ("agent", "launcher")
"""Faults at which ranks end with their parent; a fork has another one."""


class Fault(NamedTuple):
    """What is expected of a fault of a rank: the last one, on the last host, unless it is said of the first one."""

    at_limit: bool
    says: str
    """A pattern of what is said; HOST and RANKS stand for the host of the fault and the ranks there."""


LOST = Fault(True, r"Host HOST of ranks? RANKS has not answered for \d\.\d s")
FAULTS = {
    "kill": Fault(False, r"The process(es)? of [^.]*\bon HOST\b[^.]* (is|are) gone|Peer host: HOST|"
                  r"process rank \d with PID \d+ on node HOST exited"),
    "stop": Fault(True, r"Rank \d on HOST is (stopped by a signal|without a sign of life)"),
    "crash": LOST,
    "drop": LOST,
    "cable": LOST,
    "agent": Fault(False, r"The process(es)? of ranks? RANKS on HOST (is|are) gone|rank \d ends, as its launcher|"
                   r"PRTE has lost communication with a remote daemon"),
    "launcher": Fault(False, r"rank \d ends, as its launcher|"),
}  # fmt: skip
ALL = [
    (way, name, who)
    for way in (*jobs.WAYS, "ssh")
    for name in FAULTS
    for who in ("last", "first")
    if (way, name) not in (("plain", "agent"), ("plain", "launcher"), ("torchrun", "launcher"))
    and (name, who) not in (("launcher", "last"),)
    and (way, name, who) not in (("mpirun", "agent", "first"), ("ssh", "agent", "first"))
]
USUAL = [
    ("plain", "kill", "last"),
    ("plain", "drop", "last"),
    ("plain", "stop", "last"),
    ("plain", "crash", "first"),
    ("torchrun", "kill", "last"),
    ("torchrun", "crash", "first"),
    ("torchrun", "agent", "last"),
    ("mpirun", "agent", "last"),
    ("mpirun", "cable", "last"),
    ("mpirun", "crash", "last"),
    ("mpirun", "launcher", "first"),
    ("ssh", "kill", "last"),
    ("ssh", "crash", "last"),
]
NO_SSH = network.sshd_problem()
CASES = ALL if EVERY else USUAL


@pytest.fixture(scope="module")
def ended(make_hosts, request):
    """Runs the jobs of all collected tests, some at a time: they mostly wait."""
    wanted = [item.callspec.params["case"] for item in request.session.items if "ended" in item.fixturenames]
    hosts = {case: make_hosts(2, ssh=case[0] == "ssh") for case in wanted if case[0] != "ssh" or not NO_SSH}

    def run(case):
        way, name, who = case
        job = jobs.Job(hosts[case], way, 2, "--endless", LIMIT, forks=name not in OF_PARENTS and not EVERY)
        jobs.fault(job, name, job.size - 1 if who == "last" else 0)
        found = jobs.watch(job, LIMIT + 30)
        hosts[case].clear()
        return found

    pool = ThreadPoolExecutor(1 if EVERY else 3)
    futures = {case: pool.submit(run, case) for case in hosts}
    yield lambda case: futures[case].result()
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.skipif(c[0] == "ssh" and bool(NO_SSH), reason=NO_SSH)) for c in CASES],
    ids="-".join,
)
def test_a_job_ends_on_all_hosts_in_time_and_says_where_the_fault_is(ended, case):
    way, name, who = case
    done, fault = ended(case), FAULTS[name]
    sys.stdout.write(f"{'-'.join(case)}: hosts {done.seconds}, launchers {done.launched}, statuses {done.statuses}\n")
    assert done.left == {}, f"something is left\n{done}"
    limit = LIMIT * fault.at_limit + SOON + OF_LAUNCHER[way]
    times = [*done.seconds.values(), *done.launched]
    assert max(times) <= limit, f"too late\n{done}"
    assert not fault.at_limit or max(times) >= 0.8 * LIMIT, f"too early\n{done}"
    assert all(status != 0 for status in done.statuses), f"a launcher has ended as if all were well\n{done}"
    text = " ".join(done.err.split())
    mpi = way in ("mpirun", "ssh")
    if not mpi or (name, who) != ("crash", "first"):  # its words go through mpirun, on the host that is gone
        seen = "h2" if who == "last" or (mpi and fault is LOST) else "h1"
        assert re.search(on(fault.says, seen), text), f"it does not say where\n{done}"
    if name in ("drop", "cable") and not mpi:  # both sides report, but mpirun gets no word from the other one
        assert re.search(on(fault.says, "h1"), text), f"the host that is cut off says nothing\n{done}"
        assert re.search(on(fault.says, "h2"), text), f"the other host says nothing\n{done}"
    if way == "plain" and fault.at_limit:
        killed = {"crash": 2, "stop": 1}.get(name, 0)
        assert sorted(done.statuses) == [-9] * killed + [LIMIT_STATUS] * (4 - killed), done


def on(says, host):
    return says.replace("HOST", host).replace("RANKS", "0, 1" if host == "h1" else "2, 3")
