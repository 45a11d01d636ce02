# SPDX-License-Identifier: BSD-3-Clause
"""Attempts to reach an address, each with a limit, and what its failure means."""

from __future__ import annotations

import errno
import socket
import sys
import time

from syncbn.transports import interfaces

ATTEMPT = 3.0
"""Seconds of one attempt to connect."""
UNANSWERED = 15.0
"""Seconds for which a host may not answer: one that starts may come up late."""
UNKNOWN = 60.0
"""Seconds for which a name may be unknown: in a cluster, names of hosts that start come late."""
NOTICE = 3.0
"""Seconds after which a process says what name it waits for."""
REACHED, REFUSED, SILENT = "reached", "refused", "no answer"


def attempt(address: str, port: int, limit: float = ATTEMPT) -> str:
    """Connects once. Returns REACHED, REFUSED (the host answers, and nobody listens) or SILENT."""
    try:
        socket.create_connection((address, port), limit).close()
    except ConnectionRefusedError:
        return REFUSED
    except OSError as error:
        return REFUSED if error.errno == errno.ECONNRESET else SILENT
    return REACHED


def resolve(name: str, variable: str, limit: float = UNKNOWN) -> str:
    """Returns the address of a host's name.

    Raises:
        RuntimeError: if the name is still unknown after the limit.
    """
    end, notice = time.monotonic() + limit, time.monotonic() + NOTICE
    while True:
        try:
            return interfaces.of_name(name)[0]
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"{variable} must be an address of rank 0's host, or a name that means one on every host; received "
                    f"{name!r}, which means nothing on {socket.gethostname()} ({error}). Set {variable} to the address "
                    "itself: `ip -br address` prints it on rank 0's host."
                ) from error
            if time.monotonic() > notice:
                notice = end
                sys.stderr.write(
                    f"syncbn: {variable} is {name!r}, which means nothing on {socket.gethostname()} ({error}); waiting "
                    f"up to {limit:g} s for it.\n"
                )
        time.sleep(0.5)


def require_answer(address: str, port: int, what: str, remedy: str, limit: float = UNANSWERED) -> None:
    """Raises unless a host answers at an address. It may refuse the port: who is to listen there may come later.

    Args:
        address: the address.
        port: the port.
        what: who listens there, for the error.
        remedy: the last sentence of the error.
        limit: seconds for which the host may be silent.

    Raises:
        RuntimeError: if the limit is over.
    """
    began = time.monotonic()
    while attempt(address, port) == SILENT:
        if time.monotonic() - began > limit:
            here, source = socket.gethostname(), interfaces.toward(address)
            here += f" ({source})" if source else ", which has no route to it"
            raise RuntimeError(
                f"Every host must reach {what} at {address} port {port}; received no answer within {limit:g} s on "
                f"{here}: a firewall, a host that is down, or an address of another network. {remedy}"
            )
        time.sleep(0.2)
