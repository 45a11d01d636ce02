# SPDX-License-Identifier: BSD-3-Clause
"""A rank does something else than the others: every job ends on all ranks, soon, and says who did what.

Without a launcher, which would end ranks itself: over gloo and through shared memory. See test_launched_faults.py.
"""

import re

import pytest

from syncbn.transports import shared_memory
from syncbn.waits.judge import LIMIT_STATUS
from tests.waits.expected import (
    FAR,
    FAULTS,
    LIMIT,
    SOON,
    SOON_LAUNCHED,
    WITH_DDP,
    Jobs,
    check,
    check_shared,
    limit_of,
    new,
)
from tests.waits.jobs import END, GIVEN_UP, Nest

GLOO = {"SYNCBN_TRANSPORT": "torch"}


def over(transport, nest, folder):
    """A function that runs a case over gloo (torch) or through shared memory (shm)."""

    def run(ranks, name, rank, how):
        words = [name, "--rank", str(rank), "--how", how]
        limit, more = limit_of(name, how), {"SYNCBN_TRANSPORT": transport}
        return nest.run(new(folder), ranks, words, limit=limit, patience=30, **more)

    return run


@pytest.fixture(scope="module")
def nest():
    made = Nest()
    yield made
    made.close()


TRANSPORTS = ["torch", *["shm"] * (not shared_memory.problem())]
COMMON = ["exception", "kill", "fewer", "out_of_memory", "evaluates", "swaps", "skips_last", "sleep", "stop", "none"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_common_faults_end_the_job_and_say_whose_they_are(nest, tmp_path, transport):
    jobs = Jobs(4)
    cases = [(3, name, 1, "average") for name in COMMON]
    futures = {case[1]: jobs.begin(case, over(transport, nest, tmp_path)) for case in cases}
    assert futures.pop("none").result().statuses == [0, 0, 0]
    for name, future in futures.items():
        (check if transport == "torch" else check_shared)(name, future.result())
    jobs.close()


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [3, 4])
def test_the_ranks_that_report_are_killed(nest, tmp_path, ranks):
    done = nest.run(tmp_path, ranks, ["kill", "--rank", "0", "1"], limit=FAR, patience=30, **GLOO)
    assert done.statuses == [-9, -9, *[1] * (ranks - 2)], done
    assert done.seconds < SOON, done
    assert done.err.count("gone, with all ranks that could report. It ends with status 1.") == ranks - 2, done
    assert "forward of 'stem.1' (call 12)" in done.err, done


NOT_RANK_1 = [(3, name, 0) for name in ("exception", "kill", "exits", "stop", "sleep", "swaps", "evaluates")]
NOT_RANK_1 += [(2, name, 0) for name in ("exception", "kill", "exits", "stop", "sleep")]
OTHER_SIZES = [
    "exception",
    "kill",
    "fewer",
    "sleep",
    "stop",
    "swaps",
    "skips_last",
    "no_backward",
    "evaluates",
    "caught",
]
"""Over gloo; through shared memory all faults run at all sizes."""


def cases(sizes, others=()):
    """All faults at some sizes, some at others, and those of other ranks and in DDP."""
    found = [(ranks, name, 1, "average") for ranks in sizes for name in FAULTS]
    found += [(ranks, name, 1, "average") for ranks in others for name in OTHER_SIZES]
    found += [(*case, "average") for case in NOT_RANK_1]
    return found + [(3, name, 1, "ddp") for name in ("exception", "kill", "fewer", "sleep", "swaps", *WITH_DDP)]


def jobs_over(transport, request, nest, folder, fixture):
    jobs, run = Jobs(8), over(transport, nest, folder)
    wanted = [item.callspec.params["case"] for item in request.session.items if fixture in item.fixturenames]
    yield lambda case: jobs.begin_all((case, *wanted), run)[0].result()
    jobs.close()


@pytest.fixture(scope="module")
def gloo_jobs(request, nest, tmp_path_factory):
    yield from jobs_over("torch", request, nest, tmp_path_factory.mktemp("gloo"), "gloo_jobs")


@pytest.fixture(scope="module")
def shared_jobs(request, nest, tmp_path_factory):
    yield from jobs_over("shm", request, nest, tmp_path_factory.mktemp("shm"), "shared_jobs")


@pytest.mark.faults
@pytest.mark.parametrize("case", cases((3,), (2, 4)), ids=lambda case: "-".join(map(str, case)))
def test_over_gloo(gloo_jobs, case):
    ranks, name, rank, how = case
    check(name, gloo_jobs(case), rank=rank, ranks=ranks, how=how)


@pytest.mark.faults
@pytest.mark.skipif(bool(shared_memory.problem()), reason=shared_memory.problem())
@pytest.mark.parametrize("case", cases((2, 3, 4)), ids=lambda case: "-".join(map(str, case)))
def test_through_shared_memory(shared_jobs, case):
    ranks, name, rank, how = case
    check_shared(name, shared_jobs(case), rank=rank, ranks=ranks, how=how)


@pytest.mark.faults
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_threads_in_one_group_end(nest, tmp_path, transport):
    done = nest.run(tmp_path, 3, ["threads"], limit=LIMIT, patience=30, SYNCBN_TRANSPORT=transport)
    text = " ".join(done.err.split())
    assert GIVEN_UP not in done.statuses, done
    assert done.seconds < LIMIT + SOON, done
    said = "A group can be in one call at a time" in text or END in text or "op.preamble.length" in text
    assert said or done.out.count("thread ended") == 6, done


@pytest.mark.faults
def test_many_ranks_share_the_rows_of_one_report(nest, tmp_path):
    ranks, patience = 64, 20.0
    done = nest.run(tmp_path, ranks, ["sleep", "--rank", "17"], limit=patience, patience=100)
    assert set(done.statuses) == {LIMIT_STATUS}, done
    assert done.err.count(END) == 1, done
    assert done.seconds < patience + SOON_LAUNCHED, done
    assert "Rank 17 is in no call of syncbn" in " ".join(done.err.split()), done
    rows = [line for line in done.err.splitlines() if re.match(r"[0-9, -]+  \S", line)]
    assert len(rows) < 10, "rows that are alike are one row"
    assert done.report["waiting"] == [rank for rank in range(ranks) if rank != 17], done
