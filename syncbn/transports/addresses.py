# SPDX-License-Identifier: BSD-3-Clause
"""At which addresses the hosts of a job listen for each other. Every rank offers its own; all choose alike.

A host's own name is no guide: Debian lets it mean 127.0.1.1, and in a container it may mean nothing. W ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path

from syncbn.transports import interfaces
from syncbn.transports.interfaces import Interface
from syncbn.waits.channel import LOOPBACK

MASTER = "MASTER_ADDR"
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_MOST_BYTES = 950
"""Of an offer as text: it fits into a note, see ``gather.NOTE_BYTES``."""


@dataclass
class Offer:
    """What a rank says about its host."""

    host: str
    """Distinguishes hosts; also containers of one host, if they have networks of their own."""
    name: str
    addresses: list[Interface] = field(default_factory=list)
    """The likeliest one first."""
    resolved: str = ""
    """What the host's own name means on it; empty if it is unknown."""
    error: str = ""
    """Why this rank cannot start."""

    def text(self) -> str:
        """Renders the offer as a short text. Addresses that find no place in it are left out."""
        kept = Offer(self.host, self.name, list(self.addresses), self.resolved, self.error[:500])
        while len(text := json.dumps(asdict(kept))) > _MOST_BYTES and len(kept.addresses) > 1:
            kept.addresses.pop()
        return text

    @staticmethod
    def read(text: str) -> Offer:
        """Reads what ``text`` has rendered."""
        said = json.loads(text)
        return Offer(**{**said, "addresses": [Interface(*each) for each in said["addresses"]]})


class NoAddressError(RuntimeError):
    """The hosts of a job have no addresses by which they could reach each other."""


def own() -> Offer:
    """Returns the offer of this rank."""
    name = socket.gethostname()
    offer = Offer(_host(name), name, resolved=_resolved(name))
    found = interfaces.ordered(master())
    wanted = [each for each in os.environ.get(GLOO_INTERFACE, "").split(",") if each]
    offer.addresses = [each for each in found if wanted and each.name == wanted[0]] or found
    if not found and offer.resolved and not interfaces.is_loopback(offer.resolved):
        offer.addresses = [Interface("", offer.resolved, offer.resolved)]  # not on Linux
    offer.error = _not_an_interface(name, wanted, found)
    return offer


def master() -> str:
    """Returns the address that MASTER_ADDR means on this host; empty if it is not set, unknown, or loopback."""
    address = _resolved(os.environ.get(MASTER, ""))
    return "" if not address or interfaces.is_loopback(address) else address


def _resolved(name: str) -> str:
    """Returns what a name means on this host; empty if it means nothing."""
    try:
        return interfaces.of_name(name)[0] if name else ""
    except (OSError, IndexError, UnicodeError):
        return ""


def _not_an_interface(host: str, wanted: list[str], found: list[Interface]) -> str:
    """Says that a variable names an interface which this host does not have. Empty if all is well."""
    there = {name for _, name in socket.if_nameindex()}
    missing = [each for each in wanted if each not in there]
    if not missing:
        return ""
    known = ", ".join(f"{each.name} ({each.address})" for each in found) or "none but loopback"
    return (
        f"{GLOO_INTERFACE} must name a network interface of each host; received {','.join(wanted)!r} on {host}, whose "
        f"interfaces are {known}. Set {GLOO_INTERFACE} to one of them, or unset it: then syncbn.init() chooses."
    )


def agree(offers: list[Offer]) -> list[str]:
    """Chooses the address at which each rank's host is reached by the others. The same everywhere: offers decide.

    On one host that is loopback. On several it is the address of each in the first network that all have, where no two
    have the same address; if they have none in common, the first address of each host that no other has.

    Args:
        offers: of every rank.

    Returns:
        One address for each rank.

    Raises:
        NoAddressError: if a host has none.
    """
    hosts = {offer.host: offer for offer in offers}
    if len(hosts) == 1:
        return [LOOPBACK] * len(offers)
    chosen = _in_one_network(list(hosts.values())) or _each_by_itself(list(hosts.values()))
    return [chosen[offer.host] for offer in offers]


def _in_one_network(hosts: list[Offer]) -> dict[str, str]:
    for network in (each.network for each in hosts[0].addresses):
        found = {
            offer.host: each.address for offer in hosts for each in reversed(offer.addresses) if each.network == network
        }
        if len(found) == len(set(found.values())) == len(hosts):
            return found
    return {}


def _each_by_itself(hosts: list[Offer]) -> dict[str, str]:
    shared = repeated(hosts)
    found = {}
    for offer in hosts:
        usable = [each.address for each in offer.addresses if each.address not in shared]
        if not usable:
            has = ", ".join(f"{each.name} ({each.address})" for each in offer.addresses) or "none but loopback"
            raise NoAddressError(
                f"Each host of a job needs an address that the others reach; received {has} on {offer.name}, whose own "
                f"name means {offer.resolved or 'nothing'} there. Give it an address of its own on the network of the "
                f"job, and name its interface by {GLOO_INTERFACE}."
            )
        found[offer.host] = usable[0]
    return found


def repeated(hosts: list[Offer]) -> set[str]:
    """Returns the addresses that more than one host has, as those of containers' bridges are."""
    seen: dict[str, set[str]] = {}
    for offer in hosts:
        for each in offer.addresses:
            seen.setdefault(each.address, set()).add(offer.host)
    return {address for address, owners in seen.items() if len(owners) > 1}


def tell_gloo(address: str) -> None:
    """Lets gloo listen at an address of this host, unless the user has named an interface.

    gloo itself would look up the name of the host. The variable also holds for groups that are made later.
    """
    if address == LOOPBACK:
        os.environ.setdefault(GLOO_INTERFACE, "lo")
        return
    for each in interfaces.interfaces():
        if each.address == address:
            os.environ.setdefault(GLOO_INTERFACE, each.name)


def _host(name: str) -> str:
    """Returns what distinguishes this host, and its network if that is not the host's own."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    parts = [name, boot.read_text().strip() if boot.exists() else ""]
    parts.append(os.readlink(network) if network.is_symlink() else "")
    return hashlib.sha256(" ".join(parts).encode(errors="replace")).hexdigest()[:13]
