# SPDX-License-Identifier: BSD-3-Clause
"""Numbers that stand for groups in compiled graphs, which can hold no communicator."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from syncbn import transports
from syncbn.transports.base import AbstractTransport
from syncbn.transports.groups import GroupSpec

resolvers: dict[int, Callable[[], AbstractTransport]] = {}
keys: dict[object, int] = {}
_numbers = itertools.count()


def key_of_spec(spec: GroupSpec | None, device_type: str) -> int:
    """Returns the number of a group specification and device type. Works while a graph is traced, too."""
    fields = () if spec is None else (spec.kind, spec.ranks, spec.label, spec.size)
    key: int = _key_of_fields(fields, device_type)
    return key


def _key_of_fields(fields: tuple[Any, ...], device_type: str) -> int:
    """Takes plain values. Dynamo guards objects by identity: a GroupSpec argument would recompile for every layer."""
    spec = GroupSpec(*fields) if fields else None
    return _key((spec, device_type), lambda: transports.choose(spec, device_type))


# What torch.compiler.assume_constant_result does, without its import of the compiler, which takes as long as torch's.
_key_of_fields._dynamo_marked_constant = True  # type: ignore[attr-defined]


def key_of_transport(transport: AbstractTransport) -> int:
    """Returns the number of a live transport in this process."""
    return _key(transport, lambda: transport)


def transport_of(key: int) -> AbstractTransport:
    """Returns the transport that a number stands for now."""
    return resolvers[key]()


def forget(transport: AbstractTransport) -> None:
    """Drops a transport and its number. No graph may still need it."""
    if transport in keys:
        del resolvers[keys.pop(transport)]


def _key(name: object, resolver: Callable[[], AbstractTransport]) -> int:
    if name not in keys:
        keys[name] = next(_numbers)
        resolvers[keys[name]] = resolver
    return keys[name]
