# SPDX-License-Identifier: BSD-3-Clause
"""The World: rank, device and transport of this process, and what training needs without DDP."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from syncbn import kernels, transports
from syncbn.transports import gather, watched
from syncbn.transports.announcing import announced
from syncbn.transports.base import AbstractTransport
from syncbn.transports.groups import GroupSpec
from syncbn.transports.specify import specify
from syncbn.waits import limits
from syncbn.world import arguments, averaging, packs, same_model


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
            ValueError, TypeError: on every rank, if the models differ in names, shapes or dtypes, if ``root`` differs,
                or if an argument of any rank is wrong.
        """
        tensors, error = arguments.tensors_of(module, "World.broadcast", buffers=True)
        error = error or arguments.root_error(root, self.size)
        numbers = {"root": math.nan if error is not None else float(root)}
        packs.require_same_layout(tensors, self.transport, "World.broadcast", error, numbers)
        with torch.no_grad(), gather.on_record("World.broadcast", self.transport):
            for pack in packs.by_dtype(tensors.values(), lambda t: t.dtype):
                flat = torch.cat([t.detach().reshape(-1) for t in pack])
                self.transport.broadcast(flat, root)
                for tensor, values in zip(pack, torch.split(flat, [t.numel() for t in pack]), strict=True):
                    tensor.copy_(values.view_as(tensor))

    @announced
    def average_gradients(self, module: nn.Module) -> None:
        """Replaces every gradient of ``module`` by its mean over the ranks, as DistributedDataParallel does.

        A parameter without a gradient on this rank counts as zero. One that has a gradient on no rank gets none. A
        frozen one is left alone. With local batches of different sizes, scale the loss first, see
        ``loss_scale``.

        Args:
            module: the model. Names, shapes and dtypes are equal on every rank.

        Communication:
            One all-reduce per dtype of gradient: float64 for float64, float32 for all others. One comparison of the
            layout before the first one of a model, or if a rank has another model or an error. By every rank. The
            first call of a group also compares the parameters, by one all-reduce of 3 W + 7 values.

        Raises:
            ValueError, TypeError: on every rank, if the models differ, or the module of any rank is none, has values
                that are not in memory, or a sparse gradient. At the first call also if values of parameters differ.
        """
        parameters, error = arguments.tensors_of(module, "World.average_gradients", buffers=False)
        error = error or packs.sparse_error(parameters)
        error = same_model.require_same_parameters_once(parameters, error, self.transport)
        averaging.average(parameters, error, self.transport, self.device)

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
        gather.raise_together(arguments.count_error(count), self.transport, "World.loss_scale")
        mine = torch.tensor([float(count)], dtype=torch.float64, device="cpu")
        total = gather.exchange(mine, self.transport, "World.loss_scale").item()
        if total == 0:
            raise ValueError(
                f"World.loss_scale needs a sample on some rank; received 0 on all {self.size}. Skip the step."
            )
        return count * self.size / total

    @announced
    def average(self, value: float | Tensor, weight: float = 1.0) -> float:
        """Returns the mean of a number over the ranks, the same on every rank.

        mean = sum(weight * value) / sum(weight), in float64

        For what a program logs, and for what all ranks must decide alike: the loss that L-BFGS or a scheduler sees, or
        when to stop early. It carries no gradient.

        Args:
            value: a number, or a tensor of one element. NaN and infinity count as they are.
            weight: what this rank counts, for example its number of samples; finite and >= 0. With 0 its value is left
                out.

        Communication:
            One all-reduce of 10 float64 values, by every rank; one more of texts if there is an error.

        Raises:
            ValueError, TypeError: on every rank, if a value is not one number, a weight is not one >= 0, or all are 0.
        """
        own, error = arguments.weighted(value, weight)
        mine = torch.tensor((*own, float(error is not None)), dtype=torch.float64, device="cpu")
        summed, total, errors = gather.exchange(mine, self.transport, "World.average").tolist()
        if errors:
            gather.raise_gathered(error, self.transport)
        if total == 0:
            raise ValueError(
                f"World.average needs a weight above 0 on some rank; received 0 on all {self.size}. Skip the call."
            )
        return float(summed / total)

    def within(self, process_group: Any) -> World:
        """Returns the World of a group: its ranks average gradients, and share numbers, among themselves.

        So several models train in one job, each on some of its ranks. Give its layers the same group:
        ``syncbn.convert_sync_batchnorm(model, process_group)``.

        Args:
            process_group: a torch ProcessGroup, an mpi4py communicator, or what ``subgroup`` returned. This process
                is in it.

        Communication:
            At the first use of the group: a communicator is made, by every rank of the group.
        """
        transport = transports.choose(specify(process_group), self.device.type)
        return replace(self, rank=transport.rank, size=transport.size, transport=transport)

    def free(self, process_group: GroupSpec | None) -> None:
        """Closes a group that ``subgroup`` made: over gloo it holds some 4 open files.

        A layer that still has the group makes another one at its next forward. A backward that is still to come, and
        what ``within`` returned, need the group: free it after them.

        Communication:
            By every rank of the group, at the same time.

        Raises:
            ValueError: if the group is not one that ``subgroup`` made, or is closed already.
        """
        if process_group is None and self.size == 1:  # what subgroup returns in a job of one process
            return
        if not isinstance(process_group, GroupSpec) or not transports.free(process_group):
            given: object = process_group
            received = given if given is None or isinstance(given, GroupSpec) else type(given).__name__
            raise ValueError(
                "World.free needs a group that World.subgroup made and that is still open; received "
                f"{received}. A group of your own is closed by the library that made it."
            )

    def subgroup(self, size: int) -> GroupSpec | None:
        """Divides the ranks into consecutive groups of ``size`` and returns this process's, for ``process_group``.

        Each call makes new groups, so that two threads which train at the same time can have one each. Call it once and
        keep the result, or close the group with ``free``.

        Communication:
            Collective over all ranks: one comparison of the size, then one communicator is made for each group. Call it
            on one thread.

        Raises:
            ValueError, TypeError: on every rank, if ``size`` is no integer that divides the number of ranks, or differs
                between ranks.
        """
        error, what = arguments.size_error(size, self.size), "World.subgroup"
        size = 1 if error is not None else operator.index(size)
        gather.require_equal({"size": size}, self.transport, what, "Give every rank the same one.", error)
        with gather.on_record("World.subgroup", self.transport):
            group = self.transport.split(self.rank // size)
        watched.watch(group)
        return transports.adopt(group, self.device.type)

    def barrier(self, timeout: float | None = None) -> None:
        """Waits until every rank has called this, without keeping a core busy.

        Args:
            timeout: seconds to wait at most; None for as long as it takes. So rank 0 may evaluate while the others wait
                here. A rank that has ended meanwhile is noticed in any case.

        Communication:
            A barrier, then one all-reduce of 8 values.

        Raises:
            ValueError: on every rank, if ``timeout`` of any is not a number above 0.
        """
        error: Exception | None = None
        try:
            patience = math.inf if timeout is None else limits.checked(timeout, "World.barrier(timeout)")
        except ValueError as wrong:
            patience, error = math.inf, wrong
        with gather.on_record("World.barrier", self.transport, patience):
            self.transport.barrier()
        gather.raise_together(error, self.transport, "World.barrier")

    def check(self, module: nn.Module | None = None) -> list[str]:
        """Raises what is wrong and still unsaid: deferred errors of a GPU; with ``module``, ranks whose models differ.

        A step does not wait for the GPU, so its layers raise errors at least one call late. After this call no error is
        outstanding. On a CPU errors are never deferred.

        With ``module``, ranks also compare their models, bit for bit: after another seed or checkpoint on a rank, or a
        step without averaged gradients, parameters differ. Call it once after the model is built, or once an epoch.
        Random states are not compared: dropout and the order of data may differ between ranks, and should. Buffers of
        layers that use the local batch alone, or the ranks of another group, may differ and are left out.

        Args:
            module: the model, plain or in DistributedDataParallel; None for deferred errors alone.

        Returns:
            What may be on purpose, the same on every rank, empty if there is nothing: no batch norm in the model, or
            some that use the local batch alone. The first rank warns of it.

        Communication:
            None without ``module``. Else one all-reduce of 7 W + 7 float64 values, by every rank; for T tensors one of
            2 T W + 7 more if values differ, or one of texts if the argument of any rank is wrong.

        Raises:
            ValueError, TypeError: without ``module`` as the layer's forward does on a CPU, on every rank that shares
                the layer's group. Else also on every rank, if names, shapes, dtypes or values of parameters or buffers
                differ, or if ranks synchronise other layers. It names the first tensors and the ranks.
            RuntimeError: inside ``syncbn.join``.
        """
        kernels.check(self.device)
        return [] if module is None else same_model.require_same_model(module, self.transport)

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
        gather.raise_together(arguments.exception(error), self.transport, "World.raise_together")
