# SPDX-License-Identifier: BSD-3-Clause
"""The side channel over loopback, with hubs and links of one process."""

import contextlib
import socket
import threading
import time

import pytest

from syncbn.waits import processes
from syncbn.waits.channel import LOOPBACK, Channel, Link, listen

KEY = "4711"
MEGABYTE = 2**20


def test_the_hub_gets_the_last_status_of_every_rank(bench):
    b = bench()
    one, two = b.link(1), b.link(2)
    one.post("first")
    two.post("of two")
    assert b.has(1, "first")
    assert b.has(2, "of two")
    one.post("second: é")
    assert b.has(1, "second: é")
    assert b.hub.texts == {1: "second: é", 2: "of two"}
    assert b.pump(lambda: one.is_heard and one.is_sent)
    assert b.hub.lost == set()


def test_a_socket_is_bound_to_loopback_alone(bench):
    b = bench()
    assert b.hub.listener.getsockname()[0] == "127.0.0.1"
    assert b.link(1).connection.getpeername()[0] == "127.0.0.1"


STRANGE = [b"4712 1", b"4711 3", b"4711 -1", b"4711", b"4711 1 1", b"", b"GET / HTTP/1.1\r\n\r", b"\xff\0"]


@pytest.mark.parametrize("first", STRANGE)
def test_who_does_not_know_the_key_is_cut_off(bench, first):
    b = bench()
    stranger = b.raw(first + b"\na status\n")
    stranger.settimeout(0)
    assert b.pump(lambda: not b.hub._peers and ended(stranger)), "the connection is closed"
    assert (b.hub.texts, b.hub.lost) == ({}, set())
    b.link(1).post("fine")
    assert b.has(1, "fine")


def ended(connection):
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("hello", [b"", b"4711 2\n"], ids=["a stranger", "a rank"])
def test_a_line_of_ten_megabytes_is_cut_off(bench, hello):
    b = bench()
    connection = b.raw(hello)
    sends = threading.Thread(daemon=True, target=flood, args=(connection, b"x" * 10 * MEGABYTE))
    sends.start()
    good = b.link(1)
    good.post("fine")
    assert b.has(1, "fine")
    assert b.pump(lambda: len(b.hub._peers) == 1)
    sends.join(5)
    assert not sends.is_alive()
    assert b.hub.lost == ({2} if hello else set())
    assert b.hub.texts == {1: "fine"}


def flood(connection, data):
    with contextlib.suppress(OSError):  # cut off
        connection.sendall(data)


def test_a_long_status_arrives_whole(bench):
    """In many pieces, of which every tick sends some."""
    b = bench()
    link, text = b.link(1), "s" * 3 * MEGABYTE
    link.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    link.post(text)
    assert not link.is_sent
    ticks = 0
    while not b.pump(lambda: 1 in b.hub.texts, 0.02):
        link.post("dropped, as the line before it is on its way")
        ticks += 1
    assert b.hub.texts[1] == text
    assert ticks > 1
    assert link.is_sent
    link.post("the next one")
    assert b.has(1, "the next one")


def test_half_a_line_is_no_status_until_the_rest_has_come(bench):
    b = bench()
    connection = b.raw(b"4711 1\nwhole\nha")
    assert b.has(1, "whole")
    b.pump(seconds=0.05)
    assert b.hub.texts == {1: "whole"}
    connection.sendall(b"lf\n")
    assert b.has(1, "half")
    connection.sendall(b"cut")
    connection.close()
    assert b.pump(lambda: b.hub.lost == {1})
    assert b.hub.texts == {1: "half"}


def test_a_peer_that_never_reads_blocks_nobody(bench):
    b = bench()
    deaf = b.raw(b"4711 2\n")
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    talks = threading.Thread(daemon=True, target=flood, args=(deaf, b"status\n" * 50000))
    talks.start()
    good = b.link(1)
    for number in range(20):
        good.post(f"{number}")
        assert b.has(1, f"{number}")
    talks.join(10)
    assert not talks.is_alive()
    began = time.monotonic()
    b.hub.say_verdict("v" * 8 * MEGABYTE)  # more than any buffer between them
    assert time.monotonic() - began < 1.0
    assert b.hub.lost == set()


def test_a_hub_that_never_reads_blocks_no_rank(bench):
    b = bench()
    link, began = b.link(1), time.monotonic()
    for _ in range(50):
        link.post("s" * MEGABYTE)
    assert time.monotonic() - began < 1.0
    assert not link.is_sent


def test_a_connection_that_is_closed_is_a_lost_rank(bench):
    b = bench()
    one, two = b.link(1), b.link(2)
    one.post("last word")
    assert b.has(1, "last word")
    b.selector.unregister(one.connection)
    one.connection.close()
    assert b.pump(lambda: b.hub.lost == {1})
    assert b.hub.texts[1] == "last word"
    two.post("still here")
    assert b.has(2, "still here")


def test_a_rank_hears_that_its_hub_is_gone(bench):
    b = bench()
    link = b.link(1)
    link.post("hello")
    assert b.has(1, "hello")
    assert b.pump(lambda: link.is_heard)
    for peer in list(b.hub._peers):
        b.selector.unregister(peer.connection)
        peer.connection.close()
    b.hub._peers.clear()
    assert b.pump(lambda: not link.is_heard)
    assert link.is_dead
    assert link.is_sent, "nothing is left to wait for"
    link.post("into the void")
    assert link.connection.fileno() not in b.selector.get_map()


def test_a_hub_that_has_said_goodbye_has_not_died(bench):
    b, process = bench(), processes.own()
    link = b.link(1)
    link.post("hello")
    assert b.has(1, "hello")
    b.hub.say_goodbye()
    for peer in list(b.hub._peers):
        b.selector.unregister(peer.connection)
        peer.connection.close()
    b.hub._peers.clear()
    assert b.pump(lambda: not link.is_heard)
    assert not link.is_dead
    assert Channel((4, 6, 7), 1, [process] * 3, None, [link]).dead() == ()


def test_ranks_that_served_are_dead_when_all_of_them_are(bench):
    process, links = processes.own(), [bench().link(2), bench().link(2)]
    channel = Channel((4, 6, 7), 2, [process] * 3, None, links)
    for link in links:
        assert channel.dead() == ()
        link._lines.broken = True
    assert channel.dead() == (4, 6)


def test_a_hub_that_is_silent_is_not_heard(bench, monkeypatch):
    link = bench().link(1)
    assert link.is_heard
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    assert not link.is_heard


def test_the_verdict_reaches_every_rank(bench):
    b = bench(5)
    links = [b.link(rank) for rank in range(1, 5)]
    for link in links:
        link.post("here")
    assert b.pump(lambda: len(b.hub.texts) == 4)
    b.hub.say_verdict('{"status": 124}')
    assert b.pump(lambda: all(link.verdict for link in links))
    process = processes.own()
    channel = Channel((0, 1), 1, [process, process], None, [links[0]])
    assert channel.verdict == {"status": 124}


def test_who_comes_after_the_verdict_hears_it_too(bench):
    b = bench()
    b.hub.say_verdict('{"status": 1}')
    late = b.link(2)
    late.post("here")
    assert b.pump(lambda: late.verdict == '{"status": 1}')


def test_two_hundred_ranks(bench):
    b = bench(201)
    links = [b.link(rank) for rank in range(1, 201)]
    for rank, link in enumerate(links, 1):
        link.post(f"rank {rank}")
    assert b.pump(lambda: len(b.hub.texts) == 200)
    assert b.hub.texts == {rank: f"rank {rank}" for rank in range(1, 201)}
    b.hub.say_verdict("{}")
    assert b.pump(lambda: all(link.verdict for link in links))


def test_a_hub_without_a_file_left_goes_on(bench, monkeypatch):
    """Too many open files: a connection that cannot be taken now must not end the thread of the watchdog."""
    b = bench()
    listener = b.hub.listener

    class Full:
        def accept(self):
            raise OSError(24, "Too many open files")

    b.hub.listener = Full()
    b.hub.accept(b.selector)
    b.hub.listener = listener
    b.link(1).post("later")
    assert b.has(1, "later")


def test_a_channel_posts_to_its_own_hub_and_to_others(bench):
    b, process = bench(2), processes.own()
    other = process._replace(host=process.host ^ 1)
    first = Channel((4, 6), 0, [process, other], b.hub, [])
    second = Channel((4, 6), 1, [process, other], None, [b.link(1)])
    first.post("of rank 4")
    second.post("of rank 6")
    assert b.has(1, "of rank 6")
    assert b.hub.texts == {0: "of rank 4", 1: "of rank 6"}
    assert first.verdict is None
    assert second.verdict is None
    assert (first.is_sent, first.is_heard, second.is_heard) == (True, True, True)
    assert (first.on_this_host(), second.on_this_host()) == ([0], [1])
    assert first.covers((4,))
    assert first.covers((6, 4))
    assert not first.covers((4, 5))


def test_a_port_where_nobody_listens_is_an_error_at_once():
    listener = listen(LOOPBACK)
    port = listener.getsockname()[1]
    listener.close()
    with pytest.raises(OSError, match="refused"):
        Link(LOOPBACK, port, KEY, 1)
