# SPDX-License-Identifier: BSD-3-Clause
"""What `syncbn doctor` finds out about the network of several hosts, before anything could wait for it.

W ranks. Texts go through what connects processes already: torch's store, or the daemons of Open MPI.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from syncbn.cli.doctor.channels import AbstractChannel
from syncbn.transports import addresses, interfaces, reach
from syncbn.transports.addresses import GLOO_INTERFACE, Offer
from syncbn.waits.channel import listen
from syncbn.waits.ranks import named

ATTEMPTS = 3
"""Connections to each host that answers: the quickest of them counts."""
MOST_PEERS = 32
"""Hosts that one host tries to reach: those after it, in the order of their first ranks."""
TCP_INCLUDE, TCP_EXCLUDE = "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"


@dataclass
class Host:
    """A host of the job, and what it offered."""

    name: str
    ranks: list[int]
    address: str
    """Where the others reach it; empty if none could be chosen."""
    interface: str
    own_name: str
    """What its own name means on it; empty if it is unknown."""
    others: list[str]
    """Its other addresses."""


@dataclass
class Route:
    """Whether one host reaches another."""

    source: str
    target: str
    address: str
    found: str
    """reached, refused or no answer."""
    round_trip_us: float = 0.0
    """Of a connection that was made: the quickest of three."""


@dataclass
class Network:
    """What was found. ``problems`` keep the job from starting; ``warnings`` need not."""

    hosts: list[Host] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    suspects: list[tuple[str, str]] = field(default_factory=list)
    """Warnings that explain it if the processes now fail to connect."""

    @property
    def delay_us(self) -> float:
        """The longest one-way delay from host to host: half a round trip. 0 if none was measured."""
        return max((route.round_trip_us / 2 for route in self.routes), default=0.0)


def look(rank: int, size: int, channel: AbstractChannel | None, limit: float, launcher: str) -> Network:
    """Finds out which address each host offers and who reaches whom. The same on every rank that is heard.

    Args:
        rank: of this process.
        size: W.
        channel: None if nothing connects the processes yet: then only this host is known.
        limit: seconds to wait for the other ranks.
        launcher: its name.

    Communication:
        Three rounds of short texts; one host connects to up to ``MOST_PEERS`` others.
    """
    own = addresses.own()
    if channel is None:
        network = Network([_host(own, [rank], "")])
        network.problems = [(own.error, f"Correct {GLOO_INTERFACE}.")] if own.error else []
        return network
    channel.tell("offer", own.text())
    notes = channel.hear("offer", list(range(size)), limit)
    offers = {r: Offer.read(note) for r, note in notes.items()}
    network = _summarize(offers)
    if missing := [r for r in range(size) if r not in offers]:
        what = f"could not connect the processes within {limit:.3g} s: {named(missing)} never came to {channel.place}"
        remedy = (
            "Look for a process that ended or never started. A host that does not reach this address says so itself: "
            "then look for a firewall, or set MASTER_ADDR to another address of rank 0's host."
        )
        network.problems.append((what, remedy))
    for r, offer in offers.items():
        if offer.error:
            network.problems.append(
                (f"rank {r}: {offer.error}", f"Set {GLOO_INTERFACE} alike on all hosts, or unset it.")
            )
    if len(network.hosts) > 1 and not network.problems:
        _try_routes(network, rank, channel)
        _warn_of_names(network)
        _suspect_repeated(network, list(offers.values()), launcher)
    return network


def _host(offer: Offer, ranks: list[int], address: str) -> Host:
    listed = [each for each in offer.addresses if each.address == address] or offer.addresses[:1]
    chosen = listed[0] if listed else None
    others = [f"{each.name} {each.address}" for each in offer.addresses if each is not chosen]
    shown = address or (chosen.address if chosen else "")
    return Host(offer.name, ranks, shown, chosen.name if chosen else "", offer.resolved, others)


def _summarize(offers: dict[int, Offer]) -> Network:
    network = Network()
    try:
        chosen = dict(zip(offers, addresses.agree(list(offers.values())), strict=True)) if offers else {}
    except addresses.NoAddressError as error:
        chosen = dict.fromkeys(offers, "")
        network.problems.append((str(error), "Then run the doctor again."))
    members: dict[str, list[int]] = {}
    for r, offer in offers.items():
        members.setdefault(offer.host, []).append(r)
    network.hosts = [_host(offers[ranks[0]], ranks, chosen[ranks[0]]) for ranks in members.values()]
    return network


def _try_routes(network: Network, rank: int, channel: AbstractChannel) -> None:
    """Lets the first rank of each host connect to the others."""
    first = [host.ranks[0] for host in network.hosts]
    limit = 4 * reach.ATTEMPT
    listener = None
    if rank in first:
        own = first.index(rank)
        try:
            listener = listen(network.hosts[own].address, 0, ATTEMPTS * len(first))
            port = str(listener.getsockname()[1])
        except OSError as error:
            port = str(error)
        channel.tell("port", port)
    ports = channel.hear("port", first, limit)
    if rank in first:
        peers = [first[(own + step) % len(first)] for step in range(1, min(len(first), MOST_PEERS + 1))]
        with ThreadPoolExecutor(len(peers)) as pool:
            found = pool.map(
                lambda peer: _attempt(network.hosts[first.index(peer)].address, ports.get(peer, "")), peers
            )
        channel.tell("routes", json.dumps(dict(zip(map(str, peers), found, strict=True))))
    for source, text in channel.hear("routes", first, limit).items():
        for target, said in json.loads(text).items():
            host = network.hosts[first.index(int(target))]
            found, _, us = said.partition("/")
            name = network.hosts[first.index(source)].name
            network.routes.append(Route(name, host.name, host.address, found, float(us or 0)))
    if listener is not None:
        listener.close()
    failed = [each for each in network.routes if each.found != reach.REACHED]
    if failed:
        words = [f"{each.source} does not reach {each.target} at {each.address} ({each.found})" for each in failed[:8]]
        more = f", and {len(failed) - len(words)} more" if len(failed) > len(words) else ""
        remedy = (
            "Let the hosts reach each other on all TCP ports (a firewall is between them, or these addresses are of "
            f"another network), or name the interface of the right network by {GLOO_INTERFACE}."
        )
        network.problems.append((f"{'; '.join(words)}{more}", remedy))


def _attempt(address: str, port: str) -> str:
    """Connects to a host. Returns what was found; if it was reached, with the us of a round trip, short: reached/83."""
    if not port:
        return "it did not say where it listens"
    if not port.isdigit():
        return port.replace("/", " ")
    times = []
    for _ in range(ATTEMPTS):
        began = time.perf_counter_ns()
        found = reach.attempt(address, int(port))
        if found != reach.REACHED:
            return found
        times.append((time.perf_counter_ns() - began) / 1e3)
    return f"{found}/{min(times):.0f}"


def _warn_of_names(network: Network) -> None:
    misled = [host for host in network.hosts if not host.own_name or interfaces.is_loopback(host.own_name)]
    if misled and not os.environ.get(GLOO_INTERFACE):
        names = ", ".join(f"{host.name} ({host.own_name or 'unknown'})" for host in misled[:8])
        inter = ",".join(sorted({host.interface for host in misled}))
        what = f"a program that calls init_process_group itself waits on hosts whose own name is no address: {names}"
        remedy = f"Let syncbn.init() call it, or set {GLOO_INTERFACE}={inter} on these hosts."
        network.warnings.append((what, remedy))


def _suspect_repeated(network: Network, offers: list[Offer], launcher: str) -> None:
    shared = addresses.repeated(offers)
    if not shared:
        return
    named = sorted(
        {f"{each.name} {each.address}" for offer in offers for each in offer.addresses if each.address in shared}
    )
    what = f"several hosts have the same address: {', '.join(named)}"
    network.warnings.append(
        (what, "syncbn.init() passes over it; NCCL and Open MPI have variables of their own for it.")
    )
    if launcher == "openmpi" and not (os.environ.get(TCP_INCLUDE) or os.environ.get(TCP_EXCLUDE)):
        right = {each.network for offer in offers for each in offer.addresses if each.address not in shared}
        remedy = f"Set {TCP_INCLUDE}={','.join(sorted(right))}, which names the network of the job."
        network.warnings[-1] = (f"{what}, at which Open MPI may connect to the wrong host, and wait", remedy)
        network.suspects.append(network.warnings[-1])
