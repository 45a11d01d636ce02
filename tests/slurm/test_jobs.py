# SPDX-License-Identifier: BSD-3-Clause
"""Jobs in a real Slurm of this machine, through launch/slurm.sbatch and srun: they train, and they end."""

import re
import time

import pytest

from tests.processes import ROOT
from tests.slurm.conftest import left_over

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
PMIS = ("none", "pmix")


def test_the_script_is_what_the_docs_say():
    """The one test of this stage that needs no Slurm."""
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    assert 'srun --mpi="$PMI"' in script
    assert "--kill-on-bad-exit=1" in script
    documented = (ROOT / "docs" / "clusters" / "slurm.md").read_text()
    for word in ("srun --mpi=pmix", "PMI=none sbatch", "SYNCBN_JOB"):
        assert word in documented
    for name in ("PMI", "SYNCBN_JOB", "MASTER_ADDR"):
        assert f"${{{name}:-" in script


def job_of(jobs, name):
    if name not in jobs:
        pytest.skip("this Slurm has no PMIx that starts; Debian's needs libpmix-dev")
    return jobs[name]


def test_scancel_ends_every_process(jobs, cluster):
    job = jobs["cancelled"]
    job.until_said("ready")
    cluster.call("scancel", job.number)
    state, said = job.end()
    assert state == "CANCELLED", said


def test_the_time_limit_ends_every_process(jobs, cluster):
    """A limit is at least a minute, so the end of a running job is moved. Slurm looks twice a minute."""
    job = jobs["late"]
    job.until_said("ready")
    cluster.call("scontrol", "update", f"JobId={job.number}", "EndTime=now")
    state, said = job.end()
    assert state == "TIMEOUT", said
    assert "DUE TO TIME LIMIT" in said


@pytest.mark.parametrize("name", ["two-none", "two-pmix", "four-none"])
def test_a_job_trains(jobs, name):
    state, said = job_of(jobs, name).end()
    assert state == "COMPLETED", said
    size, mean = (4, 11.5) if name.startswith("four") else (2, 10.5)
    assert sorted(said.splitlines()) == [f"{rank} of {size} shm {mean:g}" for rank in range(size)]


@pytest.mark.parametrize("pmi", PMIS)
def test_two_steps_at_once_do_not_mix(jobs, pmi):
    """By the job's number alone, rank 1 of the second step joined the first one, and both had a mean between them."""
    state, said = job_of(jobs, f"steps-{pmi}").end()
    assert state == "COMPLETED", said
    assert sorted(said.splitlines()) == sorted(f"{rank} of 2 shm {mean}" for rank in (0, 1) for mean in (100.5, 8.5))


@pytest.mark.parametrize("pmi", PMIS)
@pytest.mark.parametrize("fault", ["raises", "killed", "hangs"])
def test_a_fault_of_one_rank_ends_the_job_and_is_named(jobs, fault, pmi):
    state, said = job_of(jobs, f"{fault}-{pmi}").end()
    assert state == "FAILED", said
    wanted = {
        "raises": r"rank 1 gives up",
        "killed": r"task 1: Killed|rank 1.*(ended|SIGKILL)",
        "hangs": r"Rank 1 is in no call of syncbn",
    }
    assert re.search(wanted[fault], said), said


def test_a_layer_without_init_says_that_nothing_connects_the_tasks(jobs):
    state, said = jobs["plain-layer"].end()
    assert state == "COMPLETED", said
    assert said.count("SyncBatchNorm is NOT synchronised: slurm started 2 processes") == 2, said
    assert said.count("srun --mpi=pmix") == 2, said


def test_a_communicator_of_one_process_in_a_step_of_two_is_warned_of(jobs):
    state, said = jobs["plain-communicator"].end()
    assert state == "COMPLETED", said
    assert said.count("SyncBatchNorm is NOT synchronised: slurm started 2 processes") == 2, said
    assert said.count("srun --mpi=pmix") == 2, said


def test_nothing_is_left_running(jobs, cluster):
    for job in jobs.values():
        job.end()
    deadline = time.monotonic() + 10
    while (left := left_over(cluster.folder / "stuck.py")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
