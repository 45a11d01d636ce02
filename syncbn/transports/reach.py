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
UNKNOWN = 10.0
"""Seconds for which a name may be unknown: in a cluster, names of hosts that start come late."""
NOTICE = 10.0
"""Seconds after which a line says for whom this process waits."""
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
    end = time.monotonic() + limit
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
        time.sleep(0.5)


def wait_for(address: str, port: int, *, what: str, remedy: str, limit: float, silent: float = UNANSWERED) -> None:
    """Waits until somebody listens at an address.

    Args:
        address: the address.
        port: the port.
        what: who listens there, for errors.
        remedy: the last sentence of the errors.
        limit: seconds for which the host may refuse: nobody listens there yet.
        silent: seconds for which the host may not answer at all.

    Raises:
        RuntimeError: if a limit is over.
    """
    began = time.monotonic()
    answered, told = began, False
    while (found := attempt(address, port)) != REACHED:
        now = time.monotonic()
        if found == REFUSED:
            answered = now
        if now - answered > silent or now - began > limit:
            raise RuntimeError(_unreached(found, address, port, what, remedy, now - began))
        if now - began > NOTICE and not told:
            told = True
            sys.stderr.write(f"syncbn: {socket.gethostname()} waits for {what} at {address} port {port}: {found}\n")
        time.sleep(0.2)


def _unreached(found: str, address: str, port: int, what: str, remedy: str, seconds: float) -> str:
    why = "no answer (a firewall, a host that is down, or an address of another network)"
    if found == REFUSED:
        why = "refused (nobody listens there)"
    source = interfaces.toward(address)
    where = f"{socket.gethostname()} ({source})" if source else f"{socket.gethostname()}, which has no route to it"
    return (
        f"Every host must reach {what} at {address} port {port}; received within {seconds:.0f} s on {where}: {why}. "
        f"{remedy}"
    )
