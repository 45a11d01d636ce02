# SPDX-License-Identifier: BSD-3-Clause
"""However a job on several hosts is started, uneven shares train to the bit like one process."""

import re

import pytest

from tests.hosts import jobs

pytestmark = pytest.mark.hosts
LIMIT = 110
"""Seconds: on an idle machine it takes five."""


@pytest.fixture(scope="module")
def started(make_hosts):
    """Starts all jobs at once: they mostly wait for torch to be imported, and for each other."""
    ways = [("plain", 2), ("torchrun", 2), ("mpirun", 2), ("mpirun", 4), ("plain", 4)]
    made = {(way, n): jobs.Job(make_hosts(n), way, 2 if n == 2 else 1) for way, n in ways}
    return made


def check(job, transport):
    statuses = job.statuses(LIMIT)
    told = re.findall(r"rank (\d+) on (h\d) by (\w+): (\d+) differences", job.out)
    wanted = [(str(rank), f"h{1 + rank // job.per_host}", transport, "0") for rank in range(job.size)]
    assert sorted(told) == wanted, f"{job.out}\n{job.err}"
    assert statuses == [0] * len(job.parts), job.err


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("way", ["plain", "mpirun"])
def test_uneven_shares_train_to_the_bit_like_one_process(started, way, n):
    check(started[way, n], "mpi" if way == "mpirun" else "torch")


def test_torchrun_on_two_hosts_trains_to_the_bit_like_one_process(started):
    check(started["torchrun", 2], "torch")


def test_mpirun_over_ssh_trains_to_the_bit_like_one_process(make_hosts):
    check(jobs.Job(make_hosts(2, ssh=True), "ssh", 2), "mpi")
