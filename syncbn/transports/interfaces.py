# SPDX-License-Identifier: BSD-3-Clause
"""The network interfaces of this host, and which of them reaches another host. Linux; elsewhere none are known."""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import sys
from typing import NamedTuple

VIRTUAL = ("docker", "br-", "virbr", "veth", "cni", "lxcbr", "lxdbr", "podman")
"""How the names of interfaces begin that containers and virtual machines of this host use among themselves. Their
addresses are often the same on every host."""
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses that no host has (RFC 5737, RFC 3849): the route to them is the default one."""


class Interface(NamedTuple):
    """An address of an interface of this host."""

    name: str
    address: str
    network: str
    """The addresses that it reaches directly, such as 10.0.0.0/24."""


class _Sockaddr(ctypes.Structure):
    _fields_ = (("family", ctypes.c_ushort), ("data", ctypes.c_ubyte * 26))


class _Ifaddrs(ctypes.Structure):
    pass


_Ifaddrs._fields_ = (
    ("next", ctypes.POINTER(_Ifaddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.POINTER(_Sockaddr)),
    ("netmask", ctypes.POINTER(_Sockaddr)),
)


def interfaces() -> list[Interface]:
    """Returns the addresses of this host's interfaces that are up, except loopback and link-local ones."""
    if not sys.platform.startswith("linux"):
        return []
    libc = ctypes.CDLL(None)
    first = ctypes.POINTER(_Ifaddrs)()
    if libc.getifaddrs(ctypes.byref(first)):
        return []
    found = []
    entry = first
    while entry:
        each = entry.contents
        if each.flags & _IFF_UP and not each.flags & _IFF_LOOPBACK and each.address and each.netmask:
            address, mask = _text(each.address.contents), _text(each.netmask.contents)
            if address and mask and not ipaddress.ip_address(address).is_link_local:
                found.append(Interface(each.name.decode(errors="replace"), address, _network(address, mask)))
        entry = each.next
    libc.freeifaddrs(first)
    return found


def _text(sockaddr: _Sockaddr) -> str:
    """Returns an IPv4 or IPv6 address; empty for another kind."""
    data = bytes(sockaddr.data)
    if sockaddr.family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, data[2:6])
    return socket.inet_ntop(socket.AF_INET6, data[6:22]) if sockaddr.family == socket.AF_INET6 else ""


def _network(address: str, mask: str) -> str:
    bits = int(ipaddress.ip_address(mask)).bit_count()
    return str(ipaddress.ip_network(f"{address}/{bits}", strict=False))


def is_loopback(address: str) -> bool:
    """Whether an address is of the host itself, and means another host on another."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def toward(address: str) -> str:
    """Returns this host's address on the route to another one; empty if there is no route. Sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as unconnected:
            unconnected.connect((address, 9))
            return str(unconnected.getsockname()[0])
    except OSError:
        return ""


def ordered(master: str = "") -> list[Interface]:
    """Returns this host's addresses, the likeliest to be reached by the other hosts of a job first.

    Args:
        master: an address of rank 0's host, if it is known: the one from which this host reaches it comes first. Then
            comes the one of the default route, and those of containers come last.
    """
    first = [toward(master)] if master else []
    first += [toward(each) for each in _ELSEWHERE]

    def place(each: Interface) -> tuple[int, bool, bool]:
        rank = first.index(each.address) if each.address in first else len(first)
        return rank, each.name.startswith(VIRTUAL), ":" in each.address

    return sorted(interfaces(), key=place)


def of_name(name: str) -> list[str]:
    """Returns the addresses of a host's name, IPv4 first.

    Raises:
        OSError: if the name is unknown.
    """
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return sorted(dict.fromkeys(str(each[4][0]) for each in found), key=lambda address: ":" in address)
