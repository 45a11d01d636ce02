# SPDX-License-Identifier: BSD-3-Clause
"""Where processes meet to connect torch.distributed: the store of MASTER_ADDR, or one that MPI makes known.

What cannot work is an error on every rank that can hear of it, not a wait. What listens here listens at one address.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch

from syncbn.transports import addresses, gather, interfaces, launchers, reach
from syncbn.transports.addresses import Offer
from syncbn.transports.base import AbstractTransport
from syncbn.waits.channel import LOOPBACK, listen

ADDRESS, PORT = addresses.MASTER, "MASTER_PORT"
_AGENT = "TORCHELASTIC_USE_AGENT_STORE"
_RECHECK = 10.0
"""Seconds for which rank 0 has just listened: no host may be silent for longer."""
_FAREWELL = 3.0
"""Seconds for which rank 0 leaves an error to the others."""
_LATER = timedelta(seconds=15)
"""By how much the other ranks wait longer than rank 0, which knows who is missing."""


def master() -> tuple[str, int]:
    """Returns where the processes meet.

    Raises:
        ValueError: if a variable is missing or no number.
    """
    missing = [name for name in (ADDRESS, PORT) if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"torch.distributed needs {ADDRESS} and {PORT} to connect processes; received no "
            f"{' and no '.join(missing)}. Export the address of rank 0's host and a free port of it, the same ones for "
            "every rank."
        )
    return os.environ[ADDRESS], launchers.number(os.environ, PORT)


def open_store(rank: int, size: int, timeout: timedelta) -> Any:
    """Opens the key-value store at MASTER_ADDR and MASTER_PORT. Rank 0 serves it, unless torchrun does.

    Raises:
        ValueError: see :func:`master`.
        RuntimeError: if the name is unknown on this host, or nobody answers or listens there in time.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    name, port = master()
    address = reach.resolve(name, ADDRESS)
    if os.environ.get(_AGENT) != str(True):
        address = _seen_by_others(name, address)
        if rank == 0:
            return _serve(address, port, size, timeout)
    remedy = (
        f"Set {ADDRESS} to an address of rank 0's host that this host reaches, the same for every rank, or open {PORT} "
        "in the firewall. `syncbn doctor`, started in the same way, says what each host offers."
    )
    reach.wait_for(address, port, what="rank 0", remedy=remedy, limit=timeout.total_seconds())
    return TCPStore(address, port, size, False, timeout, wait_for_workers=False)


def _seen_by_others(name: str, address: str) -> str:
    """Replaces a loopback address that is Debian's for a host's own name: on other hosts it would be themselves."""
    literal = name in ("localhost", address)
    outward = interfaces.ordered()
    if literal or not interfaces.is_loopback(address) or not outward:
        return address
    launch = launchers.detect()
    alone = "LOCAL_WORLD_SIZE" in os.environ and launch.local_size == launch.size
    return address if alone else outward[0].address


def _serve(address: str, port: int, size: int, timeout: timedelta) -> Any:
    """Listens at one address, not at all of this host's, unless the address is another's, who passes connections on."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listener: int | None = None
    try:
        listener = listen(address, port, 1024).detach()
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            raise
        address = address if error.errno == errno.EADDRINUSE else LOOPBACK
    try:  # several groups of one process use one server: torch finds the one that listens on this port
        return TCPStore(address, port, size, True, timeout, False, True, listener)
    except RuntimeError as error:
        raise RuntimeError(
            f"Rank 0 must listen at {address} port {port}; received: {error}. If another program or another job of "
            f"this host has the port, set {PORT} to a free one, the same for every rank."
        ) from error


def store_over_mpi(transport: AbstractTransport, timeout: timedelta) -> Any:
    """Rank 0 listens on a free port, at the address by which the others reach it. MPI makes it known.

    Communication:
        Two all-reduces of texts, a broadcast of a number, and one all-reduce of 8 values.

    Raises:
        RuntimeError: on every rank, if some rank does not reach the address.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    own = addresses.own()
    notes = gather.gather_notes(own.text(), transport)
    offers = [Offer.read(note) for note in notes]
    _raise_errors(offers, transport.ranks)
    address = addresses.agree(offers)[0]
    error: RuntimeError | None = None
    listener: socket.socket | None = None
    port = torch.zeros(1, dtype=torch.int64, device="cpu")
    try:
        if transport.rank == 0:
            listener = listen(address, 0, 1024)
            port.fill_(listener.getsockname()[1])
    except OSError as failed:
        error = RuntimeError(f"rank 0 cannot listen at {address}: {failed}")
    transport.broadcast(port)
    try:
        if transport.rank > 0 and int(port):
            remedy = (
                f"Open the ports between the hosts, or name the interface of the job by {addresses.GLOO_INTERFACE}."
            )
            reach.wait_for(address, int(port), what="rank 0", remedy=remedy, limit=_RECHECK, silent=_RECHECK)
    except RuntimeError as failed:
        error = failed
    gather.raise_together(error, transport, "syncbn.init")
    if listener is None:
        return TCPStore(address, int(port), transport.size, False, timeout)
    return TCPStore(address, int(port), transport.size, True, timeout, master_listen_fd=listener.detach())


def settle(store: Any, rank: int, size: int, timeout: timedelta) -> None:
    """Lets gloo listen at an address that the other hosts reach, the same way on every rank.

    Communication:
        Each rank writes one text to the store. Rank 0 reads all of them and writes its choice, which all read.

    Raises:
        RuntimeError: on every rank, if some did not come in time, if ``GLOO_SOCKET_IFNAME`` names no interface, or if a
            host has no address.
    """
    own = addresses.own()
    store.set(f"offer/{rank}", own.text())
    if rank == 0:
        store.set("choice", json.dumps(_choose(store, size, timeout)))
    try:
        store.wait(["choice"], timeout + _LATER)
    except RuntimeError as error:
        raise RuntimeError(
            f"Rank {rank} on {socket.gethostname()} has met rank 0, and waits for it to choose the addresses; received "
            f"nothing within {(timeout + _LATER).total_seconds():.0f} s ({error}). Look for its error."
        ) from error
    choice = json.loads(store.get("choice"))
    if choice["error"]:
        _let_others_read(store, rank, size)
        raise RuntimeError(choice["error"])
    addresses.tell_gloo(choice["addresses"][own.host])


def _let_others_read(store: Any, rank: int, size: int) -> None:
    """Lets rank 0 wait until the others have read the error, since its store may end with it."""
    end = time.monotonic() + _FAREWELL
    heard = store.add("heard", 1)
    while rank == 0 and heard < size and time.monotonic() < end:
        time.sleep(0.05)
        heard = store.add("heard", 0)


def _choose(store: Any, size: int, timeout: timedelta) -> dict[str, Any]:
    """Returns the address of each host, or an error."""
    keys = [f"offer/{rank}" for rank in range(size)]
    try:
        store.wait(keys, timeout)
    except RuntimeError:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        return {"error": _never_came(missing, size, timeout)}
    offers = [Offer.read(store.get(key).decode()) for key in keys]
    try:
        _raise_errors(offers, tuple(range(size)))
        chosen = addresses.agree(offers)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": "", "addresses": dict(zip((offer.host for offer in offers), chosen, strict=True))}


def _never_came(missing: list[str], size: int, timeout: timedelta) -> str:
    name, port = master() if os.environ.get(ADDRESS) and os.environ.get(PORT) else ("rank 0's host", 0)
    who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing[:50])}{' and others' if len(missing) > 50 else ''}"
    return (
        f"All {size} ranks must come to rank 0 at {name}{f' port {port}' if port else ''}; received nothing from {who} "
        f"within {timeout.total_seconds():.0f} s. Look for a process that ended or never started, or a host that does "
        f"not reach this address: it says so itself."
    )


def _raise_errors(offers: list[Offer], ranks: tuple[int, ...]) -> None:
    errors = [offer.error for offer in offers]
    if any(errors):
        raise RuntimeError(gather.by_rank(errors, ranks, skip_empty=True, joint=" | "))
