# SPDX-License-Identifier: BSD-3-Clause
"""The protocol of a meeting place: who connects must prove to be of the same job, and is told which one this is.

Each line is a JSON object. A guest sends a random number; the host answers with the name of its job, a number of its
own and the proof that it knows the job's secret; the guest sends who it is, and its proof. When all ranks are there,
the host tells each of them so. The secret itself is never sent.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import selectors
import socket
import time
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple, final

from syncbn.transports.identity import Identity
from syncbn.waits.ranks import named

MOST_STRANGERS = 8
"""Processes of other jobs that are named: each text must find a place in a line to the guests."""
_PROTOCOL = "syncbn-meeting-1"
_MOST = 4096
"""Bytes of a line. Whoever sends more is cut off."""
SILENCE = 3.0
"""Seconds in which a host answers. Another program may wait for ever for a request that it understands."""


class StrangerError(Exception):
    """What answered is not the host of this job; the text says what it is."""


class RefusedError(Exception):
    """The host of this job ends the meeting; the text says why."""


class Seat(NamedTuple):
    """The place of a process in its job."""

    identity: Identity
    rank: int
    size: int


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@final
class _Guest:
    """A connection to the host, before and after it has proved who it is."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.nonce, self.answer, self.heard = secrets.token_hex(16), "", b""
        self.rank: int | None = None
        self.process = ""

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the lines that have come; None if the connection is closed, or sends what no guest would."""
        try:
            data = self.connection.recv(_MOST)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self.heard = (self.heard + data).split(b"\n")
        if not data or len(self.heard) > _MOST:
            return None
        try:
            found = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):  # the latter of what is nested too deeply
            return None
        return found if all(isinstance(each, dict) for each in found) else None

    def send(self, **line: object) -> None:
        """Sends a line. A guest that cannot take one is gone, which the next receive() finds out."""
        with contextlib.suppress(OSError):
            self.connection.sendall(_line(line))


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"


@final
class Host:
    """Rank 0's side. The listener stays open, for whatever the caller does with it after the meeting.

    Args:
        listener: where the others connect.
        seat: of this process.
        warns: whether it warns of processes of other jobs; where they try several ports they come by no mistake.
    """

    def __init__(self, listener: socket.socket, seat: Seat, *, warns: bool) -> None:
        self._listener, self._seat, self._warns = listener, seat, warns
        self._guests: set[_Guest] = set()
        self._selector = selectors.DefaultSelector()
        self.strangers: list[str] = []
        """Who came and belongs to another job."""

    def gather(self, seconds: float) -> str:
        """Waits until every rank is here, and tells them so.

        Returns:
            A random word, the same on every rank.

        Raises:
            RuntimeError: if ranks are missing after these seconds, or two processes say that they are the same rank.
                The ranks that are here raise it too.
        """
        word, deadline = secrets.token_hex(8), time.monotonic() + seconds
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        try:
            while missing := self.missing():
                left = deadline - time.monotonic()
                if left <= 0:
                    self._end(self._too_late(missing, seconds))
                for key, _ in self._selector.select(left):
                    if key.data is None:
                        self._accept()
                    elif (lines := key.data.receive()) is None:
                        self._dismiss(key.data)
                    else:
                        self._answer(key.data, lines)
            for guest in self._seated():
                guest.send(welcome=word)
            return word
        finally:
            for guest in list(self._guests):
                self._dismiss(guest)
            self._selector.close()
            self._listener.setblocking(True)

    def missing(self) -> list[int]:
        """Returns the ranks that are not here."""
        return sorted(set(range(1, self._seat.size)) - {guest.rank for guest in self._guests})

    def _seated(self) -> list[_Guest]:
        return [guest for guest in self._guests if guest.rank is not None]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it has gone again, or this process has no file left
            guest = _Guest(self._listener.accept()[0])
            self._guests.add(guest)
            self._selector.register(guest.connection, selectors.EVENT_READ, guest)

    def _dismiss(self, guest: _Guest) -> None:
        self._guests.discard(guest)
        self._selector.unregister(guest.connection)
        guest.connection.close()

    def _answer(self, guest: _Guest, lines: Iterable[dict[str, Any]]) -> None:
        seat = self._seat
        for line in lines:
            if not guest.answer and line.get("protocol") == _PROTOCOL:
                guest.answer = seat.identity.proof(f"guest {guest.nonce}")
                proof = seat.identity.proof(f"host {line.get('nonce')}")
                told = {"job": str(seat.identity), "process": _process(), "nonce": guest.nonce, "proof": proof}
                guest.send(protocol=_PROTOCOL, **told)
            elif guest.answer and guest.rank is None and isinstance(line.get("rank"), int):
                self._seat_guest(guest, line)
            else:
                return self._dismiss(guest)
            if guest not in self._guests:
                return None
        return None

    def _seat_guest(self, guest: _Guest, line: dict[str, Any]) -> None:
        """Lets a guest stay that belongs to this job; says so if it does not."""
        seat, rank = self._seat, line["rank"]
        guest.process = str(line.get("process"))[:200]
        if line.get("proof") != guest.answer:
            text = ascii(f"rank {rank} of {str(line.get('job'))[:300]} ({guest.process})")[1:-1][:300]
            if text not in self.strangers and len(self.strangers) < MOST_STRANGERS:
                self.strangers.append(text)
                if self._warns:
                    warnings.warn(_knocked(seat, text), RuntimeWarning, stacklevel=4)
            return self._dismiss(guest)
        if line.get("size") != seat.size or rank not in range(seat.size):
            self._end(
                f"All ranks of a job need the same number of ranks; received {seat.size} on rank 0 ({_process()}) and "
                f"{line.get('size')} on rank {rank} ({guest.process}), both {seat.identity}. {_REMEDY}",
                guest,
            )
        twin = next((other.process for other in self._seated() if other.rank == rank), "" if rank else _process())
        if twin:
            self._end(
                f"Each process of a job needs a rank of its own; received rank {rank} from {twin} and from "
                f"{guest.process}, both {seat.identity}. {_REMEDY}",
                guest,
            )
        guest.rank = rank
        return None

    def _end(self, why: str, late: _Guest | None = None) -> None:
        for guest in [*self._seated(), *([] if late is None else [late])]:
            guest.send(refused=why)
        raise RuntimeError(why)

    def _too_late(self, missing: list[int], seconds: float) -> str:
        came = f" Of other jobs came {'; '.join(self.strangers)}." if self.strangers else ""
        address, port = self._listener.getsockname()[:2]
        return (
            f"All {self._seat.size} ranks of {self._seat.identity} must meet within {math.ceil(seconds)} s; "
            f"{named(missing)} did not come to {address} port {port} ({_process()}).{came} "
            "Look for a process that ended or never started; on several hosts, for a firewall between them."
        )


_REMEDY = (
    "Two jobs may have met at one port: give each a MASTER_PORT of its own, or a text of its own in SYNCBN_JOB, "
    "the same on all its ranks."
)


def _knocked(seat: Seat, text: str) -> str:
    return (
        f"rank 0 of {seat.identity} ({_process()}) sent away a process of another job: {text}. "
        "If it should belong to this one, give all ranks the same SYNCBN_JOB."
    )


def enter(address: str, port: int, seat: Seat, deadline: float) -> str:
    """Another rank's side: connects, proves who it is, and waits until every rank is there.

    Args:
        address: of the host.
        port: of the host.
        seat: of this process.
        deadline: when it gives up, on the clock of ``time.monotonic``. The host gives up before and says so.

    Returns:
        The host's random word.

    Raises:
        OSError: if nothing listens there, or the host has gone.
        StrangerError: if something else listens there.
        RefusedError: if the host ends the meeting.
    """
    left = max(0.1, min(SILENCE, deadline - time.monotonic()))
    with socket.create_connection((address, port), timeout=left) as connection, connection.makefile("rb") as stream:
        nonce = secrets.token_hex(16)
        greeting = _greeted(connection, stream, nonce)
        mine = seat.identity.proof(f"guest {greeting['nonce']}")
        who = {"rank": seat.rank, "size": seat.size, "process": _process(), "job": str(seat.identity)}
        connection.sendall(_line({**who, "proof": mine}))
        if greeting.get("proof") != seat.identity.proof(f"host {nonce}"):
            raise StrangerError(f"rank 0 of {greeting.get('job')} ({greeting.get('process')})")
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        answer = _read(stream)
        if "refused" in answer:
            raise RefusedError(str(answer["refused"]))
        if not isinstance(answer.get("welcome"), str):
            raise ConnectionResetError("rank 0 of this job was there and has gone")
        return str(answer["welcome"])


def _greeted(connection: socket.socket, stream: Any, nonce: str) -> dict[str, Any]:
    """Returns what a host answers first."""
    try:
        connection.sendall(_line({"protocol": _PROTOCOL, "nonce": nonce}))
        greeting = _read(stream)
    except OSError:
        greeting = {}
    if greeting.get("protocol") != _PROTOCOL:
        raise StrangerError("another program, or a job whose ranks have met already")
    return greeting


def _read(stream: Any) -> dict[str, Any]:
    try:
        line = json.loads(stream.readline(_MOST))
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def owner(address: str, port: int, seat: Seat) -> str:
    """Asks who listens at the port that rank 0 of this job wants, and tells it so.

    Raises:
        RefusedError: if it says that it is rank 0 of this very job.
    """
    try:
        enter(address, port, seat, time.monotonic() + SILENCE)
    except StrangerError as error:
        return str(error)
    except OSError as error:
        return str(error)
    return "another program"
