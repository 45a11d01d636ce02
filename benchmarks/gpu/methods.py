# SPDX-License-Identifier: BSD-3-Clause
"""The steps that `python -m benchmarks.gpu` times, torch's and ours, and their process groups.

N batch, C channels, S product of the spatial dims, W ranks.

torch's synchronised layer is timed by its autograd function, called as torch.nn.SyncBatchNorm calls it. It needs a
process group. It is timed with two: torch's fake one of 8 ranks, and NCCL with one rank.

The fake group's all-reduce does nothing. Its all-gather splits the output along the first dim into 8 pieces, and fails
for the buffer of torch's layer, (1, W (2C + 1)). So here a gather over this group copies the input to all 8 places in
one launch, as a real one does, and calls the fake all-reduce, for the host time of a collective. The statistics
are those of 8 equal local batches; grad_x is not, since its sums are not added. Targets are judged over both groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import functional
from syncbn.calls.eager import Call
from syncbn.calls.sites import Layer, Site
from syncbn.moments import Running
from syncbn.transports.base import AbstractTransport
from syncbn.transports.single import SingleTransport
from syncbn.transports.torch_dist import TorchTransport, sum_in_place

Step = Callable[[], object]
FAKE_RANKS = 8
REAL = "nccl"
GATHERS = ("all_gather_single", "all_gather_into_tensor")
"""The name since torch 2.13, and the earlier name."""
FAKE_OF_8, NCCL_OF_1 = f"fake of {FAKE_RANKS}", "NCCL of 1"
COPY, BATCH_NORM, ALONE = "copy", "torch BatchNorm", "syncbn, alone"
OURS = tuple(f"syncbn, {group}" for group in (FAKE_OF_8, NCCL_OF_1))
THEIRS = tuple(f"torch SyncBatchNorm, {group}" for group in (FAKE_OF_8, NCCL_OF_1))
PARTNERS = {ALONE: BATCH_NORM, **dict(zip(OURS, THEIRS, strict=True))}
"""The step that each of ours is compared with: the same work over the same group."""
METHODS = (COPY, BATCH_NORM, ALONE, *OURS, *THEIRS)


@final
class FakeTransport(AbstractTransport):
    """One rank that calls the fake group, as torch's layer does.

    Its size is 1 and not 8, since the wire comes back unchanged, with the counters of one rank.

    Args:
        group: the fake process group.
    """

    name, rank, size, ranks, group_id, spec = "torch", 0, 1, (0,), 1, None

    def __init__(self, group: Any) -> None:
        self._group = group

    def all_reduce(self, wire: Tensor) -> Tensor:
        """See :meth:`AbstractTransport.all_reduce`. The fake group does not change the wire."""
        sum_in_place(wire, self._group)
        return wire

    def exchange_notes(self, note: str) -> list[str | None]:
        """See :meth:`AbstractTransport.exchange_notes`."""
        return [note]

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """See :meth:`AbstractTransport.broadcast`."""
        del root
        return tensor

    def split(self, color: int) -> AbstractTransport:
        """See :meth:`AbstractTransport.split`."""
        del color
        return self

    def barrier(self) -> None:
        """See :meth:`AbstractTransport.barrier`."""


@dataclass(frozen=True)
class Group:
    """A process group, and our transport over it."""

    name: str
    torchs: Any
    transport: AbstractTransport


@contextmanager
def process_groups() -> Iterator[tuple[list[Group], str]]:
    """Sets up torch.distributed in this process alone: the fake group as the world, and NCCL for this rank.

    Yields:
        The groups, and why NCCL is missing; empty if it is not.

    Communication:
        One broadcast over NCCL with one rank, which creates its communicator.
    """
    from torch.testing._internal.distributed import fake_pg  # registers the fake backend

    del fake_pg
    store = dist.HashStore()  # type: ignore[attr-defined]  # the fake group's own store would hold no id of NCCL
    dist.init_process_group("fake", rank=0, world_size=FAKE_RANKS, store=store)
    try:
        fake = dist.group.WORLD
        groups = [Group(FAKE_OF_8, fake, FakeTransport(fake))]
        real, problem = nccl_of_1()
        with _gather_in_one_launch(fake):
            yield groups + real, problem
    finally:
        dist.destroy_process_group()


def nccl_of_1() -> tuple[list[Group], str]:
    if not dist.is_backend_available(REAL):
        return [], f"this torch is built without {REAL}"
    try:  # local synchronisation does not wait for the 7 missing ranks
        group = dist.new_group([0], backend=REAL, use_local_synchronization=True)
        return [Group(NCCL_OF_1, group, TorchTransport(group, "cuda"))], ""
    except (RuntimeError, ValueError) as error:
        return [], str(error).partition("\n")[0]


@contextmanager
def _gather_in_one_launch(fake: Any) -> Iterator[None]:
    """Replaces the fake group's all-gather in torch.distributed, under the name that this torch's layer calls."""
    originals = {name: vars(dist)[name] for name in GATHERS if name in vars(dist)}

    def gather(original: Any, output: Tensor, tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if group is not fake:
            return original(output, tensor, group, async_op)
        output.view(FAKE_RANKS, -1).copy_(tensor)
        return dist.all_reduce(tensor, group=group)

    for name, original in originals.items():
        setattr(dist, name, partial(gather, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def methods(x: Tensor, grad_y: Tensor, groups: list[Group]) -> dict[str, Step]:
    """Returns the training steps by name: forward, backward, gradients of input, weight and bias.

    Args:
        x: (N, C, *spatial) on a GPU, requires a gradient.
        grad_y: as x.
        groups: over which torch's layer and ours synchronise.

    Returns:
        Steps by name. ``copy`` moves as many bytes as reading x, x and grad_y and writing y and grad_x. The others
        return the three gradients. torch.nn.BatchNorm is called as a module, and uses cuDNN if that takes the input.
    """
    C, dtype = x.size(1), torch.promote_types(x.dtype, torch.float32)  # parameters as under autocast
    weight, bias = (torch.ones(C, dtype=dtype, device=x.device, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    running = Running(mean, var, torch.zeros((), dtype=torch.int64, device=x.device), 0.1)

    def step(forward: Callable[[], Tensor]) -> Step:
        return lambda: torch.autograd.grad(forward(), (x, weight, bias), grad_y)

    def ours(transport: AbstractTransport) -> Step:
        layer = Layer(Site("SyncBatchNorm", compares=False), (C, 1e-5, 0.1, True, None), None, weight)

        def forward() -> Tensor:
            call = Call(x, None, True, layer, transport, running, None, None)
            return functional.batch_norm(x, None, weight, bias, call)

        return step(forward)

    def theirs(group: Any) -> Step:
        size, function = dist.get_world_size(group), torch.nn.modules._functions.SyncBatchNorm
        return step(lambda: function.apply(x, weight, bias, mean, var, 1e-5, 0.1, group, size))  # type: ignore[no-untyped-call]

    source = torch.empty(5 * x.numel() * x.element_size() // 2, dtype=torch.uint8, device=x.device)
    target = torch.empty_like(source)
    layer = (nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d)(C, dtype=dtype, device=x.device)
    steps: dict[str, Step] = {
        COPY: lambda: target.copy_(source),
        BATCH_NORM: lambda: torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad_y),
        ALONE: ours(SingleTransport()),
    }
    for group in groups:
        steps[f"syncbn, {group.name}"] = ours(group.transport)
        steps[f"torch SyncBatchNorm, {group.name}"] = theirs(group.torchs)
    return steps
