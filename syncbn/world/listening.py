# SPDX-License-Identifier: BSD-3-Clause
"""At which address the processes of a job listen, and whether the others reach it.

What cannot work is an error on every rank that can hear of it, not a wait.
"""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta
from typing import Any

from syncbn.transports import addresses, gather, interfaces, launchers, reach
from syncbn.transports.addresses import Offer
from syncbn.transports.base import AbstractTransport
from syncbn.waits.ranks import named

ADDRESS, PORT = addresses.MASTER, "MASTER_PORT"
_AGENT = "TORCHELASTIC_USE_AGENT_STORE"
_FAREWELL = 3.0
"""Seconds for which rank 0 leaves an error to the others."""
_LATER = timedelta(seconds=15)
"""By how much the other ranks wait longer than rank 0, which knows who is missing."""
_REMEDY = (
    f"Set {ADDRESS} to an address of rank 0's host that this host reaches, the same for every rank, or open the port "
    "in the firewall. `syncbn doctor`, started in the same way, says what each host offers."
)


def port() -> int:
    """Returns MASTER_PORT.

    Raises:
        ValueError: if it is no port.
    """
    text = os.environ.get(PORT, "")
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ValueError(f"{PORT} must be a port from 1 to 65535; received {text!r}. Set it to a free one.")
    return int(text)


def agent_serves() -> bool:
    """Whether torchrun's agent serves the store."""
    return os.environ.get(_AGENT) == str(True)


def agent_store(timeout: timedelta) -> Any:
    """Opens the store of torchrun's agent.

    Raises:
        RuntimeError: if the agent's address is unknown on this host, or nobody answers or listens there in time.
    """
    from torch.distributed import rendezvous  # type: ignore[attr-defined]

    if agent_serves():
        require_answer(reach.resolve(os.environ.get(ADDRESS, ""), ADDRESS), port())
    return next(iter(rendezvous("env://", timeout=timeout)))[0]


def address_of(name: str) -> str:
    """Returns the address by which all ranks reach rank 0's host, from what MASTER_ADDR says.

    A loopback address is replaced where it is Debian's for a host's own name: on other hosts it would be themselves.
    """
    address = reach.resolve(name, ADDRESS)
    launch, outward = launchers.detect(), interfaces.ordered()
    if name in ("localhost", address) or not interfaces.is_loopback(address) or not outward:
        return address
    alone = "LOCAL_WORLD_SIZE" in os.environ and launch.local_size == launch.size
    return address if alone else outward[0].address


def is_own(address: str) -> bool:
    """Whether this host has an address. It has not where another one passes connections on to it."""
    return interfaces.is_loopback(address) or address in [each.address for each in interfaces.interfaces()]


def require_answer(address: str, number: int) -> None:
    """Raises unless rank 0's host answers at an address within some seconds. It may refuse: rank 0 comes later.

    Raises:
        RuntimeError: with the address and what to set.
    """
    reach.require_answer(address, number, "rank 0", _REMEDY)


def address_over(transport: AbstractTransport) -> str:
    """Returns the address at which all ranks of a transport reach rank 0's host: loopback if they are on that host.

    Communication:
        One all-reduce of texts.

    Raises:
        RuntimeError: on every rank, if there is none.
    """
    notes = gather.gather_notes(addresses.own().text(), transport)
    offers = [Offer.read(note) for note in notes]
    _raise_errors(offers, transport.ranks)
    return addresses.agree(offers)[0]


def require_answer_of_all(address: str, number: int, transport: AbstractTransport) -> None:
    """Raises on every rank unless all ranks reach rank 0, which listens already.

    Communication:
        One all-reduce of 8 values.
    """
    error: RuntimeError | None = None
    remedy = f"Open the ports between the hosts, or name the interface of the job by {addresses.GLOO_INTERFACE}."
    try:
        if transport.rank:
            reach.require_answer(address, number, "rank 0", remedy)
    except RuntimeError as failed:
        error = failed
    gather.raise_together(error, transport, "syncbn.init")


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
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        return {"error": _never_came(missing, size, timeout)}
    offers = [Offer.read(store.get(key).decode()) for key in keys]
    try:
        _raise_errors(offers, tuple(range(size)))
        chosen = addresses.agree(offers)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": "", "addresses": dict(zip((offer.host for offer in offers), chosen, strict=True))}


def _never_came(missing: list[int], size: int, timeout: timedelta) -> str:
    return (
        f"All {size} ranks must come to the store of rank 0; received nothing from {named(missing)} within "
        f"{timeout.total_seconds():.0f} s. Look for a process that ended or never started, or a host that does not "
        "reach rank 0's: it says so itself."
    )


def _raise_errors(offers: list[Offer], ranks: tuple[int, ...]) -> None:
    errors = [offer.error for offer in offers]
    if any(errors):
        raise RuntimeError(gather.by_rank(errors, ranks, skip_empty=True, joint=" | "))
