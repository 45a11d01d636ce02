# SPDX-License-Identifier: BSD-3-Clause
"""A transport that passes everything on to another one: a feature overrides what it wants to see."""

from __future__ import annotations

from torch import Tensor

from syncbn.transports.base import AbstractTransport


class AbstractWrapper(AbstractTransport):
    """Has the ranks of the inner transport and passes every call on.

    Args:
        inner: the transport that sends.
    """

    def __init__(self, inner: AbstractTransport) -> None:
        self.inner = inner
        self.rank, self.size, self.ranks, self.group_id = inner.rank, inner.size, inner.ranks, inner.group_id
        self.spec, self.host_synchronous = inner.spec, inner.host_synchronous

    def all_reduce(self, wire: Tensor) -> Tensor:
        """See ``AbstractTransport.all_reduce``."""
        return self.inner.all_reduce(wire)

    def leave(self) -> None:
        """See ``AbstractTransport.leave``."""
        self.inner.leave()

    def exchange_notes(self, note: str) -> list[str | None]:
        """See ``AbstractTransport.exchange_notes``."""
        return self.inner.exchange_notes(note)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """See ``AbstractTransport.broadcast``."""
        return self.inner.broadcast(tensor, root)

    def split(self, color: int) -> AbstractTransport:
        """See ``AbstractTransport.split``."""
        return self.inner.split(color)

    def barrier(self) -> None:
        """See ``AbstractTransport.barrier``."""
        self.inner.barrier()
