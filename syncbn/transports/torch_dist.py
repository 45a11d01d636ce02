# SPDX-License-Identifier: BSD-3-Clause
"""torch.distributed: gloo for CPU tensors, the group's own backend for others."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import moments
from syncbn.moments import Numbers
from syncbn.transports import groups
from syncbn.transports.base import PATIENCE, RECENT, AbstractTransport, MismatchError
from syncbn.transports.direct import MOST_RANKS, direct_of
from syncbn.transports.groups import GroupSpec
from syncbn.waits import limits

FAREWELL = 3.0
"""Seconds that a rank which cannot ask the others leaves to the watchdog, which knows more."""
_SUM = dist.AllreduceOptions()
_SUM.reduceOp = dist.ReduceOp.SUM  # type: ignore[assignment]
_SUM.asyncOp = False
"""Read by all calls, never written."""


@final
class TorchTransport(AbstractTransport):
    """A torch.distributed process group, used as it is.

    For all ranks over gloo, ``choose`` passes a group of our own. gloo matches messages by order alone, so in DDP's
    group our wires would be mixed with its buckets. Over NCCL it passes DDP's group, since two communicators on one GPU
    may deadlock.

    Args:
        group: a ProcessGroup that this process is part of.
        device_type: the device type of the tensors to be reduced.
    """

    name = "torch"

    def __init__(self, group: Any, device_type: str = "cpu") -> None:
        self._group = weakref.ref(group)  # a strong one would outlive destroy_process_group()
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.spec = GroupSpec(self.name, self.ranks, group.group_name)
        self.device_type = device_type
        self._exchanges = self._barriers = 0
        self.recent = None if device_type == "cpu" else deque(maxlen=RECENT)
        _check_backend(group, device_type)
        self.is_direct = device_type == "cpu" and 1 < self.size <= MOST_RANKS and limit_of(group, "cpu") is not None
        if self.is_direct:
            direct_of(group, self.rank, self.size)  # kept by the group alone: it holds connections of gloo
        generator = torch.Generator("cpu")
        generator.seed()  # by the operating system: the user's manual_seed is neither used nor changed
        group_id = torch.randint(1, 2**62, (1,), generator=generator, device="cpu").to(device_type)
        self.group_id = int(self.broadcast(group_id))
        groups.agree_on_label(self.spec, self.group_id)  # group_name is a count, and other jobs have the same one

    @property
    def group(self) -> Any:
        """The process group, which torch.distributed owns."""
        group = self._group()
        if group is None:  # None would mean torch's default group
            raise RuntimeError(
                f"The {self.spec} was destroyed with destroy_process_group(); received another use of it. "
                "Call syncbn.init() again, and set layer.process_group."
            )
        return group

    def all_reduce(self, wire: Tensor) -> Tensor:
        """See ``AbstractTransport.all_reduce``. Over NCCL, the few CPU tensors of reports are copied to the GPU."""
        if wire.is_cpu and self.device_type != "cpu":
            return wire.copy_(self.all_reduce(wire.to(self.device_type)))
        group = self.group
        if self.is_direct and wire.is_cpu:
            return self.sum_of_call(wire, moments.ABSTAINS if self.current is None else self.current.numbers)
        try:
            sum_in_place(wire, group)
        except RuntimeError as error:  # gloo, also if another rank has closed the connection after its error
            raise MismatchError(f"torch.distributed.all_reduce of {wire.numel()} values failed: {error}") from error
        return wire

    def sum_of_call(self, wire: Tensor, numbers: Numbers, *, sound: bool = True) -> Tensor:
        """Does ``all_reduce`` by a direct exchange; see ``Direct.sum``."""
        group = self.group
        try:
            summed = direct_of(group, self.rank, self.size).sum(wire, numbers, group, sound=sound)
            if summed is False:  # too long: the heads agree, so gloo can sum it
                sum_in_place(wire, group)
        except RuntimeError as error:
            raise MismatchError(f"an exchange of {wire.numel()} values over gloo failed: {error}") from error
        if summed is None:
            raise MismatchError  # without a text of a library: all ranks find the same, and go on to compare notes
        return wire

    def exchange_notes(self, note: str) -> list[str | None]:
        """See ``AbstractTransport.exchange_notes``. Uses the group's store: gloo's connections may be closed."""
        store = self.group.get_group_store()
        self._exchanges += 1
        prefix = f"syncbn/notes/{self.group_id}/{self._exchanges}"
        end = time.monotonic() + PATIENCE
        notes: list[str | None] = [None] * self.size
        notes[self.rank] = note
        try:
            store.set(f"{prefix}/{self.rank}", note)
            for rank in range(self.size):
                key = f"{prefix}/{rank}"
                with contextlib.suppress(dist.DistStoreError):  # the rank is silent
                    store.wait([key], timedelta(seconds=max(0.1, end - time.monotonic())))
                    notes[rank] = store.get(key).decode()
        except RuntimeError:  # the process that holds the store is gone, and each further try prints pages
            time.sleep(FAREWELL)
        return notes

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """See ``AbstractTransport.broadcast``. Sends bytes, so that the backend need not know the dtype."""
        if tensor.is_cpu and self.device_type != "cpu":
            return tensor.copy_(self.broadcast(tensor.to(self.device_type), root))
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=self.ranks[root], group=self.group)
        return tensor

    def split(self, color: int) -> AbstractTransport:
        """See ``AbstractTransport.split``."""
        mine = torch.zeros(self.size, dtype=torch.float64, device=self.device_type)
        mine[self.rank] = color
        colors = self.all_reduce(mine).tolist()
        members = {c: [r for r, each in zip(self.ranks, colors, strict=True) if each == c] for c in sorted(set(colors))}
        limit = limit_of(self.group, self.device_type)
        if self.size < dist.get_world_size():
            return TorchTransport(group_of(tuple(members[color]), limit), self.device_type)
        made = {c: dist.new_group(ranks, timeout=limit) for c, ranks in members.items()}  # everyone makes every group
        return TorchTransport(made[color], self.device_type)

    def barrier(self) -> None:
        """See ``AbstractTransport.barrier``. Uses the group's store: a collective of gloo has a time limit."""
        store, pause = self.group.get_group_store(), 1e-4
        self._barriers += 1
        key = f"syncbn/barrier/{self.group_id}/{self._barriers}"
        if store.add(key, 1) == self.size:
            store.set(f"{key}/all", "")
        while not store.check([f"{key}/all"]):
            time.sleep(pause)
            pause = min(2 * pause, 2e-2)

    def close(self) -> None:
        """See ``AbstractTransport.close``."""
        dist.destroy_process_group(self.group)


def sum_in_place(wire: Tensor, group: Any) -> None:
    """Sums a tensor over a process group. torch.distributed.all_reduce does the same, with checks that take longer."""
    work = group.allreduce([wire], _SUM)
    if work is not None:
        work.wait()  # over NCCL, by the current stream; the host goes on


def limit_of(group: Any, device_type: str) -> timedelta | None:
    """Returns how long a collective of a new group may take: see ``limits.of_libraries``; else as in a given group.

    A group that is made without a limit gets torch's default, whatever the user gave to the one that it comes from.
    None if nobody has given a limit and the group's backend does not say.
    """
    given = limits.of_libraries()
    if given is not None:
        return given
    try:
        backend = group._get_backend(torch.device(device_type))
    except RuntimeError:  # it has none for this device, which the new group's first use says
        return None
    return getattr(getattr(backend, "options", None), "_timeout", None)


def group_of_everyone(device_type: str) -> Any:
    """Makes a process group of all ranks of the job, beside the one that the user has. Collective over all ranks."""
    return dist.new_group(timeout=limit_of(dist.group.WORLD, device_type))


def group_of(ranks: tuple[int, ...], limit: timedelta | None) -> Any:
    """Makes the process group of some ranks of the job. Collective over those ranks alone.

    torch names such a group by the number of groups that a process has made. Members with different numbers would wait
    for each other. ``split`` avoids this if all ranks take part.
    """
    return dist.new_group(list(ranks), timeout=limit, use_local_synchronization=True)


def groups_known() -> int:
    """Counts the groups that this process has: torch makes the name of a group of some ranks from it."""
    return len(dist.distributed_c10d._world.pg_names)


def _check_backend(group: Any, device_type: str) -> None:
    """Refuses a group whose backends cannot reduce tensors of this device."""
    backends = dist.get_backend_config(group)
    devices = [pair.split(":")[0] for pair in str(backends).split(",")]
    if device_type not in devices:
        raise RuntimeError(
            f"The process group needs a backend for {device_type} tensors; received one with {backends}. "
            'Initialise it with init_process_group("cpu:gloo,cuda:nccl"), or move the model.'
        )
