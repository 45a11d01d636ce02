# SPDX-License-Identifier: BSD-3-Clause
"""What the doctor finds out about a network; tests/hosts has it on real ones."""

import threading

import pytest

from syncbn.cli.doctor import named_hosts, network, text
from syncbn.cli.doctor.channels import AbstractChannel
from syncbn.cli.doctor.report import Report
from syncbn.transports import addresses, interfaces
from syncbn.transports.interfaces import Interface


class Board(AbstractChannel):
    """Ranks that are threads of this process."""

    place = "the board"
    texts, changed = {}, threading.Condition()

    def __init__(self, rank):
        self.rank = rank

    def tell(self, key, text):
        with self.changed:
            self.texts[key, self.rank] = text
            self.changed.notify_all()

    def hear(self, key, ranks, limit):
        with self.changed:
            self.changed.wait_for(lambda: all((key, rank) in self.texts for rank in ranks), limit)
            return {rank: self.texts[key, rank] for rank in ranks if (key, rank) in self.texts}


@pytest.fixture
def two_hosts(monkeypatch):
    """Ranks 0 and 2 are on a host at 127.0.0.2, rank 1 on one at 127.0.0.3. Threads are the ranks."""

    def own():
        host = 1 + int(threading.current_thread().name) % 2
        found = Interface("eth0", f"127.0.0.{host + 1}", "127.0.0.0/24")
        return addresses.Offer(f"{host}", f"h{host}", [found, Interface("docker0", "172.17.0.1", "172.17.0.0/16")])

    monkeypatch.setattr(addresses, "own", own)
    monkeypatch.setattr(interfaces, "is_loopback", lambda address: address == "127.0.0.1")
    monkeypatch.delenv(addresses.GLOO_INTERFACE, raising=False)


def look(ranks, size, limit, launcher="env"):
    found = {}
    Board.texts.clear()  # of an earlier look

    def run(rank):
        found[rank] = network.look(rank, size, Board(rank), limit, launcher)

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in ranks]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(each == found[ranks[0]] for each in found.values())
    return found[ranks[0]]


def test_all_ranks_find_the_same_table_and_routes(two_hosts):
    found = look((0, 1, 2), 3, 5)
    assert [(host.name, host.ranks, host.address, host.interface) for host in found.hosts] == [
        ("h1", [0, 2], "127.0.0.2", "eth0"),
        ("h2", [1], "127.0.0.3", "eth0"),
    ]
    assert {(each.source, each.target, each.found) for each in found.routes} == {
        ("h1", "h2", "reached"),
        ("h2", "h1", "reached"),
    }
    assert (found.problems, found.suspects) == ([], [])
    said = text.to_text(Report(network=found))
    assert "h1      0, 2     127.0.0.2  eth0         unknown        docker0 172.17.0.1" in said
    assert "2 of 2 connections from host to host were made; the longest one-way delay is " in said
    assert 0 < found.delay_us < 1e6


def test_an_address_of_several_hosts_is_a_suspect_only_under_open_mpi(two_hosts, monkeypatch):
    [suspect] = look((0, 1), 2, 5, "openmpi").suspects
    assert suspect[1].startswith("Set OMPI_MCA_btl_tcp_if_include=127.0.0.0/24")
    monkeypatch.setenv("OMPI_MCA_btl_tcp_if_include", "127.0.0.0/24")
    assert look((0, 1), 2, 5, "openmpi").suspects == []


def test_a_rank_that_never_comes_is_named(two_hosts):
    found = look((0, 1), 4, 0.2)
    assert found.problems[0][0] == "could not connect the processes within 0.2 s: ranks 2, 3 never came to the board"
    assert found.routes == []


def test_the_hosts_that_were_named_to_a_launcher_are_counted(tmp_path):
    (tmp_path / "hosts").write_text("# two\nh1 slots=2\n\nh2:2\nh1\n")
    cases = [
        ({}, ("mpirun", "--host", "h1:2,h2:2,h1", "train.py"), 2),
        ({}, ("mpirun", "--hostfile", str(tmp_path / "hosts"), "-n", "4"), 2),
        ({"PRTE_MCA_prte_default_hostfile": str(tmp_path / "hosts")}, (), 2),
        ({"SLURM_JOB_NUM_NODES": "3"}, (), 3),
        ({}, ("mpirun", "--hostfile", str(tmp_path / "none")), 0),
        ({}, ("mpirun", "-n", "2"), 0),
    ]
    assert [named_hosts.count(environ, command) for environ, command, _ in cases] == [number for *_, number in cases]
