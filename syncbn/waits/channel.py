# SPDX-License-Identifier: BSD-3-Clause
"""The side channel: TCP connections, beside whatever hangs, by which every rank tells its status.

Every rank tells it to two ranks of the group, on two hosts if there are several. If one of them is stopped or gone, or
its host is lost, the other one still knows.
All sockets are used by the watchdog's thread alone, and none of them blocks. A line is a message: a status to the hub,
a dot, a verdict or a goodbye back.

W ranks.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Sequence
from typing import Any, final

from syncbn.waits.limits import TICK
from syncbn.waits.lines import UNREACHABLE, Lines, listen
from syncbn.waits.processes import Process

__all__ = ["LOOPBACK", "Channel", "Hub", "Link", "listen", "servers"]
LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 20.0
_HEARD, _VERDICT, _GOODBYE = b".", b"V", b"E"
_PAUSE = 0.05
"""Seconds after a connection that could not be taken."""


def servers(hosts: Sequence[int]) -> tuple[int, ...]:
    """Returns which ranks of a group serve hubs: the first one, and one of another host if there is any.

    Args:
        hosts: a number for the host of each rank.
    """
    other = next((rank for rank, host in enumerate(hosts) if host != hosts[0]), 1)
    return (0, other) if len(hosts) > 1 else (0,)


@final
class Hub:
    """What a rank that serves hears from the others.

    Args:
        listener: where they connect.
        key: what they must say first.
        size: W.
    """

    def __init__(self, listener: socket.socket, key: str, size: int) -> None:
        listener.setblocking(False)
        self.listener, self._key, self._size = listener, key.encode(), size
        self.texts: dict[int, str] = {}
        """The last status of each rank, by its rank in the group."""
        self.lost: set[int] = set()
        """Ranks whose connection is closed."""
        self._cut: dict[int, Lines] = {}
        """Connections that the network has broken, by rank."""
        self._peers: dict[Lines, int | None] = {}
        self.verdict = ""

    def say_verdict(self, verdict: str) -> None:
        """Tells every rank why the job ends."""
        self.verdict = verdict
        for peer in self._peers:
            peer.send(_VERDICT + verdict.encode())

    def say_goodbye(self) -> None:
        """Tells every rank that this process comes to its end, by no fault. Else they take it for dead."""
        for peer in self._peers:
            peer.send(_GOODBYE)

    def beat(self, seconds: float) -> None:
        """Gives every rank a sign of life, and counts for how long their hosts have not answered.

        Args:
            seconds: since the last one.
        """
        for peer in [*self._peers, *self._cut.values()]:
            peer.count(seconds)  # before anything new is on its way
            if not self.verdict:
                peer.send(_HEARD)

    def unanswered(self) -> dict[int, float]:
        """Returns the ranks whose host is unreachable, and for how many seconds it has been."""
        found = {rank: peer for peer, rank in self._peers.items() if rank is not None} | self._cut
        return {rank: peer.unanswered for rank, peer in found.items() if peer.unanswered >= UNREACHABLE}

    def accept(self, selector: selectors.BaseSelector) -> None:
        """Takes new connections."""
        try:
            while True:
                peer = Lines(self.listener.accept()[0])
                self._peers[peer] = None
                selector.register(peer.connection, selectors.EVENT_READ, (self.hear, peer))
        except BlockingIOError:
            pass
        except OSError:  # it has gone again, or this process has no file left: another time
            time.sleep(_PAUSE)

    def hear(self, peer: Lines, selector: selectors.BaseSelector) -> None:
        """Reads what has come from a rank."""
        for line in peer.receive():
            rank = self._peers[peer]
            if rank is None:
                key, _, said = line.partition(b" ")
                if key != self._key or not said.isdigit() or int(said) >= self._size:
                    peer.broken = True
                    break
                self._peers[peer] = int(said)
            else:
                self.texts[rank] = line.decode(errors="replace")
                peer.send(_VERDICT + self.verdict.encode() if self.verdict else _HEARD)
        if peer.broken:
            rank = self._peers.pop(peer)
            if rank is not None and peer.is_cut:
                self._cut[rank] = peer
            elif rank is not None:
                self.lost.add(rank)
            selector.unregister(peer.connection)
            peer.connection.close()


@final
class Link:
    """This rank's connection to a hub of another process."""

    def __init__(self, address: str, port: int, key: str, rank: int) -> None:
        self._lines = Lines(socket.create_connection((address, port), CONNECT_SECONDS))
        self._lines.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines.send(f"{key} {rank}".encode())
        self._answered = time.monotonic()
        self._left = False
        self.verdict = ""

    @property
    def connection(self) -> socket.socket:
        """The socket."""
        return self._lines.connection

    @property
    def is_sent(self) -> bool:
        """Whether the hub's host has taken all that was said."""
        return self._lines.is_sent

    @property
    def is_heard(self) -> bool:
        """Whether the hub answers."""
        return not self._lines.broken and time.monotonic() - self._answered < 8 * TICK

    @property
    def is_dead(self) -> bool:
        """Whether the hub's process is gone without a goodbye."""
        return self._lines.broken and not self._left and not self._lines.is_cut

    @property
    def unanswered(self) -> float:
        """Seconds for which the hub's host has not answered."""
        return self._lines.unanswered

    def count(self, seconds: float) -> None:
        """Counts them; to be called regularly, with the seconds since the last time."""
        self._lines.count(seconds)

    def post(self, text: str) -> None:
        """Tells the hub this rank's status."""
        self._lines.send(text.encode())

    def hear(self, selector: selectors.BaseSelector) -> None:
        """Reads what has come from the hub."""
        for line in self._lines.receive():
            self._answered = time.monotonic()
            if line.startswith(_VERDICT):
                self.verdict = line[len(_VERDICT) :].decode()
            self._left = self._left or line == _GOODBYE
        if self._lines.broken:
            selector.unregister(self.connection)


@final
class Channel:
    """The hubs of a group, as one of its ranks uses them.

    Args:
        ranks: the members, by their rank in the whole job, in group order.
        rank: of this process in the group.
        processes: of all members.
        hub: of this process, or None.
        links: to the hubs of others.
        hosts: the name of each member's host; empty if all are on one host.
    """

    def __init__(
        self,
        ranks: tuple[int, ...],
        rank: int,
        processes: list[Process],
        hub: Hub | None,
        links: list[Link],
        hosts: Sequence[str] = (),
    ) -> None:
        self.ranks, self.rank, self.processes = ranks, rank, processes
        self.hub, self.links, self.hosts = hub, links, hosts
        self.servers = servers([process.host for process in processes])
        """The members that have hubs, by their rank in the group."""

    def register(self, selector: selectors.BaseSelector) -> None:
        """Lets a selector wait for what the others say. Its data are a function of the selector, and an argument."""
        if self.hub is not None:
            selector.register(self.hub.listener, selectors.EVENT_READ, (self.hub.accept,))
        for link in self.links:
            selector.register(link.connection, selectors.EVENT_READ, (link.hear,))

    def post(self, text: str) -> None:
        """Tells this rank's status to every hub."""
        if self.hub is not None:
            self.hub.texts[self.rank] = text
        for link in self.links:
            link.post(text)

    def count(self, seconds: float) -> None:
        """Counts for how long hosts have not answered; to be called after ``post``, with the seconds since then."""
        if self.hub is not None:
            self.hub.beat(seconds)
        for link in self.links:
            link.count(seconds)

    def host(self, rank: int) -> str:
        """Returns the name of a member's host, by its rank in the group; empty if all are on one host."""
        return self.hosts[rank] if self.hosts else ""

    @property
    def unanswered(self) -> float:
        """Seconds for which no host of a hub has answered: this host is cut off, or those are lost. 0 if one has."""
        found = 0.0 if self.hub is not None else min((link.unanswered for link in self.links), default=0.0)
        return found if found >= UNREACHABLE else 0.0

    @property
    def is_sent(self) -> bool:
        """Whether all that was posted is on its way, or cannot be sent."""
        return all(link.is_sent for link in self.links)

    @property
    def verdict(self) -> dict[str, Any] | None:
        """Why the job ends, or None."""
        found = next((link.verdict for link in self.links if link.verdict), "")
        return None if not found else json.loads(found)

    @property
    def is_heard(self) -> bool:
        """Whether a rank that looks at all of them can be reached."""
        return self.hub is not None or any(link.is_heard for link in self.links)

    def dead(self) -> tuple[int, ...]:
        """Returns the ranks that served hubs if all of them have died, by their rank in the whole job; else none."""
        dead = self.hub is None and all(link.is_dead for link in self.links)
        return tuple(self.ranks[server] for server in self.servers) if dead else ()

    def covers(self, ranks: tuple[int, ...]) -> bool:
        """Whether all of these ranks are members."""
        return set(ranks) <= set(self.ranks)

    def on_this_host(self) -> list[int]:
        """Returns the members on this host, by their rank in the group."""
        own = self.processes[self.rank].host
        return [rank for rank, process in enumerate(self.processes) if process.host == own]
