# SPDX-License-Identifier: BSD-3-Clause
"""The transport contract: the one step that crosses processes.

W ranks. Stream synchronisation, staging and library quirks live in this folder and nowhere else. Every
implementation passes the one test body of ``tests/multiprocess/test_transports.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from syncbn.moments import Message
from syncbn.transports.groups import GroupSpec

PATIENCE = 10.0
"""Seconds that a rank waits for the notes of the others, once it knows that something is wrong."""


class MismatchError(RuntimeError):
    """The library below refused a message, most likely since ranks sent some of different length."""


class AbstractTransport(ABC):
    """A group of ranks that can sum a tensor. Every method but the attributes is collective over the group."""

    name: str
    """The kind: one of ``syncbn.transports.CHOICES``."""
    rank: int
    """This process's rank in the group."""
    size: int
    """W, the number of ranks in the group."""
    ranks: tuple[int, ...]
    """The members, by their rank in the whole job, in group order."""
    token: int
    """A number that this group has and no other of this or any other job; equal on all members."""
    spec: GroupSpec | None
    """What a module stores of this group. None for a process alone."""
    serial = 0
    """How many forwards this group has agreed on: a part of the identity of every message."""
    layers = 0
    """How many layers this group has compared the settings of."""
    repeated: Message | None = None
    """The forward whose sums a wrapper has returned again instead of sending. None where the last sums were sent."""
    on_host = False
    """Whether all_reduce waits on the host for the sum of a GPU tensor, so that reading it costs no further wait."""

    @property
    def sender(self) -> AbstractTransport:
        """What sends for this transport: itself, but where a wrapper may return sums again."""
        return self

    @abstractmethod
    def all_reduce(self, wire: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place.

        Args:
            wire: contiguous float64 or float32 of any shape, the same on every rank.

        Returns:
            ``wire``, holding the same bits on every rank.

        Communication:
            One SUM all-reduce of ``wire``. On a GPU it is ordered on the caller's current stream.

        Raises:
            MismatchError: on some ranks, where ranks sent wires of different length and the library notices.
        """

    @abstractmethod
    def exchange_notes(self, note: str) -> list[str | None]:
        """Collects a text from every rank that calls this, where all_reduce can no longer be relied on.

        Returns:
            The notes in the order of the ranks; None of a rank that is silent for ``PATIENCE`` seconds.

        Communication:
            Not a collective: messages of their own, beside those of all_reduce.
        """

    @abstractmethod
    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Copies a contiguous tensor of any dtype from group rank ``root`` to all, in place, and returns it."""

    @abstractmethod
    def split(self, color: int) -> AbstractTransport:
        """Makes one group of each color, in the order of the ranks, and returns this process's."""

    @abstractmethod
    def barrier(self) -> None:
        """Waits, without keeping a core busy, until every rank has come."""
