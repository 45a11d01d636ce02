# SPDX-License-Identifier: BSD-3-Clause
"""Whatever happens to a rank, a host or a launcher, a job ends on all hosts, in time, and says where it happened.

SYNCBN_TEST_FAULTS=all runs every fault under every way of starting.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from tests.hosts import jobs

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(300)]
LIMIT = 5.0
SOON = 5.0
OF_LAUNCHER = 4.0
"""Seconds that torchrun and mpirun may take in addition: torchrun's agents end some seconds after their processes."""
LIMIT_STATUS = 124


class Fault(NamedTuple):
    """What is expected of a fault of a rank: the last one, on the last host, unless it is said of the first one."""

    at_limit: bool
    says: str
    """A pattern of what is said; HOST and RANKS stand for the host of the fault and the ranks there."""


LOST = Fault(True, r"Host HOST of ranks? RANKS has not answered for \d\.\d s")
FAULTS = {
    "kill": Fault(False, r"The process of rank \d on HOST is gone"),
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
    for way in jobs.WAYS
    for name in FAULTS
    for who in ("last", "first")
    if (way, name) not in (("plain", "agent"), ("plain", "launcher"), ("torchrun", "launcher"))
    and (name, who) not in (("launcher", "last"),)
    and (way, name, who) != ("mpirun", "agent", "first")
]
USUAL = [
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
]
CASES = ALL if os.environ.get("SYNCBN_TEST_FAULTS") == "all" else USUAL


@pytest.fixture(scope="module")
def ended(make_hosts, request):
    """Runs the jobs of all collected tests, some at a time: they mostly wait."""
    wanted = [item.callspec.params["case"] for item in request.session.items if "ended" in item.fixturenames]
    hosts = {case: make_hosts(2) for case in wanted}

    def run(case):
        way, name, who = case
        job = jobs.Job(hosts[case], way, 2, "--endless", SYNCBN_TIMEOUT=LIMIT)
        jobs.fault(job, name, job.size - 1 if who == "last" else 0)
        found = jobs.watch(job, LIMIT + 30)
        hosts[case].clear()
        return found

    pool = ThreadPoolExecutor(3)
    futures = {case: pool.submit(run, case) for case in wanted}
    yield lambda case: futures[case].result()
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_job_ends_on_all_hosts_in_time_and_says_where_the_fault_is(ended, case):
    way, name, who = case
    done, fault = ended(case), FAULTS[name]
    assert done.left == {}, f"something is left\n{done}"
    limit = LIMIT * fault.at_limit + SOON + OF_LAUNCHER * (way != "plain")
    times = [*done.seconds.values(), *done.launched]
    assert max(times) <= limit, f"too late\n{done}"
    assert not fault.at_limit or max(times) >= 0.8 * LIMIT, f"too early\n{done}"
    assert all(status != 0 for status in done.statuses), f"a launcher has ended as if all were well\n{done}"
    says = fault.says.replace("HOST", "h2" if who == "last" else "h1")
    says = says.replace("RANKS", "2, 3" if who == "last" else "0, 1")
    assert re.search(says, " ".join(done.err.split())), f"it does not say where\n{done}"
    if name in ("drop", "cable") and way != "mpirun":  # both sides report, but mpirun gets no word from that host
        other = says.replace("h2", "h1").replace("2, 3", "0, 1") if who == "last" else ""
        assert re.search(other, " ".join(done.err.split())), f"the host that is cut off says nothing\n{done}"
    if way == "plain" and fault.at_limit:
        killed = {"crash": 2, "stop": 1}.get(name, 0)
        assert sorted(done.statuses) == [-9] * killed + [LIMIT_STATUS] * (4 - killed), done
