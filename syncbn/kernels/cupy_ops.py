# SPDX-License-Identifier: BSD-3-Clause
"""The four steps on an NVIDIA GPU: ``cuda/*.cu``, one kernel and one launch a step.

Nothing is computed here and nothing is waited for: outputs are allocated, by torch, and arguments are packed in the
order of the structs in the ``.cu`` files. Contiguous and channels_last tensors are read where they are; others are
copied, once a step.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any, final

import torch
from torch import Tensor

from syncbn import moments
from syncbn.kernels import cuda_geometry
from syncbn.kernels.base import AbstractKernels, BatchStats
from syncbn.kernels.cuda_geometry import THREADS, Geometry
from syncbn.kernels.cuda_launch import AbstractLauncher
from syncbn.moments import DTYPES, STATUS_SLOTS, Running, Status

NAMES = dict(zip(DTYPES, ("Float16", "BFloat16", "float", "double"), strict=True))
REDUCTIONS = ("local_moments", "backward_sums")
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_ENDS = 1 + len(STATUS_SLOTS)
# The structs of the .cu files: every field has 8 bytes. Shape 7q, Values Qqq.
LOCAL_MOMENTS = struct.Struct(f"=7qQQ{_ENDS}dQQ")
NORMALIZE = struct.Struct("=7qQQQQqqQqqQQQQqqQqqQqdddQd")
BACKWARD_SUMS = struct.Struct("=7qQQQQQQqqQqqQQ")
BACKWARD_INPUT = struct.Struct("=7qQQQQQQQQqq")
_ABSENT = (0, 0, 0)
_UNKNOWN = (2.0, Status(needs_grad=1.0))  # nothing is wrong, and every rank joins backward


@final
class CupyKernels(AbstractKernels):
    """The kernels of ``cuda/``. Two launches forward, two backward, no wait of the host.

    Args:
        launcher: what runs them.
        ranks: W, for the verdict on the device.
        on_host: whether the host has waited for the all-reduce anyway, and reads the verdict there and then.
        threads: the largest block.
    """

    name = "cupy"

    def __init__(
        self, launcher: AbstractLauncher, ranks: int = 1, *, on_host: bool = False, threads: int = THREADS
    ) -> None:
        self._launcher, self._ranks, self._on_host, self._threads = launcher, ranks, on_host, threads

    def local_moments(self, x: Tensor, status: Status) -> Tensor:
        """See :meth:`AbstractKernels.local_moments`."""
        x, plan = self._laid_out(x, sums=True)
        C = plan.C
        wire = x.new_empty(2 * C + _ENDS, dtype=torch.float64)
        pointer = x.data_ptr()
        keep, scratch = self._scratch(x, plan)
        self._run(
            "local_moments",
            x,
            plan,
            LOCAL_MOMENTS,
            (*_shape(plan, pointer), pointer, wire.data_ptr(), float(plan.N * plan.S), *status, *scratch),
        )
        del keep  # torch hands it to nobody else before this stream is done with it
        return wire

    def read_status(self, wire: Tensor) -> tuple[float, Status]:
        """See :meth:`AbstractKernels.read_status`. Where that would be a wait, the verdict is left to the device.

        What it has found in earlier calls is raised here, and in backward_input: after the all-reduce, in which the
        other ranks would wait for this one.
        """
        if self._on_host:
            return moments.read_status(wire)
        self._launcher.mailbox(wire).look()
        return _UNKNOWN

    def normalize(
        self,
        x: Tensor,
        wire: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: Running | None,
        eps: float,
        count_global: float,
    ) -> tuple[Tensor, BatchStats]:
        """See :meth:`AbstractKernels.normalize`. The count is that of the wire, which only the device has read."""
        dense, plan = self._laid_out(x, sums=False)
        C = plan.C
        y = torch.empty_like(dense)
        stats = wire.new_empty(2 * C + 1)
        first, pointer, out = stats.data_ptr(), dense.data_ptr(), y.data_ptr()
        mailbox = (0, 0.0)
        if not self._on_host:
            box = self._launcher.mailbox(x)
            mailbox = (box.address, box.number(x, self._ranks))
        threads = plan.block[0] * plan.block[1]
        keepers = max(1, -(-C // threads))  # blocks with the numbers per channel
        moves = (*_ABSENT, *_ABSENT, 0, keepers, 0.0)
        if running is not None:
            tracked = running.num_batches_tracked
            momentum = -1.0 if running.momentum is None else running.momentum
            if tracked is not None and (tracked.device != x.device or tracked.dtype != torch.int64):
                raise ValueError(
                    f"num_batches_tracked must be int64 on {x.device}; received {tracked.dtype} on {tracked.device}. "
                    "Move the layer with layer.to(x.device)."
                )
            counter = 0 if tracked is None else tracked.data_ptr()
            keepers = 1 if running.momentum is None else keepers  # one that counts the batches, and no race for it
            moves = (*_values(running.mean, x), *_values(running.var, x), counter, keepers, momentum)
        self._run(
            "normalize",
            dense,
            plan,
            NORMALIZE,
            (
                *_shape(plan, pointer | out),
                *(pointer, out, wire.data_ptr()),
                *_values(weight, x),
                *_values(bias, x),
                *(first, first + 8 * C, first + 16 * C),
                *moves,
                *(eps, float(self._ranks)),
                *mailbox,
            ),
            more=keepers,
        )
        if dense is not x:
            y = torch.empty_like(x).copy_(y)
        return y, BatchStats(stats, count_global)

    def backward_sums(self, grad_y: Tensor, x: Tensor, stats: BatchStats) -> Tensor:
        """See :meth:`AbstractKernels.backward_sums`."""
        return self._backward_sums(grad_y, x, stats, None, None)

    def backward_sums_and_gradients(
        self, grad_y: Tensor, x: Tensor, stats: BatchStats, weight: torch.dtype | None, bias: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See :meth:`AbstractKernels.backward_sums_and_gradients`. One launch."""
        C = x.size(1)
        grad_weight = None if weight is None else x.new_empty(C, dtype=weight)
        grad_bias = None if bias is None else x.new_empty(C, dtype=bias)
        return self._backward_sums(grad_y, x, stats, grad_weight, grad_bias), grad_weight, grad_bias

    def _backward_sums(
        self, grad_y: Tensor, x: Tensor, stats: BatchStats, grad_weight: Tensor | None, grad_bias: Tensor | None
    ) -> Tensor:
        x, plan = self._laid_out(x, sums=True)
        grad_y = _like(grad_y, x)
        wire = stats.values.new_empty(2 * plan.C)
        g, pointer, mean = grad_y.data_ptr(), x.data_ptr(), stats.values.data_ptr()
        keep, scratch = self._scratch(x, plan)
        self._run(
            "backward_sums",
            x,
            plan,
            BACKWARD_SUMS,
            (
                *_shape(plan, g | pointer),
                *(g, pointer, mean, mean + 8 * plan.C, wire.data_ptr()),
                *_values(grad_weight, x),
                *_values(grad_bias, x),
                *scratch,
            ),
        )
        del keep
        return wire

    def backward_input(
        self, grad_y: Tensor, x: Tensor, wire: Tensor, weight: Tensor | None, stats: BatchStats
    ) -> Tensor:
        """See :meth:`AbstractKernels.backward_input`."""
        if not self._on_host:
            self._launcher.mailbox(x).look()
        dense, plan = self._laid_out(x, sums=False)
        grad_x = torch.empty_like(dense)
        if plan.N:
            grad_y = _like(grad_y, dense)
            g, pointer, out = grad_y.data_ptr(), dense.data_ptr(), grad_x.data_ptr()
            mean = stats.values.data_ptr()  # invstd and the count lie behind it, see normalize
            self._run(
                "backward_input",
                dense,
                plan,
                BACKWARD_INPUT,
                (
                    *_shape(plan, g | pointer | out),
                    *(g, pointer, out, wire.data_ptr(), mean, mean + 8 * plan.C, mean + 16 * plan.C),
                    *_values(weight, x),
                ),
            )
        return grad_x if dense is x else torch.empty_like(x).copy_(grad_x)

    def _laid_out(self, x: Tensor, *, sums: bool) -> tuple[Tensor, Geometry]:
        """Returns x, or a contiguous copy of it, and its geometry."""
        plan = cuda_geometry.plan(x.shape, x.stride(), x.element_size(), self._threads, sums=sums)
        return self._laid_out(x.contiguous(), sums=sums) if plan is None else (x, plan)

    def _scratch(self, x: Tensor, plan: Geometry) -> tuple[Tensor | None, tuple[int, int]]:
        """Returns what a reduction over several blocks needs: memory for partial sums, and tickets."""
        if plan.blocks == 1:
            return None, (0, 0)
        partials = x.new_empty(2 * plan.blocks * plan.C, dtype=torch.float64)
        return partials, (partials.data_ptr(), self._launcher.tickets(x, plan.groups).data_ptr())

    def _run(
        self, step: str, x: Tensor, plan: Geometry, layout: struct.Struct, values: tuple[Any, ...], more: int = 0
    ) -> None:
        kernel = kernel_name(step, x.dtype, plan.layout, self._launcher.slow_float64(x))
        grid = more + (plan.grid if plan.N or step != "normalize" else 0)
        self._launcher.launch(kernel, grid, plan.block, layout, values, x)


@cache
def kernel_name(step: str, dtype: torch.dtype, layout: str, slow_float64: bool) -> str:
    """Returns the instance of a template by the name that the launcher compiles it under."""
    if step not in REDUCTIONS:
        return f"{step}<{NAMES[dtype]}, {layout}>"
    arithmetic = "Expansion" if slow_float64 and dtype != torch.float64 else "Float64"
    return f"{step}<{NAMES[dtype]}, {layout}, {arithmetic}>"


def _shape(plan: Geometry, pointers: int) -> tuple[int, ...]:
    """The fields of Shape; accesses are as wide as all the addresses of packs are divisible."""
    together = pointers | plan.unit
    width = 16 if together % 16 == 0 else 8 if together % 8 == 0 else 0
    return plan.N, plan.C, plan.S, plan.groups, plan.blocks, plan.per_block, width


def _values(values: Tensor | None, x: Tensor) -> tuple[int, int, int]:
    """The fields of Values, for a vector that the kernel can reach."""
    if values is None:
        return _ABSENT
    if values.device != x.device or values.shape != x.shape[1:2] or values.dtype not in CODES:
        raise ValueError(
            f"weight, bias and running statistics must be floating-point of shape ({x.size(1)},) on {x.device}; "
            f"received {values.dtype} {tuple(values.shape)} on {values.device}. Move the layer with layer.to(x.device)."
        )
    return values.data_ptr(), values.stride(0), CODES[values.dtype]


def _like(grad_y: Tensor, x: Tensor) -> Tensor:
    """Returns grad_y in the dtype and layout of x: itself, if it is so."""
    if grad_y.dtype == x.dtype and not grad_y.is_neg() and (grad_y.stride() == x.stride() or not x.numel()):
        return grad_y
    return torch.empty_like(x).copy_(grad_y)
