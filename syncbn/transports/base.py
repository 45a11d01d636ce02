# SPDX-License-Identifier: BSD-3-Clause
"""The transport contract: the one step that crosses processes.

W ranks. Stream synchronisation, staging and library quirks live in this folder and nowhere else. Every
implementation passes the one test body of ``tests/multiprocess/test_transports.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from torch import Tensor

from syncbn.moments import ABSTAINS, Message
from syncbn.transports.groups import GroupSpec

PATIENCE = 10.0
"""Seconds that a rank waits for the notes of the others, after it has found an error."""


RECENT = 512
"""Length of ``AbstractTransport.recent``."""


class MismatchError(RuntimeError):
    """The library refused a message, most likely since ranks sent messages of different length."""


class AbstractTransport(ABC):
    """A group of ranks that can sum a tensor. Every method is collective over the group."""

    name: str
    """The kind: one of ``syncbn.transports.CHOICES``."""
    rank: int
    """This process's rank in the group."""
    size: int
    """W, the number of ranks in the group."""
    ranks: tuple[int, ...]
    """The members, by their rank in the whole job, in group order."""
    group_id: int
    """A random number that identifies the group, in this and any other job. Equal on all members."""
    spec: GroupSpec | None
    """What a module stores of this group. None for a single process."""
    serial = 0
    """How many forwards this group has agreed on: a part of the identity of every message."""
    layers = 0
    """How many layers have compared their settings in this group."""
    repeated: Message | None = None
    """The forward whose sums a wrapper returned again, without communication. None if the last wire was sent."""
    begun = 0
    """How many calls this rank has begun in the group."""
    current: Message | None = None
    """The call that this rank is in. The watchdog reads it from a thread of its own, see ``waits/``."""
    completed: Message | None = None
    """The last call that this rank has completed."""
    failed: tuple[int, Message] | None = None
    """The number of the last call that has failed on this rank, and which it was."""
    patience: float | None = None
    """Seconds that the current call may wait, if it has a limit of its own."""
    recent: deque[tuple[int, Message]] | None = None
    """The last calls and their numbers, if the host does not wait for the sums of a GPU."""
    host_synchronous = False
    """Whether all_reduce waits on the host for the sum of a GPU tensor, so that reading it costs no further wait."""

    @property
    def sender(self) -> AbstractTransport:
        """The transport that sends: this one, unless it is a wrapper that may return earlier sums."""
        return self

    def reduce(self, wire: Tensor, message: Message) -> Tensor:
        """Does ``all_reduce`` on record, so that a rank that waits can say in which call.

        Raises:
            MismatchError: as ``all_reduce`` does. The rank stays in the call until ``leave``, to ask the others.
            RuntimeError: on this rank alone, if another thread of it is in a call of this group.
        """
        if self.current is not None:
            raise _two_threads(message, self.current)
        self.begun += 1
        self.current = message
        try:
            wire = self.all_reduce(wire)
        except MismatchError:
            raise
        except BaseException:
            self.leave()
            raise
        self.completed = message
        self.current = None
        if self.recent is not None:
            self.recent.append((self.begun, message))
        return wire

    def leave(self) -> None:
        """Ends a call that has failed."""
        if self.current is not None:
            self.failed = self.begun, self.current
        self.current = None

    @final
    @contextmanager
    def call(self, what: str, patience: float | None = None) -> Iterator[None]:
        """Puts a collective on record that is not an all-reduce.

        Args:
            what: its name, for example "World.broadcast".
            patience: seconds that it may wait for other ranks; None for the limit of the job.
        """
        self.begun += 1
        self.patience, self.current = patience, self.named(what)
        try:
            yield
            self.completed = self.current
        except BaseException:
            self.leave()
            raise
        finally:
            self.current = self.patience = None

    @final
    def named(self, what: str) -> Message:
        """Returns the identity of a call that is not a layer's."""
        return Message(ABSTAINS, self.size, what, -1, self.serial)

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
            MismatchError: on some ranks, if ranks sent wires of different length and the library notices.
        """

    @abstractmethod
    def exchange_notes(self, note: str) -> list[str | None]:
        """Collects a text from every rank that calls this, after an error that makes all_reduce unreliable.

        Returns:
            The notes in the order of the ranks; None for a rank that is silent for ``PATIENCE`` seconds.

        Communication:
            Not a collective: its messages are separate from those of all_reduce.
        """

    @abstractmethod
    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Copies a contiguous tensor of any dtype from group rank ``root`` to all, in place, and returns it."""

    @abstractmethod
    def split(self, color: int) -> AbstractTransport:
        """Makes one group for each color, in the order of the ranks. Returns the group of this process."""

    @abstractmethod
    def barrier(self) -> None:
        """Waits until every rank has called this, without keeping a core busy."""

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Gives back what the group holds: files or a communicator. By every rank of it."""


def _two_threads(message: Message, current: Message) -> RuntimeError:
    return RuntimeError(
        f"A group can be in one call at a time; received {message} while another thread is in {current}. Give each "
        "thread a group of its own, by World.subgroup(world.size)."
    )
