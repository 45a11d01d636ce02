# SPDX-License-Identifier: BSD-3-Clause
"""MPI for GPU tensors, through pinned host memory.

The host waits, by an event, for the stream that made the tensor, and then for MPI's sum. So a CUDA graph cannot hold
this all-reduce.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor

from syncbn.transports.base import AbstractTransport

if TYPE_CHECKING:
    from syncbn.transports.mpi import MPITransport


class AbstractStage(ABC):
    """Copies a tensor to memory that MPI can read, and back."""

    @abstractmethod
    def to_host(self, tensor: Tensor) -> Tensor:
        """Returns a host copy, complete when this returns."""

    @abstractmethod
    def to_device(self, host: Tensor, tensor: Tensor) -> None:
        """Copies back what ``to_host`` returned, in the order of the current stream."""


@final
class PinnedStage(AbstractStage):
    """Stages through pinned memory. Keeps a buffer and an event for each length, dtype and device."""

    def __init__(self) -> None:
        self._pinned: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, torch.cuda.Event]] = {}

    def to_host(self, tensor: Tensor) -> Tensor:
        """See ``AbstractStage.to_host``."""
        key = tensor.numel(), tensor.dtype, tensor.device
        if key not in self._pinned:
            memory = torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._pinned[key] = memory, torch.cuda.Event()  # type: ignore[no-untyped-call]
        host, event = self._pinned[key]
        with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]  # an event belongs to the current device
            event.wait()  # another stream may still be reading the last sum
            host.copy_(tensor.view(-1), non_blocking=True)
            event.record()
        event.synchronize()
        return host

    def to_device(self, host: Tensor, tensor: Tensor) -> None:
        """See ``AbstractStage.to_device``."""
        with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
            tensor.view(-1).copy_(host, non_blocking=True)
            self._pinned[host.numel(), host.dtype, tensor.device][1].record()


@final
class StagedTransport(AbstractTransport):
    """MPI for tensors of one device type. CPU tensors are sent without a stage.

    Args:
        host: MPI for CPU tensors, over the same ranks.
        stage: copies a tensor to the host and back.
        device_type: the device type of the staged tensors.
    """

    name = "mpi"
    host_synchronous = True

    def __init__(self, host: MPITransport, stage: AbstractStage | None = None, device_type: str = "cuda") -> None:
        self.host, self.device_type = host, device_type
        self.rank, self.size, self.ranks = host.rank, host.size, host.ranks
        self.group_id, self.spec = host.group_id, host.spec
        self._stage = PinnedStage() if stage is None else stage

    def all_reduce(self, wire: Tensor) -> Tensor:
        """See ``AbstractTransport.all_reduce``."""
        if wire.device.type != self.device_type:
            return self.host.all_reduce(wire)
        _refuse_capture()
        staged = self._stage.to_host(wire)
        self.host.all_reduce(staged)
        self._stage.to_device(staged, wire)
        return wire

    def exchange_notes(self, note: str) -> list[str | None]:
        """See ``AbstractTransport.exchange_notes``."""
        return self.host.exchange_notes(note)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """See ``AbstractTransport.broadcast``."""
        if tensor.device.type != self.device_type:
            return self.host.broadcast(tensor, root)
        _refuse_capture()
        staged = self._stage.to_host(tensor)
        self.host.broadcast(staged, root)
        self._stage.to_device(staged, tensor)
        return tensor

    def split(self, color: int) -> AbstractTransport:
        """See ``AbstractTransport.split``."""
        part = cast("MPITransport", self.host.split(color))
        return StagedTransport(part, None if isinstance(self._stage, PinnedStage) else self._stage, self.device_type)

    def barrier(self) -> None:
        """See ``AbstractTransport.barrier``."""
        self.host.barrier()

    def close(self) -> None:
        """See ``AbstractTransport.close``."""
        self.host.close()


def _refuse_capture() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "A CUDA graph cannot hold an all-reduce that the host takes part in; received a capture over MPI through "
            "host memory. Use one GPU for each rank, with NCCL: through torch.distributed or syncbn's own over MPI."
        )
