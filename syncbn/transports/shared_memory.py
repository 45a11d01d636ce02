# SPDX-License-Identifier: BSD-3-Clause
"""Shared memory of one host, for CPU tensors: ``segment.hpp`` has the protocol, this file connects the ranks.

The segment is a memory file without a name (``memfd_create``), which the other ranks open through the first rank's
entry in /proc. So nothing is left on the host, however its processes end, and only their user can open it. A group
over MPI or torch.distributed makes it known, and serves what is rare: notes, new groups.

W ranks.
"""

from __future__ import annotations

import errno
import os
import secrets
import warnings
import weakref
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from syncbn import moments
from syncbn.moments import Numbers
from syncbn.transports import gather, memory_file
from syncbn.transports.base import AbstractTransport, MismatchError
from syncbn.waits import processes
from syncbn.waits.processes import GONE, Process
from syncbn.waits.status import farewells, is_cut_off, of_exception

if TYPE_CHECKING:
    from syncbn.transports._segment import Opened

try:
    from syncbn.transports import _segment as segment
except ImportError:  # built without a C++ compiler, or not on Linux
    _BUILT = False
else:
    _BUILT = True
    segment.learn_torch(Tensor.__dlpack_c_exchange_api__, Tensor)

DONE, WAITS, DIFFERS, ELSEWHERE, EARLIER = range(5)
"""What the compiled part answers: every tenth of a second of waiting it says so."""
_SUM = -1
_WHAT = "the choice of shared memory"


class RankEndedError(RuntimeError):
    """A rank of this host has ended, and this one waits for it. Its text says how that one ended, and in which call."""

    __module__ = "syncbn"


@final
class SharedMemoryTransport(AbstractTransport):
    """A segment that all ranks of a host have mapped.

    Args:
        host: the same ranks over another library.
        opened: the segment.
        members: the processes of the ranks.
    """

    name = "shm"

    def __init__(self, host: AbstractTransport, opened: Opened, members: list[Process]) -> None:
        self.host, self._opened, self._members = host, opened, members
        self.rank, self.size, self.ranks = host.rank, host.size, host.ranks
        self.group_id, self.spec = host.group_id, host.spec
        _live.append((os.getpid(), weakref.ref(self, _forget)))

    def all_reduce(self, wire: Tensor) -> Tensor:
        """See ``AbstractTransport.all_reduce``.

        Raises:
            MismatchError: on every rank, if ranks are in different calls.
            RankEndedError: on every rank that waits for one that has ended.
        """
        numbers = moments.ABSTAINS if self.current is None else self.current.numbers
        progress = segment.begin(self._opened, wire, _SUM, numbers)
        if progress != DONE and self._finish(progress, wire, _SUM, numbers) == ELSEWHERE:
            wire.copy_(self.all_reduce(wire.cpu()))
        return wire

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """See ``AbstractTransport.broadcast``."""
        numbers = self._numbers()
        progress = segment.begin(self._opened, tensor, root, numbers)
        if self._finish(progress, tensor, root, numbers) == ELSEWHERE:
            tensor.copy_(self.broadcast(tensor.cpu(), root))
        return tensor

    def barrier(self) -> None:
        """See ``AbstractTransport.barrier``."""
        numbers = self._numbers()
        self._finish(segment.begin(self._opened, None, _SUM, numbers), None, _SUM, numbers)

    def exchange_notes(self, note: str) -> list[str | None]:
        """See ``AbstractTransport.exchange_notes``."""
        return self.host.exchange_notes(note)

    def split(self, color: int) -> AbstractTransport:
        """See ``AbstractTransport.split``. A part of the ranks of a host has a segment of its own."""
        self.barrier()  # if some ranks are in another call, all find out now
        return on_one_host(self.host.split(color), "auto")

    def close(self) -> None:
        """See ``AbstractTransport.close``. The segment is unmapped when nothing refers to this object."""
        self.host.close()

    def say_farewell(self, text: str) -> None:
        """Tells the other ranks how this process has ended."""
        segment.say_farewell(self._opened, self.rank, text.encode(errors="backslashreplace").decode())

    def _numbers(self) -> Numbers:
        """Returns what identifies a call that is no all-reduce: its name, if it has one."""
        if self.current is None:
            return moments.ABSTAINS
        return moments.numbers(self.serial, moments.text_hash(self.current.label), 0)

    def _finish(self, progress: int, tensor: Tensor | None, root: int, numbers: Numbers) -> int:
        """Goes on with a call that ``segment.begin`` has begun, until it is done."""
        if progress == EARLIER:  # an exception, such as Ctrl-C, has ended a call on this rank alone
            self._wait(WAITS)
            progress = segment.begin(self._opened, tensor, root, numbers)
        progress = self._wait(progress)
        if progress == DIFFERS:
            raise MismatchError  # without a text of a library: all ranks find the same, and go on to compare notes
        return progress

    def _wait(self, progress: int) -> int:
        try:
            while progress == WAITS:
                self._look_for_ended()
                progress = segment.advance(self._opened)
        finally:
            if progress == WAITS:
                segment.abandon(self._opened)
        return progress

    def _look_for_ended(self) -> None:
        """Raises if a rank that has not come has ended."""
        ended: dict[int, str] = {}
        for rank in segment.missing(self._opened):
            said = segment.farewell(self._opened, rank)
            if said or processes.state(self._members[rank]) == GONE:
                ended[rank] = said
        came = set(ended) - set(segment.missing(self._opened))  # its last act
        ended = {rank: said for rank, said in ended.items() if rank not in came}
        if ended:
            rank = min(ended, key=lambda rank: (is_cut_off(ended[rank]), rank))
            raise RankEndedError(_ended(self.ranks[rank], ended[rank], self))


def _ended(rank: int, said: str, transport: AbstractTransport) -> str:
    what = f"Rank {rank} {said}" if said else f"The process of rank {rank} is gone"
    call = "a call of the group" if transport.current is None else transport.current
    return f"{what}, while rank {transport.ranks[transport.rank]} waits for it in {call}. {_remedy(said)}"


def _remedy(said: str) -> str:
    if not said:
        return (
            "It was killed (kill -9, or the system for want of memory: see dmesg), crashed, or called os._exit. The "
            "launcher knows its exit status."
        )
    if said == _END:
        return "Give every rank the same number of steps, or put the loop in `with syncbn.join(model, optimizer):`."
    return "Mend that error: the others only wait. World.raise_together(error) ends a step on all ranks alike."


def on_one_host(host: AbstractTransport, override: str) -> AbstractTransport:
    """Connects a group through shared memory if its ranks share a host, else returns it as it is.

    Args:
        host: the group over another library.
        override: "shm" demands shared memory, "auto" prefers it. The same on every rank.

    Communication:
        Three all-reduces over the group, of 4 W + 7, 2 W + 7 and W + 7 float64 values; one if it cannot be used.

    Raises:
        RuntimeError: on every rank, if shared memory is demanded but cannot be used.
    """
    if host.size == 1 or override not in ("auto", "shm"):
        return host
    why = problem()
    table = _gather([float(bool(why)), *map(float, processes.own())], host)
    members = [Process(*map(int, row[1:])) for row in table]
    if len({member.host for member in members}) > 1:
        why = "its ranks are on several hosts, or in containers with processes of their own"
    elif any(row[0] for row in table):
        why = why or "a rank has no compiled transport"
    else:
        opened, why, failed = _open(host, members)
        if opened is not None:
            return SharedMemoryTransport(host, opened, members)
        if override == "auto" and failed[0] == host.rank:  # one warning a group: every rank knows which have failed
            warnings.warn(f"syncbn goes without shared memory: {why}.", RuntimeWarning, stacklevel=2)
    if override == "shm":
        raise RuntimeError(
            f"SYNCBN_TRANSPORT=shm needs memory that all ranks of a group share; {why or 'another rank has none'}. "
            "Unset it: then MPI or torch.distributed serves."
        )
    return host


def problem() -> str:
    """Says why this process cannot use shared memory. Empty if it can."""
    if not _BUILT:
        return "the compiled transport is missing (it needs Linux, and a C++ compiler when syncbn is installed)"
    return "" if hasattr(os, "memfd_create") else "Python offers no memory files here"


def _gather(row: list[float], host: AbstractTransport) -> list[list[float]]:
    table: list[list[float]] = gather.gather(torch.tensor(row, dtype=torch.float64, device="cpu"), host, _WHAT).tolist()
    return table


def _open(host: AbstractTransport, members: list[Process]) -> tuple[Opened | None, str, list[int]]:
    """Opens one segment on all ranks, or on none. Returns it, or why this rank has none, and which ranks have none."""
    ranks, slot = host.size, memory_file.slot_bytes(host.size)
    files, opened, why, key = [], None, "", secrets.randbits(52) + 1
    try:
        if host.rank == 0:
            files.append(memory_file.create(segment.size(ranks, slot)))
            opened = segment.map(files[0], 0, ranks, slot)
            segment.set_key(opened, key)
    except (OSError, MemoryError) as error:
        why = f"the first rank cannot make a memory file of {segment.size(ranks, slot)} bytes ({error})"
    number, key = map(int, _gather([float(files[0] if files else -1), float(key)], host)[0])
    try:
        if host.rank > 0 and number >= 0:
            files.append(memory_file.open_of(members[0].pid, number, segment.size(ranks, slot)))
            opened = segment.map(files[0], host.rank, ranks, slot)
            if segment.key(opened) != key:
                raise FileNotFoundError(errno.ENOENT, "it is another file")
    except (OSError, MemoryError) as error:
        opened, why = None, f"rank {host.ranks[host.rank]} cannot open the memory of the first one ({error})"
    failed = [rank for rank, row in enumerate(_gather([float(opened is None)], host)) if row[0]]
    for file in files:  # the mapping stays
        os.close(file)
    return (None, why, failed) if failed else (opened, "", [])


_END = "came to the end of the program"
_live: list[tuple[int, weakref.ref[SharedMemoryTransport]]] = []
"""Every segment, and the process that uses it: a fork of that has copies of the references."""


def _forget(dead: weakref.ref[SharedMemoryTransport]) -> None:
    _live[:] = [each for each in _live if each[1] is not dead]


def _say_farewells(error: BaseException | None) -> None:
    """Tells all groups how this process has ended."""
    text = _END if error is None else of_exception(error)
    for pid, reference in list(_live):
        transport = reference()
        if transport is not None and pid == os.getpid():
            transport.say_farewell(text)


farewells.append(_say_farewells)
