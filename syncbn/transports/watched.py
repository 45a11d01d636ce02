# SPDX-License-Identifier: BSD-3-Clause
"""Puts a group under watch at its first use: its ranks meet in a side channel, unless they have one. See ``waits/``."""

from __future__ import annotations

import secrets
import socket
import warnings
import zlib
from contextlib import AbstractContextManager, nullcontext

import torch

from syncbn.transports import addresses, choices, gather, identity, launchers
from syncbn.transports.addresses import Offer
from syncbn.transports.base import AbstractTransport
from syncbn.transports.groups import GroupSpec
from syncbn.transports.identity import Identity
from syncbn.waits import channel, limits, processes, watchdog
from syncbn.waits.channel import LOOPBACK, Channel, Hub, Link
from syncbn.waits.making import watch_making
from syncbn.waits.processes import Process
from syncbn.waits.ranks import named

_WHAT = "the first use of a group"


def watch(transport: AbstractTransport) -> None:
    """Watches the calls of a group from now on.

    Communication:
        One all-reduce of 6 W + 7 float64 values over the group; if its ranks have no channel in common yet, two more of
        2 W + 7, and TCP connections to two ranks, on loopback if all are on one host.

    Raises:
        ValueError: on every rank, if ``SYNCBN_TIMEOUT`` is wrong on any.
        RuntimeError: on every rank, if torch.distributed has connected ranks of different jobs.
    """
    if transport.size == 1 or watchdog.watches(transport):
        return
    error: Exception | None = None
    try:
        limits.give(limits.limit())  # from now on the variable is not read again
    except ValueError as wrong:
        error = wrong
    covered = watchdog.covers(transport.ranks)
    job = _job(transport)
    number = 0.0 if job is None else job.number
    row = [float(error is not None), float(covered), number, *map(float, processes.own())]
    table = gather.gather(torch.tensor(row, dtype=torch.float64, device="cpu"), transport, _WHAT)
    if table[:, 0].any():
        gather.raise_gathered(error, transport)
    if len(set(table[:, 2].tolist()) - {0.0}) > 1:
        raise _mixed(job, transport)
    members = [Process(*map(int, each)) for each in table[:, 3:].tolist()]
    new = None if table[:, 1].all() else _meet(transport, members)
    # without a channel too: then this rank ends by itself at the limit
    watchdog.watch(transport, new, transport.ranks[transport.rank], launchers.detect().name)


def making(spec: GroupSpec | None, device_type: str) -> AbstractContextManager[None]:
    """Puts the making of a group on record: every member must come to it, and there is no transport yet.

    Args:
        spec: the group; None for all ranks.
        device_type: of the tensors to be reduced.
    """
    launch = launchers.detect()
    if launch.size == 1:  # alone, or in processes that a program has started: torch has a limit there
        return nullcontext()
    ranks = tuple(range(launch.size)) if spec is None or not spec.ranks else spec.ranks
    what = "group of all ranks" if spec is None else str(spec)
    number = zlib.crc32(f"{what} {'' if spec is None else spec.label} {device_type}".encode())
    return watch_making(what, number, ranks, launch.rank, launch.name)


def _job(transport: AbstractTransport) -> Identity | None:
    """Returns the job that the launcher has named, if a group of torch's should be of it. MPI joins no others."""
    launch, torch_world = launchers.detect(), choices.world_of_torch()
    if transport.spec is None or transport.spec.kind != "torch" or torch_world is None:
        return None
    return identity.of_job(launch) if torch_world.size() == launch.size > 1 else None


def _mixed(job: Identity | None, transport: AbstractTransport) -> RuntimeError:
    jobs = gather.by_rank(gather.gather_notes("none" if job is None else str(job), transport), transport.ranks)
    return RuntimeError(
        f"All ranks of torch.distributed must be of one job; received {jobs}. Two jobs have met at one MASTER_PORT: "
        "give each a port of its own. If they are one job, give all ranks the same SYNCBN_JOB."
    )


def _meet(transport: AbstractTransport, members: list[Process]) -> Channel | None:
    """Makes the channel of a group. Returns None on every rank if any rank cannot reach another one."""
    rank, together = transport.rank, len({process.host for process in members}) == 1
    names, hosts, why = ([LOOPBACK] * transport.size, [], "") if together else _addresses(transport)
    servers = channel.servers([process.host for process in members])
    key, port, hub = secrets.randbits(52), 0, None
    opened: list[socket.socket] = []
    if rank in servers and not why:
        try:
            listener = channel.listen(names[rank], backlog=transport.size)
            opened.append(listener)
            port, hub = listener.getsockname()[1], Hub(listener, str(key), transport.size)
        except OSError as error:
            why = str(error)
    row = torch.tensor([float(port), float(key)], dtype=torch.float64, device="cpu")
    rows = gather.gather(row, transport, _WHAT).tolist()
    links = []
    for server in servers:
        port, key = map(int, rows[server])
        try:
            if server != rank and port:
                links.append(Link(names[server], port, str(key), rank))
        except OSError as error:
            why = f"{names[server]} port {port}: {error}"
    table = gather.gather(torch.tensor([float(bool(why))], dtype=torch.float64, device="cpu"), transport, _WHAT)
    failed = [r for r, (wrong,) in enumerate(table.tolist()) if wrong]
    if failed:
        for each in (*opened, *[link.connection for link in links]):
            each.close()
        if rank == failed[0]:  # one warning a job: every rank has the table
            warnings.warn(_unwatched([transport.ranks[r] for r in failed], why), RuntimeWarning, stacklevel=2)
        return None
    return Channel(transport.ranks, rank, members, hub, links, hosts)


def _addresses(transport: AbstractTransport) -> tuple[list[str], list[str], str]:
    """Returns the address and the name of each rank's host, and why there is no address: the same on every rank."""
    offers = [Offer.read(note) for note in gather.gather_notes(addresses.own().text(), transport)]
    names = [offer.name for offer in offers]
    try:
        return addresses.agree(offers), names, ""
    except addresses.NoAddressError as error:
        return [], names, str(error)


def _unwatched(failed: list[int], why: str) -> str:
    verb = "do" if len(failed) > 1 else "does"
    return (
        f"syncbn watches no waits in this job: {named(failed)} {verb} not reach the side channel (rank {failed[0]}: "
        f"{why:.300}). A rank that waits still ends at the limit, without a report. `syncbn doctor`, started in the "
        "same way, says what each host offers."
    )
