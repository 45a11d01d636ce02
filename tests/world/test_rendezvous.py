# SPDX-License-Identifier: BSD-3-Clause
"""Where the processes of each launcher meet, by its variables. Ranks are threads here."""

import socket
import threading

import pytest

from syncbn.transports import identity
from syncbn.transports.launchers import Launch
from syncbn.world import meeting, rendezvous

NAMES = ("MASTER_ADDR", "MASTER_PORT", "SYNCBN_JOB", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_NODES")


@pytest.fixture
def variables(monkeypatch):
    """Sets the variables of all ranks."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def give(**named):
        for name, value in named.items():
            monkeypatch.setenv(name, str(value))

    return give


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def launch(name, rank, size=2):
    return Launch(name, rank, size, rank, speaks_mpi=False, evidence="the variables of a test")


def stores(name):
    got = {}

    def run(rank):
        got[rank] = rendezvous._store(launch(name, rank))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return got


def test_plain_variables_meet_at_the_chosen_port(variables, port):
    variables(MASTER_ADDR="localhost", MASTER_PORT=port, SYNCBN_JOB="word")
    got = stores("env")
    assert {address for address, _ in got.values()} == {"localhost"}
    got[0][1].set("key", "of rank 0")
    assert got[1][1].get("key") == b"of rank 0"
    assert got[1][1].underlying_store.port == port


@pytest.mark.parametrize(
    "extra", [{"SLURM_STEP_NUM_NODES": 1}, {"SLURM_STEP_NUM_NODES": 2, "MASTER_ADDR": "127.0.0.1"}]
)
def test_a_step_of_slurm_meets_at_a_port_of_its_own(variables, extra):
    variables(SLURM_JOB_ID=7, SLURM_STEP_ID=3, **extra)
    got = stores("slurm")
    got[1][1].set("key", "of rank 1")
    assert got[0][1].get("key") == b"of rank 1"
    assert got[0][1].underlying_store.port in meeting.ports_of(identity.of_job(launch("slurm", 0)))


def test_a_process_by_itself_needs_no_address(variables):
    variables()
    address, _ = rendezvous._store(launch("env", 0, size=1))
    assert address == "127.0.0.1"


@pytest.mark.parametrize(("name", "words"), [("env", "Export them"), ("slurm", "srun --mpi=pmix")])
def test_without_an_address_the_error_says_what_to_set(variables, name, words):
    variables(SLURM_STEP_NUM_NODES=2)
    with pytest.raises(RuntimeError, match=f"MASTER_ADDR and MASTER_PORT are not set.*{words}"):
        rendezvous._store(launch(name, 1))


@pytest.mark.parametrize("wrong", ["", "no", "0", "65536", "-1"])
def test_a_port_that_is_none_is_an_error(variables, wrong):
    variables(MASTER_ADDR="127.0.0.1", MASTER_PORT=wrong)
    with pytest.raises(ValueError, match="MASTER_PORT must be a port from 1 to 65535; received"):
        rendezvous._store(launch("env", 1))
