# SPDX-License-Identifier: BSD-3-Clause
"""A connection of the side channel: lines of text, sent and received without waiting; and whether its host answers."""

from __future__ import annotations

import errno
import socket
import struct

UNREACHABLE = 3.0
"""Seconds without an answer after which a host counts as unreachable. A wait still lasts until its limit."""
_CUT = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
_MOST = 2**22
"""Bytes of a line. Whoever sends more is cut off."""
_TCP_INFO = struct.Struct("8x13I")
"""Linux's struct tcp_info up to tcpi_last_ack_recv."""
_UNACKED, _LAST_ACK = 4, 12
_LATE = 1000
"""Milliseconds after which an acknowledgment is late."""


def listen(address: str, port: int = 0, backlog: int = 128) -> socket.socket:
    """Opens a socket that listens on a port of an address; port 0 for a free one."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(backlog)
    return listener


class Lines:
    """A connection, read and written without waiting."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection, self.broken = connection, False
        self.is_cut = False
        """Whether it is broken because the network no longer reaches the other host."""
        self.unanswered = 0.0
        """Seconds for which the other host has acknowledged nothing, although something is on its way to it.

        The system of a host acknowledges what it receives, also where the process is stopped or holds Python's lock.
        """
        self._in, self._out = b"", b""

    def send(self, line: bytes) -> None:
        """Sends a line, unless the one before it is still on its way: the peer does not read, and gets a later one."""
        if not self._out:
            self._out = line + b"\n"
        self.flush()

    def flush(self) -> None:
        """Sends what is left of a line."""
        try:
            while self._out and not self.broken:
                self._out = self._out[self.connection.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._break(error)

    @property
    def is_sent(self) -> bool:
        """Whether nothing is left to send, or never will be."""
        return self.broken or not self._out

    def receive(self) -> list[bytes]:
        """Returns the lines that have come."""
        try:
            while data := self.connection.recv(65536):
                self._in += data
                if len(self._in) > _MOST:
                    break
            self.broken = True  # the peer has closed the connection, or sends what no rank would
        except BlockingIOError:
            pass
        except OSError as error:
            self._break(error)
        *lines, self._in = self._in.split(b"\n")
        return lines

    def count(self, seconds: float) -> None:
        """Counts for how long the other host has not answered. To be called regularly, after something was sent."""
        self.unanswered = self.unanswered + seconds if self.is_cut or self._awaits_acknowledgment() else 0.0

    def _awaits_acknowledgment(self) -> bool:
        if self.broken or not hasattr(socket, "TCP_INFO"):
            return False
        try:
            info = self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
            fields = _TCP_INFO.unpack(info)
        except (OSError, struct.error):
            return False
        return bool(fields[_UNACKED] > 0 and fields[_LAST_ACK] > _LATE)

    def _break(self, error: OSError) -> None:
        self.broken, self.is_cut = True, error.errno in _CUT
