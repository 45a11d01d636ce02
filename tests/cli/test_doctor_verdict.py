# SPDX-License-Identifier: BSD-3-Clause
"""Whether an all-reduce is as quick as it can be here, and what the doctor says if it is not."""

import pytest

from syncbn.cli.doctor import connecting, cores, probe, text, verdict
from syncbn.cli.doctor.report import Place, Report
from syncbn.cli.doctor.verdict import Layout, judge
from syncbn.transports.single import SingleTransport

CROWDED = "host h has 8 processes on 2 cores"


def place(rank, host="h", own="0-3", threads=1, limit=None):
    return Place(rank, rank, host, 100 + rank, "cpu", own, threads, limit)


@pytest.mark.parametrize(
    ("us", "layout", "status", "words"),
    [
        (4, Layout("shm", "cpu", 2), "as expected", "shared memory takes up to 12 us with a core for each rank"),
        (9, Layout("mpi", "cpu", 4), "as expected", "MPI on one host takes up to 40 us"),
        (800, Layout("torch", "cpu", 2), "as expected", "gloo on one host takes up to 1.0 ms"),
        (800, Layout("torch", "cpu", 2, no_memory="no compiler"), "as expected", "is not used: no compiler"),
        (30, Layout("shm", "cpu", 2, waiting=0.5), "above the usual", "a rank waited for a core for 50 % of the time"),
        (5e4, Layout("torch", "cpu", 4, hosts=2, delay_us=5e4), "as expected", "gloo over 50 ms from host to host"),
        (2e5, Layout("mpi", "cpu", 4, hosts=2, delay_us=5e4), "as expected", "MPI over 50 ms from host to host"),
        (30, Layout("nccl", "cuda", 8), "as expected", "NCCL on one host"),
        (1, Layout("single", "cpu", 1), "not judged", "one process has nothing to send"),
    ],
)
def test_what_a_transport_takes_here_is_said(us, layout, status, words):
    found = judge(us, layout)
    assert (found.status, found.warning, found.problem) == (status, None, None)
    assert words in found.text


@pytest.mark.parametrize(
    ("layout", "cause", "remedy"),
    [
        (Layout("shm", "cpu", 8, crowded=CROWDED), f"{CROWDED}, so ranks take turns", "at most one process a core"),
        (Layout("mpi", "cpu", 2, waiting=0.7), "waited for a core for 70 % of the time, since other pro", "`top`"),
        (
            Layout("mpi", "cpu", 2, waiting=0.7, threads="host h has 2 processes of 8 threads on 2 cores"),
            "2 processes of 8 threads on 2 cores, so ranks wait for cores",
            "OMP_NUM_THREADS",
        ),
    ],
)
def test_12_ms_without_a_core_for_each_rank_is_a_warning_with_that_cause(layout, cause, remedy):
    found = judge(12_000, layout)
    assert (found.status, found.problem) == ("slow", None)
    assert found.warning[0].startswith("an all-reduce takes 12 ms, and ")
    assert cause in found.warning[0]
    assert remedy in found.warning[1]


@pytest.mark.parametrize(
    ("layout", "remedy"),
    [
        (Layout("shm", "cpu", 2, waiting=0.01), "SYNCBN_TRANSPORT=mpi"),
        (Layout("mpi", "cpu", 2, waiting=0.01), "cpu.max"),
        (Layout("torch", "cpu", 2, waiting=0.0, no_memory="no compiler"), "Shared memory takes a few us"),
        (Layout("torch", "cpu", 4, hosts=2, delay_us=80.0), "GLOO_SOCKET_IFNAME"),
    ],
)
def test_12_ms_with_a_core_for_each_rank_is_a_problem_with_a_remedy(layout, remedy):
    found = judge(12_000, layout)
    assert (found.status, found.warning) == ("slow", None)
    assert found.problem[0].startswith("an all-reduce takes 12 ms, and ")
    assert remedy in found.problem[1]


@pytest.mark.parametrize(("waiting", "kind"), [(0.0, "Problems"), (0.9, "Warnings")])
def test_the_report_has_the_verdict_and_its_problem_or_warning(monkeypatch, waiting, kind):
    report = Report(ranks=[place(0), place(1)], latency_us={"64": 12_000.0}, waiting=waiting)
    transport = SingleTransport()
    monkeypatch.setattr(transport, "size", 2)
    monkeypatch.setattr(transport, "name", "shm")
    probe._judge(report, transport, "cpu")
    said = text.to_text(report)
    assert "latency     slow: shared memory takes up to 12 us with a core for each rank" in said
    assert f"{kind}:\n  1. an all-reduce takes 12 ms" in said
    assert ("No problem found." in said) == (kind == "Warnings")


def test_threads_without_a_core_each_are_a_warning_of_their_own(monkeypatch):
    report = Report(ranks=[place(0, threads=4), place(1, threads=4)], latency_us={"64": 4.0}, waiting=0.0)
    transport = SingleTransport()
    monkeypatch.setattr(transport, "size", 2)
    monkeypatch.setattr(transport, "name", "shm")
    probe._judge(report, transport, "cpu")
    [warning] = report.warnings
    assert warning.what.startswith("host h has 2 processes of 4 threads on 4 cores: they take turns")
    assert report.problems == []


def test_cores_are_those_of_all_processes_of_a_host_together():
    bound = [place(0, own="0"), place(1, own="1"), place(2, "other", own="0"), place(3, "other", own="0")]
    assert cores.crowded(bound[:2]) == ""
    assert cores.crowded(bound) == "host other has 2 processes on 1 core"
    assert cores.crowded([place(0), place(1, limit=1.5)]) == "host h has 2 processes on 1.5 cores"
    assert cores.crowded([place(0, own=""), place(1, own="")]) == ""  # unknown


def test_why_memory_is_not_shared_is_known(monkeypatch):
    monkeypatch.setenv("SYNCBN_TRANSPORT", "torch")
    transport = SingleTransport()
    assert connecting.why_not_shared(transport) == ""
    monkeypatch.setattr(transport, "size", 2)
    assert connecting.why_not_shared(transport) == "SYNCBN_TRANSPORT=torch"


@pytest.mark.parametrize(("us", "said"), [(0.46, "0.5 us"), (17.2, "17 us"), (1_240, "1.2 ms"), (12_007, "12 ms")])
def test_times_are_short(us, said):
    assert verdict.shown(us) == said
