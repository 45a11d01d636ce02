# SPDX-License-Identifier: BSD-3-Clause
"""Where the processes of a job meet for the first time, and how they make sure that they are of one job.

Rank 0 listens and the others connect, see ``gate.py``. Then torch's store takes over the port.
"""

from __future__ import annotations

import hashlib
import socket
import time
from datetime import timedelta
from typing import Any, NamedTuple

from syncbn.transports.identity import Identity
from syncbn.world import gate
from syncbn.world.gate import RefusedError, Seat, StrangerError

LOOPBACK = "127.0.0.1"
PORTS = 8
"""How many ports a job tries where nobody has chosen one."""
_RANGE = range(20000, 32768)
"""Of them: below Linux's ports for outgoing connections, of which any may be taken at any time."""
PATIENCE = 10.0
"""Seconds for which a port that somebody has chosen may belong to another job, such as one that is about to end."""
_PAUSE, _LONGEST_PAUSE = 0.02, 0.25


class Place(NamedTuple):
    """Where a job meets."""

    address: str
    ports: tuple[int, ...]
    listener: socket.socket | None = None
    """Of rank 0, if it has one already."""
    bind: str = ""
    """The address of this host on which rank 0 listens; "" for all."""

    @property
    def is_chosen(self) -> bool:
        """Whether there is one port, so that another job at it is an error."""
        return len(self.ports) == 1

    def __str__(self) -> str:
        """Returns where to look for it."""
        return f"{self.address} port{'s' * (len(self.ports) > 1)} {', '.join(map(str, self.ports))}"


def ports_of(identity: Identity) -> tuple[int, ...]:
    """Returns the ports that a job tries, one after the other: the same on every rank, others in another job."""
    drawn = (hashlib.sha256(f"{identity.name} {i}".encode()).digest() for i in range(PORTS))
    return tuple(dict.fromkeys(_RANGE[int.from_bytes(digest[:8]) % len(_RANGE)] for digest in drawn))


def meet(place: Place, seat: Seat, timeout: timedelta) -> Any:
    """Meets the other ranks, and returns torch's store for them.

    Args:
        place: where.
        seat: of this process in its job.
        timeout: how long this may take, and what the store waits for.

    Communication:
        Collective over all processes of the job: one TCP connection from each to rank 0, and then those of the store.

    Raises:
        RuntimeError: if the port belongs to another job or program, or ranks are missing after the time. The ranks that
            have met raise it alike.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    if seat.rank:
        port, word = _enter(place, seat, timeout.total_seconds())
        store = TCPStore(place.address, port, seat.size, False, timeout, wait_for_workers=False)
    else:
        listener, left = _listener(place, seat, timeout.total_seconds())
        try:
            port, word = listener.getsockname()[1], gate.Host(listener, seat, warns=place.is_chosen).gather(left)
        except BaseException:
            listener.close()
            raise
        # multi_tenant: a program may open torch's own store at this port, too, in this process
        store = TCPStore(
            place.address,
            port,
            seat.size,
            True,
            timeout,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listener.detach(),
        )
    # Whoever reaches the store without having met does not know the word, so its keys are not ours.
    return PrefixStore(f"syncbn/{word}", store)


def listen(address: str, port: int, backlog: int = 128) -> socket.socket:
    """Opens a socket that listens on a port of an address; port 0 for a free one, "" for all of this host's."""
    both = not address and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=backlog, dualstack_ipv6=both)


def _listener(place: Place, seat: Seat, seconds: float) -> tuple[socket.socket, float]:
    """Returns rank 0's listener at the first port that is free, and the seconds that are left."""
    began = time.monotonic()
    if place.listener is not None:
        return place.listener, seconds
    patience = min(PATIENCE, seconds) if place.is_chosen else seconds
    pause, taken = _PAUSE, dict[int, str]()
    while True:
        for port in place.ports:
            try:
                return listen(place.bind, port, max(128, seat.size)), seconds - (time.monotonic() - began)
            except OSError as error:
                if port not in taken:
                    taken[port] = _owner(place, port, seat, error)
        if time.monotonic() - began > patience:
            raise RuntimeError(
                f"Rank 0 of {seat.identity} needs to listen at {place}; received for {patience:g} s that it is in use: "
                f"{_by_port(taken)}. {_remedy(place)}"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _owner(place: Place, port: int, seat: Seat, error: OSError) -> str:
    if not place.is_chosen:
        return str(error)
    try:
        return gate.owner(place.address, port, seat)
    except RefusedError as twin:
        raise RuntimeError(str(twin)) from None


def _enter(place: Place, seat: Seat, seconds: float) -> tuple[int, str]:
    """Returns the port at which rank 0 of this job is, and its word."""
    began = time.monotonic()
    deadline = began + seconds + gate.SILENCE  # rank 0 knows who is missing, so it speaks first
    pause, met, foreign = _PAUSE, dict[int, str](), None
    while time.monotonic() < deadline:
        for port in place.ports:
            try:
                return port, gate.enter(place.address, port, seat, deadline)
            except StrangerError as error:
                met[port] = str(error)
                foreign = time.monotonic() if foreign is None else foreign
            except RefusedError as error:
                raise RuntimeError(str(error)) from None
            except OSError as error:
                met.setdefault(port, str(error))
                foreign = None
        if place.is_chosen and foreign is not None and time.monotonic() - foreign > min(PATIENCE, seconds):
            raise RuntimeError(
                f"Rank {seat.rank} of {seat.identity} must meet rank 0 of its own job at {place}; received "
                f"{_by_port(met)}. {_remedy(place)}"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    raise RuntimeError(
        f"Rank {seat.rank} of {seat.identity} must meet rank 0 of its own job within {seconds:g} s; received "
        f"{_by_port(met)}, at {place}. Look for a rank 0 that ended or never started; on several hosts, for a "
        "firewall, and whether MASTER_ADDR names the host of rank 0."
    )


def _by_port(found: dict[int, str]) -> str:
    texts: dict[str, list[int]] = {}
    for port, text in found.items():
        texts.setdefault(text, []).append(port)
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{text} at {', '.join(map(str, ports))}" for text, ports in texts.items())


def _remedy(place: Place) -> str:
    if not place.is_chosen:
        return "Set MASTER_ADDR and MASTER_PORT to a free port of rank 0's host."
    return (
        "Give each job a MASTER_PORT of its own. If both are one job, give all its ranks the same SYNCBN_JOB, and the "
        "same launcher."
    )
