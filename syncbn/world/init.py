# SPDX-License-Identifier: BSD-3-Clause
"""init() returns the World: rank, device and transport of this process, and what training needs without DDP."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from syncbn import kernels, transports
from syncbn.transports import gather, groups, launchers
from syncbn.transports.announcing import announced
from syncbn.transports.base import AbstractTransport
from syncbn.transports.groups import GroupSpec
from syncbn.world import rendezvous

T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True)
class World:
    """This process's place among the processes of the job."""

    __module__ = "syncbn"

    rank: int
    size: int
    local_rank: int
    """Rank on this host."""
    device: torch.device
    launcher: str
    """torchrun, openmpi, mpich, slurm, env or none."""
    transport: AbstractTransport
    """Connects all ranks. ``transport.name`` is single, mpi, nccl or torch."""

    def broadcast(self, module: nn.Module, root: int = 0) -> None:
        """Copies parameters and buffers of ``module`` from rank ``root`` to every rank.

        Communication:
            One comparison of the layout, then one broadcast per dtype, by every rank.

        Raises:
            ValueError: on every rank, if the models differ in names, shapes or dtypes.
        """
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._require_same_layout(tensors, "World.broadcast")
        with torch.no_grad():
            for pack in _by_dtype(tensors.values(), lambda t: t.dtype):
                flat = torch.cat([t.detach().reshape(-1) for t in pack])
                self.transport.broadcast(flat, root)
                for tensor, values in zip(pack, torch.split(flat, [t.numel() for t in pack]), strict=True):
                    tensor.copy_(values.view_as(tensor))

    @announced
    def average_gradients(self, module: nn.Module) -> None:
        """Replaces every gradient of ``module`` by its mean over the ranks, as DistributedDataParallel does.

        A parameter without a gradient on this rank counts as zero. One that has a gradient on no rank gets none. A
        frozen one is left alone. With local batches of different sizes, scale the loss first, see
        :meth:`loss_scale`.

        Args:
            module: the model. Names, shapes and dtypes are equal on every rank.

        Communication:
            One comparison of the layout, then one all-reduce per dtype of gradient: float64 for float64,
            float32 for all others. By every rank.

        Raises:
            ValueError: on every rank, if the models differ, or a gradient of any rank is sparse.
        """
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._require_same_layout(parameters, "World.average_gradients", _sparse_error(parameters))
        for pack in _by_dtype(parameters.values(), _wire_dtype):
            self._average(pack)

    @announced
    def loss_scale(self, count: int) -> float:
        """Returns the factor for a mean loss, before backward, if local batches differ in size.

        scale = count * size / sum(count over the ranks)

        The gradient that is averaged over the ranks is then that of the mean loss of the global batch. Scale the loss,
        not the gradients: the layers exchange gradients inside backward, so scaling afterwards is too late.

        Args:
            count: the number of samples that this rank's mean loss is over; 0 for an empty local batch.

        Communication:
            One all-reduce of one value, by every rank.

        Raises:
            ValueError: on every rank, if a count is negative or all are 0.
        """
        usable = isinstance(count, SupportsIndex) and operator.index(count) >= 0
        error = ValueError(f"World.loss_scale needs an integer count >= 0; received {count!r}. Pass len(x).")
        gather.raise_together(None if usable else error, self.transport, "World.loss_scale")
        mine = torch.tensor([float(count)], dtype=torch.float64, device="cpu")
        total = gather.exchange(mine, self.transport, "World.loss_scale").item()
        if total == 0:
            raise ValueError(
                f"World.loss_scale needs a sample on some rank; received 0 on all {self.size}. Skip the step."
            )
        return count * self.size / total

    def subgroup(self, size: int) -> GroupSpec | None:
        """Divides the ranks into consecutive groups of ``size`` and returns this process's, for ``process_group``.

        Each call makes new groups, so that two threads which train at the same time can have one each.

        Communication:
            Collective over all ranks: one communicator is made for each group. Call it on one thread.

        Raises:
            ValueError: on every rank, if ``size`` does not divide the number of ranks.
        """
        groups.require_divisor(size, self.size, "World.subgroup(size)")
        return transports.adopt(self.transport.split(self.rank // size), self.device.type)

    def barrier(self) -> None:
        """Waits until every rank has called this, without keeping a core busy."""
        self.transport.barrier()

    def check(self) -> None:
        """Waits for this process's GPU and raises the deferred error of its layers, if there is one.

        A step does not wait for the GPU, so its layers raise errors at least one call late. After this call no error is
        outstanding. On a CPU errors are never deferred.

        Raises:
            ValueError, TypeError: as the layer's forward does on a CPU. On every rank that shares the layer's group.
        """
        kernels.check(self.device)

    @announced
    def raise_together(self, error: Exception | None) -> None:
        """Raises on every rank if any rank passes an error, so that no rank waits for one that has stopped.

        Args:
            error: this rank's ValueError, TypeError or other exception, or None.

        Communication:
            One all-reduce of one value; one more of texts if there is an error.

        Raises:
            ValueError, TypeError or RuntimeError: on every rank, naming the ranks that passed it.
        """
        gather.raise_together(error, self.transport, "World.raise_together")

    def _require_same_layout(self, tensors: Mapping[str, Tensor], what: str, *errors: Exception | None) -> None:
        # torch.compile adds _orig_mod to the names; a compiled model is the same model.
        text = repr([(name.replace("_orig_mod.", ""), tuple(t.shape), str(t.dtype)) for name, t in tensors.items()])
        layout = {
            "number of tensors": len(tensors),
            "number of values": sum(t.numel() for t in tensors.values()),
            "checksum of names, shapes and dtypes": zlib.crc32(text.encode()),
        }
        gather.require_equal(layout, self.transport, what, "Build the same model on every rank.", *errors)

    def _average(self, pack: list[nn.Parameter]) -> None:
        """All-reduces one pack: the gradients, and for each parameter a flag for whether it has one."""
        dtype = _wire_dtype(pack[0])
        flags = torch.tensor([p.grad is not None for p in pack], dtype=dtype, device=pack[0].device)
        parts = [_real(torch.zeros_like(p) if p.grad is None else p.grad) for p in pack]
        wire = torch.cat([*[part.to(dtype).reshape(-1) for part in parts], flags])
        self.transport.all_reduce(wire)
        *summed, flags = torch.split(wire, [*[part.numel() for part in parts], len(pack)])
        for parameter, part, gradient, found in zip(pack, parts, summed, flags.tolist(), strict=True):
            if found:
                mean = (gradient / self.size).view_as(part).to(part.dtype)
                mean = torch.view_as_complex(mean) if parameter.is_complex() else mean
                parameter.grad = mean if parameter.grad is None else parameter.grad.copy_(mean)


def init(*, torch_distributed: bool | None = None, device: torch.device | str | None = None) -> World:
    """Finds this process's place in the job and connects it to the others.

    Works under mpirun (Open MPI, MPICH and MPIs derived from it), srun, torchrun, and without a launcher. It may be
    called again, and then keeps the existing connections.

    Args:
        torch_distributed: True sets up torch.distributed too, so that DDP works under mpirun. None sets it up
            if nothing else connects the processes: under torchrun, and under srun without MPI.
        device: the device of this process. None takes the GPU of the local rank, else the CPU.

    Communication:
        Collective over all processes of the job.

    Raises:
        RuntimeError: if the launcher speaks MPI and mpi4py is missing, with the install line; if there are more
            processes on a host than GPUs and no ``device`` is given.
    """
    launch = launchers.detect()
    where = _device(launch) if device is None else torch.device(device)
    if where.type == "cuda":
        where = where if where.index is not None else torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(where)  # NCCL and the kernels take the current one
    if torch_distributed is None:
        torch_distributed = launch.size > 1 and not launch.speaks_mpi
    if torch_distributed:
        rendezvous.connect_torch(launch)
    elif launch.speaks_mpi and launch.size > 1:
        transports.over_mpi()
    transport = transports.choose(None, where.type)
    return World(transport.rank, transport.size, launch.local_rank, where, launch.name, transport)


def _device(launch: launchers.Launch) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if rendezvous.shares_gpus(launch):  # the same on every rank of the host
        raise RuntimeError(
            f"syncbn.init() needs a GPU for each process of a host; received {launch.local_size} processes and "
            f"{torch.cuda.device_count()} GPUs on the host of rank {launch.rank}. Start fewer processes, call "
            "syncbn.init(device='cpu'), or share a GPU knowingly with syncbn.init(device='cuda:0'): then MPI "
            "through host memory, or gloo, connects the "
            "processes, since NCCL refuses two ranks on one GPU."
        )
    return torch.device("cuda", launch.local_rank if torch.cuda.device_count() > 1 else 0)


def _sparse_error(parameters: Mapping[str, nn.Parameter]) -> Exception | None:
    """Returns the error for gradients that are not dense, as nn.Embedding(sparse=True) makes them, or None."""
    found = [name for name, p in parameters.items() if p.grad is not None and p.grad.layout is not torch.strided]
    if not found:
        return None
    return ValueError(
        f"World.average_gradients needs dense gradients; received sparse ones of {', '.join(found)}. "
        "Make the embedding with sparse=False."
    )


def _wire_dtype(tensor: Tensor) -> torch.dtype:
    """Half precision is summed in float32; MPI knows no bfloat16."""
    return torch.float64 if tensor.dtype.to_real() == torch.float64 else torch.float32


def _real(tensor: Tensor) -> Tensor:
    """Views complex numbers as pairs of real ones; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _by_dtype(tensors: Iterable[T], key: Callable[[T], torch.dtype]) -> list[list[T]]:
    packs: dict[torch.dtype, list[T]] = {}
    for tensor in tensors:
        packs.setdefault(key(tensor), []).append(tensor)
    return list(packs.values())
