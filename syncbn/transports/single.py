# SPDX-License-Identifier: BSD-3-Clause
"""One process: the sum over one rank is the tensor itself."""

from __future__ import annotations

from typing import final

from torch import Tensor

from syncbn.transports.base import AbstractTransport


@final
class SingleTransport(AbstractTransport):
    """A group of this process alone."""

    name = "single"
    rank = 0
    size = 1
    group_id = 0
    spec = None

    def __init__(self, rank: int = 0) -> None:
        self.ranks = (rank,)

    def all_reduce(self, wire: Tensor) -> Tensor:
        """See ``AbstractTransport.all_reduce``."""
        return wire

    def exchange_notes(self, note: str) -> list[str | None]:
        """See ``AbstractTransport.exchange_notes``."""
        return [note]

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """See ``AbstractTransport.broadcast``."""
        del root
        return tensor

    def split(self, color: int) -> AbstractTransport:
        """See ``AbstractTransport.split``."""
        del color
        return self

    def barrier(self) -> None:
        """See ``AbstractTransport.barrier``."""
