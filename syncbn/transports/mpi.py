# SPDX-License-Identifier: BSD-3-Clause
"""MPI through mpi4py, on host buffers. Importing this module runs MPI_Init: import it only when MPI is chosen."""

from __future__ import annotations

import threading
import time
import zlib
from collections import Counter
from typing import Any, final

import torch
from torch import Tensor

from syncbn.transports import groups
from syncbn.transports.base import PATIENCE, AbstractTransport, MismatchError
from syncbn.transports.groups import GroupSpec

LEAST_TAG_UB = 32767
"""Every MPI supports tags up to this one."""
INSTALL = 'pip install "syncbn[mpi]"'

try:
    from mpi4py import MPI
except ImportError as error:
    raise RuntimeError(
        f"The MPI transport needs mpi4py and an MPI library; importing mpi4py.MPI failed: {error}. "
        f"Install both with: {INSTALL}"
    ) from error
except RuntimeError as error:  # mpi4py is there, libmpi is not
    raise RuntimeError(
        f"The MPI transport needs an MPI library that mpi4py can load; it said: {error}. "
        f"Install one with: {INSTALL}, or make the site's visible, for example with `module load openmpi`."
    ) from error

_unsent: list[tuple[Any, bytes]] = []
_MPI_TYPES = {torch.float64: MPI.DOUBLE, torch.float32: MPI.FLOAT}
# A communicator holds its specification as an attribute. Every wrapper of the handle finds it, and a duplicate does not
# inherit it. It is deleted when the communicator is freed, before MPI reuses the handle.
_SPEC = MPI.Comm.Create_keyval(delete_fn=lambda comm, keyval, spec: groups.forget_handle(spec))
_given: Counter[tuple[int, ...]] = Counter()
_giving = threading.Lock()


@final
class MPITransport(AbstractTransport):
    """A duplicate of an mpi4py intracommunicator, so that a user's message never matches one of ours.

    Args:
        comm: the communicator. Duplicating it is collective over its members.
        spec: its specification; None makes a unique one.
    """

    name = "mpi"

    def __init__(self, comm: Any, spec: GroupSpec | None = None) -> None:
        self.comm = comm.Dup()
        self._exchanges = 0
        self._aside = comm.Dup()  # for notes: after an error, messages may be left in comm
        self.rank = self.comm.Get_rank()
        self.size = self.comm.Get_size()
        self.ranks = world_ranks(comm)
        group_id = torch.randint(1, 2**62, (1,), generator=_fresh_generator(), device="cpu")
        self.group_id = int(self.broadcast(group_id))
        self.spec = spec or GroupSpec(self.name, self.ranks, groups.label_of_id(self.group_id))

    def all_reduce(self, wire: Tensor) -> Tensor:
        """See ``AbstractTransport.all_reduce``. For a tensor on a GPU see ``mpi_staged.py``."""
        if wire.device.type != "cpu":
            return wire.copy_(self.all_reduce(wire.cpu()))
        assert wire.is_contiguous()
        memory = MPI.buffer.fromaddress(wire.data_ptr(), wire.nbytes)  # a third of the time of wire.numpy()
        try:
            self.comm.Allreduce(MPI.IN_PLACE, [memory, _MPI_TYPES[wire.dtype]])
        except MPI.Exception as error:
            raise MismatchError(f"MPI_Allreduce of {wire.numel()} values failed: {error}") from error
        return wire

    def exchange_notes(self, note: str) -> list[str | None]:
        """See ``AbstractTransport.exchange_notes``. Point to point, so that a silent rank blocks nobody."""
        notes: list[str | None] = [None] * self.size
        notes[self.rank] = note
        message = note.encode(errors="backslashreplace")
        others = [rank for rank in range(self.size) if rank != self.rank]
        self._exchanges += 1
        tag = self._exchanges % (LEAST_TAG_UB + 1)  # of its own, so that a late note is not taken for one of the next
        sent = [self._aside.Isend([message, MPI.BYTE], rank, tag) for rank in others]
        end = time.monotonic() + PATIENCE
        while None in notes and time.monotonic() < end:
            status = MPI.Status()
            if not self._aside.Iprobe(MPI.ANY_SOURCE, tag, status):
                time.sleep(1e-4)
                continue
            received = bytearray(status.Get_count(MPI.BYTE))
            self._aside.Recv([received, MPI.BYTE], status.Get_source(), tag)
            notes[status.Get_source()] = received.decode(errors="replace")
        for request in sent:
            if not request.Test():  # the rank is silent; keep the memory that MPI still reads
                _unsent.append((request, message))
        return notes

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """See ``AbstractTransport.broadcast``. Sends bytes, so that MPI need not know the dtype."""
        if tensor.device.type != "cpu":
            return tensor.copy_(self.broadcast(tensor.cpu(), root))
        self.comm.Bcast([tensor.view(-1).view(torch.uint8).numpy(), MPI.BYTE], root)
        return tensor

    def split(self, color: int) -> AbstractTransport:
        """See ``AbstractTransport.split``."""
        comm = self.comm.Split(color, self.rank)
        try:
            return MPITransport(comm)
        finally:
            comm.Free()

    def barrier(self) -> None:
        """See ``AbstractTransport.barrier``. Sleeps between tests, as MPI_Barrier would spin."""
        request = self.comm.Ibarrier()
        pause = 1e-5
        while not request.Test():
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)

    def close(self) -> None:
        """See ``AbstractTransport.close``."""
        self.comm.Free()
        self._aside.Free()


def world_ranks(comm: Any) -> tuple[int, ...]:
    """Returns the members of a communicator by their rank in COMM_WORLD."""
    members = range(comm.Get_size())
    return tuple(comm.Get_group().Translate_ranks(list(members), MPI.COMM_WORLD.Get_group()))


def world() -> Any:
    """Returns MPI's COMM_WORLD."""
    return MPI.COMM_WORLD


def spec_of(comm: Any) -> GroupSpec:
    """Returns the specification of a user's communicator. It stays the same until the communicator is freed.

    The label counts the communicators of the same ranks. That needs no message, so one rank alone can build a layer.
    """
    with _giving:
        spec: GroupSpec | None = comm.Get_attr(_SPEC)
        if spec is None:
            ranks = world_ranks(comm)
            _given[ranks] += 1
            spec = GroupSpec("mpi", ranks, str(_given[ranks]))
            comm.Set_attr(_SPEC, spec)
        return spec


def comm_of(spec: GroupSpec) -> Any:
    """Makes the communicator of a specification. Collective over its ranks alone.

    The tag is made from the label, so that threads can make groups of the same ranks at the same time.
    """
    group = MPI.COMM_WORLD.Get_group().Incl(list(spec.ranks))
    return MPI.COMM_WORLD.Create_group(group, zlib.crc32(spec.label.encode()) % LEAST_TAG_UB)


def _fresh_generator() -> torch.Generator:
    """Returns a generator seeded by the operating system. The user's manual_seed is neither used nor changed."""
    generator = torch.Generator("cpu")
    generator.seed()
    return generator
