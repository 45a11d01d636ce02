# SPDX-License-Identifier: BSD-3-Clause
"""Whether the host at the other end of a connection answers, as far as one host can see it."""

import errno
import os
import socket

import pytest

from syncbn.waits import lines, processes
from syncbn.waits.channel import Channel, servers
from syncbn.waits.lines import UNREACHABLE, Lines


@pytest.fixture
def silent(monkeypatch):
    """Every connection waits for an acknowledgment from now on."""

    def begin():
        monkeypatch.setattr(Lines, "_awaits_acknowledgment", lambda self: not self.broken)

    return begin


def test_a_host_that_acknowledges_has_answered(bench):
    b = bench()
    link = b.link(1)
    link.post("hello")
    assert b.has(1, "hello")
    for _ in range(20):
        b.hub.beat(1.0)
        link.post("again")
        link.count(1.0)
        b.pump(seconds=0.01)
    assert link.unanswered == 0.0
    assert b.hub.unanswered() == {}


def test_the_system_acknowledges_for_a_process_that_never_reads(bench):
    b = bench()
    deaf = b.raw(b"4711 2\n")
    assert b.pump(lambda: 2 in b.hub._peers.values())
    b.hub.beat(1.0)
    b.pump(seconds=1.2)
    b.hub.beat(1.0)
    assert b.hub.unanswered() == {}
    deaf.close()


def test_a_host_without_acknowledgments_counts_as_unreachable_after_some_seconds(bench, silent):
    b = bench()
    link = b.link(1)
    link.post("hello")
    assert b.has(1, "hello")
    silent()
    for _ in range(5):
        assert b.hub.unanswered() == {}
        b.hub.beat(0.5)
        link.count(0.5)
    b.hub.beat(0.5)
    assert b.hub.unanswered() == {1: UNREACHABLE}
    assert link.unanswered == 2.5


def test_a_sign_of_life_starts_anew(bench, silent, monkeypatch):
    link = bench().link(1)
    silent()
    link.count(10.0)
    assert link.unanswered == 10.0
    monkeypatch.undo()
    link.count(0.5)
    assert link.unanswered == 0.0


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ECONNRESET])
def test_a_connection_that_the_network_breaks_is_no_process_that_is_gone(bench, monkeypatch, number):
    b = bench()
    b.link(1).post("hello")
    assert b.has(1, "hello")
    [peer] = b.hub._peers

    class Broken:
        def recv(self, size):
            raise OSError(number, os.strerror(number))

        def fileno(self):
            return connection.fileno()

        def close(self):
            connection.close()

    connection, peer.connection = peer.connection, Broken()
    b.hub.hear(peer, b.selector)
    cut = number != errno.ECONNRESET
    assert b.hub.lost == (set() if cut else {1})
    b.hub.beat(4.0)
    assert b.hub.unanswered() == ({1: 4.0} if cut else {})


def test_the_ranks_that_serve_are_on_two_hosts_if_there_are_several():
    assert servers([5]) == (0,)
    assert servers([5, 5, 5]) == (0, 1)
    assert servers([5, 5, 6, 7]) == (0, 2)


def test_a_channel_without_a_hub_is_cut_off_if_no_hub_s_host_answers(bench, silent):
    own = processes.own()
    members = [own._replace(host=1), own._replace(host=2), own]
    b = bench()
    links = [b.link(2), b.link(2)]
    channel = Channel((0, 1, 2), 2, members, None, links, ["h1", "h2", "h3"])
    assert (channel.servers, channel.host(2)) == ((0, 1), "h3")
    silent()
    links[0].count(8.0)
    assert channel.unanswered == 0.0, "the second one has answered"
    links[1].count(6.0)
    assert channel.unanswered == 6.0


def test_where_the_system_does_not_tell_every_host_answers(monkeypatch):
    left, right = socket.socketpair()
    monkeypatch.delattr(lines.socket, "TCP_INFO")
    connection = Lines(left)
    connection.send(b"hello")
    connection.count(10.0)
    assert connection.unanswered == 0.0
    left.close()
    right.close()
