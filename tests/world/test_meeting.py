# SPDX-License-Identifier: BSD-3-Clause
"""The meeting place of a job: its own ranks come in, all others are sent away and told so. Ranks are threads here."""

import json
import socket
import threading
import time
from datetime import timedelta

import pytest

from syncbn.transports import identity
from syncbn.transports.identity import Identity
from syncbn.transports.launchers import Launch
from syncbn.world import gate, meeting
from syncbn.world.gate import Seat
from syncbn.world.meeting import LOOPBACK, Place

A, B = Identity("step 0 of Slurm job 7"), Identity("step 1 of Slurm job 7")
SECONDS = 20


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(meeting, "PATIENCE", 0.5)
    monkeypatch.setattr(gate, "SILENCE", 0.5)


@pytest.fixture
def port():
    with socket.create_server((LOOPBACK, 0)) as server:
        return server.getsockname()[1]


def at(*ports):
    return Place(LOOPBACK, ports, bind=LOOPBACK)


def job(*ranks, seconds=SECONDS):
    """Lets (place, seat, delay) of some ranks meet, each on a thread. Returns what each got: a store or an error."""
    got = [None] * len(ranks)

    def run(i, place, seat, delay=0.0):
        time.sleep(delay)
        try:
            got[i] = meeting.meet(place, seat, timedelta(seconds=seconds))
        except Exception as error:
            got[i] = error

    threads = [threading.Thread(target=run, args=(i, *rank), daemon=True) for i, rank in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    return got


def talk(stores):
    """Returns what each store reads of a key that the first one wrote."""
    stores[0].set("key", "of the first")
    return [store.get("key") for store in stores]


def test_the_ranks_of_a_job_share_a_store(port):
    stores = job(*[(at(port), Seat(A, rank, 3)) for rank in (2, 1, 0)])
    assert talk(stores) == [b"of the first"] * 3


def test_two_jobs_at_the_same_ports_each_get_a_store_of_their_own(port):
    """So it is with two steps of one allocation whose first port happens to be the same."""
    with socket.create_server((LOOPBACK, 0)) as server:
        other = server.getsockname()[1]
    ranks = [(at(port, other), Seat(who, rank, 2)) for rank in (1, 0) for who in (A, B)]
    stores = job(*ranks)
    assert talk(stores[::2]) == [b"of the first"] * 2
    assert not stores[1].check(["key"])
    assert talk(stores[1::2]) == [b"of the first"] * 2


def test_a_port_with_another_program_is_passed_over(port):
    with socket.create_server((LOOPBACK, 0)) as silent:
        ports = silent.getsockname()[1], port
        stores = job((at(*ports), Seat(A, 1, 2)), (at(*ports), Seat(A, 0, 2)))
    assert talk(stores) == [b"of the first"] * 2


def test_at_a_chosen_port_both_sides_name_both_jobs(port):
    """Step A waits for its rank 1 when both ranks of step B come: they end, and A is told, and trains."""
    with pytest.warns(RuntimeWarning, match="sent away") as said:
        a0, b0, b1, a1 = job(
            (at(port), Seat(A, 0, 2)),
            (at(port), Seat(B, 0, 2), 0.3),
            (at(port), Seat(B, 1, 2), 0.3),
            (at(port), Seat(A, 1, 2), 2.0),
        )
    assert talk([a0, a1]) == [b"of the first"] * 2
    for error, rank in (b0, 0), (b1, 1):
        text = str(error)
        assert f"ank {rank} of {B}" in text, text
        assert f"rank 0 of {A} (process " in text, text
        assert f"port {port}" in text, text
        assert "MASTER_PORT of its own" in text, text
    texts = [str(each.message) for each in said]
    for rank in 0, 1:
        assert any(f"rank {rank} of {B}" in text and f"rank 0 of {A}" in text for text in texts), texts


def test_a_job_of_the_same_name_without_the_secret_is_sent_away(port):
    mine, forged = Identity(A.name, "secret"), Identity(A.name, "guess")
    with pytest.warns(RuntimeWarning, match="sent away"):
        host, guest = job((at(port), Seat(mine, 0, 2)), (at(port), Seat(forged, 1, 2)), seconds=2)
    assert "secret" not in str(host) + str(guest)
    assert f"{mine}" in str(guest), guest
    assert f"rank 1 of {forged}" in str(host), host
    assert str(mine) != str(forged)


def test_two_processes_of_one_rank_end_the_meeting_on_all_ranks(port):
    """Two jobs that nothing tells apart, as two of plain variables: nobody can say who belongs to whom."""
    errors = job((at(port), Seat(A, 0, 3)), (at(port), Seat(A, 1, 3)), (at(port), Seat(A, 1, 3)))
    for error in errors:
        assert "needs a rank of its own; received rank 1 from process " in str(error), error
        assert "SYNCBN_JOB" in str(error), error


def test_a_second_rank_0_ends_the_meeting(port):
    errors = job((at(port), Seat(A, 0, 2)), (at(port), Seat(A, 0, 2), 0.3))
    for error in errors:
        assert "needs a rank of its own; received rank 0 from process " in str(error), error


def test_ranks_of_jobs_of_different_size_are_told(port):
    errors = job((at(port), Seat(A, 0, 3)), (at(port), Seat(A, 1, 2)))
    for error in errors:
        assert "received 3 on rank 0 " in str(error), error
        assert "2 on rank 1 " in str(error), error


def test_missing_ranks_are_named_on_every_rank_that_came(port):
    began = time.monotonic()
    errors = job((at(port), Seat(A, 0, 4)), (at(port), Seat(A, 2, 4)), seconds=1)
    assert time.monotonic() - began < 10
    for error in errors:
        assert f"within 1 s; ranks 1, 3 did not come to {LOOPBACK} port {port}" in str(error), error


def test_without_rank_0_the_others_say_where_they_looked(port):
    (error,) = job((at(port), Seat(A, 1, 2)), seconds=1)
    assert f"must meet rank 0 of its own job within 1 s; received [Errno 111] Connection refused, at {LOOPBACK}" in str(
        error
    )


def test_a_store_of_a_job_that_has_met_sends_a_stranger_away_soon(port):
    stores = job(*[(at(port), Seat(A, rank, 2)) for rank in (0, 1)])
    began = time.monotonic()
    (error,) = job((at(port), Seat(B, 1, 2)))
    assert "a job whose ranks have met already" in str(error), error
    assert time.monotonic() - began < SECONDS / 2
    assert talk(stores) == [b"of the first"] * 2


def test_a_rank_that_ended_in_the_meeting_may_be_started_again(port):
    place = Place(LOOPBACK, (port,), socket.create_server((LOOPBACK, port), backlog=8))
    gone = threading.Thread(target=_leave_early, args=(port,))
    gone.start()
    stores = job((place, Seat(A, 0, 3)), (at(port), Seat(A, 1, 3), 1.0), (at(port), Seat(A, 2, 3), 1.0))
    gone.join()
    assert talk(stores) == [b"of the first"] * 3


def _leave_early(port):
    """Comes as rank 2, and ends."""
    with socket.create_connection((LOOPBACK, port)) as connection:
        lines = connection.makefile("rb")
        connection.sendall(gate._line({"protocol": gate._PROTOCOL, "nonce": "n"}))
        proof = A.proof(f"guest {json.loads(lines.readline())['nonce']}")
        connection.sendall(gate._line({"rank": 2, "size": 3, "proof": proof}))
        time.sleep(0.3)


@pytest.mark.parametrize(
    "noise", [b"[" * 1500 + b"\n", b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 9000, b"[]\n", b'{"rank": 1}\n', b""]
)
def test_noise_does_not_disturb_a_meeting(port, noise):
    def shout():
        with socket.create_connection((LOOPBACK, port)) as connection:
            connection.sendall(noise)
            time.sleep(0.2)

    place = Place(LOOPBACK, (port,), socket.create_server((LOOPBACK, port), backlog=8))
    thread = threading.Thread(target=shout)
    thread.start()
    stores = job((place, Seat(A, 0, 2)), (at(port), Seat(A, 1, 2), 0.3))
    thread.join()
    assert talk(stores) == [b"of the first"] * 2


def test_ports_differ_by_step_and_are_the_same_on_every_rank():
    assert meeting.ports_of(A) == meeting.ports_of(Identity(A.name, "some secret"))
    assert not set(meeting.ports_of(A)) & set(meeting.ports_of(B))
    assert len(meeting.ports_of(A)) == meeting.PORTS


def launch(name, size=2):
    return Launch(name, 0, size, 0, speaks_mpi=False, evidence="")


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_CLUSTER_NAME": "c"}


@pytest.mark.parametrize(
    ("name", "environ", "changed"),
    [
        ("slurm", SLURM, {"SLURM_STEP_ID": "1"}),
        ("slurm", SLURM, {"SLURM_JOB_ID": "8"}),
        ("slurm", SLURM, {"SLURM_CLUSTER_NAME": "d"}),
        ("slurm", SLURM, {"SYNCBN_JOB": "x"}),
        ("torchrun", {"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RUN_ID": "b"}),
        ("openmpi", {"PMIX_NAMESPACE": "prterun-vm-1@1"}, {"PMIX_NAMESPACE": "prterun-vm-2@1"}),
        ("env", {}, {"SYNCBN_JOB": "x"}),
        ("mpich", {}, {"SYNCBN_JOB": "x"}),
    ],
)
def test_the_identity_of_two_jobs_differs(name, environ, changed):
    one, other = identity.of_job(launch(name), environ), identity.of_job(launch(name), environ | changed)
    assert one == identity.of_job(launch(name)._replace(rank=1, local_rank=1), dict(environ))
    assert str(one) != str(other)
    assert one.number != other.number
    assert one.proof("?") != other.proof("?")


def test_the_parts_of_a_heterogeneous_job_are_one():
    parts = [{**SLURM, "SLURM_JOB_ID": job, "SLURM_JOB_ID_HET_GROUP_0": "7"} for job in ("7", "8")]
    assert identity.of_job(launch("slurm"), parts[0]) == identity.of_job(launch("slurm"), parts[1])
