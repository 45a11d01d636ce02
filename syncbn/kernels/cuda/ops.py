# SPDX-License-Identifier: BSD-3-Clause
"""The four steps on an NVIDIA GPU: ``cuda/*.cu``, one kernel and one launch a step.

This module allocates outputs with torch and packs arguments in the order of the structs in the ``.cu`` files. It
computes nothing and waits for nothing. Contiguous and channels_last tensors are read without a copy; others are copied,
once a step. These kernels take no mask.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any, final

import torch
from torch import Tensor

from syncbn import moments
from syncbn.kernels.base import AbstractKernels, Parameters
from syncbn.kernels.cuda import geometry
from syncbn.kernels.cuda.geometry import THREADS, Geometry
from syncbn.kernels.cuda.launch import AbstractLauncher
from syncbn.moments import DTYPES, STATUS_SLOTS, Counters, Message, Numbers, Status

NAMES = dict(zip(DTYPES, ("Float16", "BFloat16", "float", "double"), strict=True))
REDUCTIONS = ("local_moments", "backward_sums")
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
# The structs of the .cu files: every field has 8 bytes. Shape 7q, Values Qqq, Numbers 4d, Reduction QQ,
# DeferredError Qd.
LOCAL_MOMENTS = struct.Struct(f"=7qQQ4d{1 + len(STATUS_SLOTS)}dQQ")
NORMALIZE = struct.Struct("=7qQQQQqqQqqQQQQqqQqqQqdd4ddQd")
BACKWARD_SUMS = struct.Struct("=7qQQQQQ4dQqqQqqQQ")
BACKWARD_INPUT = struct.Struct("=7qQQQQQQQQqq4ddQd")
_ABSENT = (0, 0, 0)


@final
class CupyKernels(AbstractKernels):
    """The kernels of ``cuda/``. Two launches forward, two backward, no wait of the host.

    Args:
        launcher: what runs them.
        host_synchronous: whether the host waits for the all-reduce anyway. It then compares calls and counters at once.
            Otherwise the device compares them, and errors are deferred.
        threads: the largest block.
    """

    name = "cupy"

    def __init__(self, launcher: AbstractLauncher, *, host_synchronous: bool = False, threads: int = THREADS) -> None:
        self._launcher, self._threads = launcher, threads
        self.deferred = not host_synchronous

    def local_moments(self, x: Tensor, mask: Tensor | None, numbers: Numbers, status: Status) -> Tensor:
        """See :meth:`AbstractKernels.local_moments`."""
        assert mask is None
        x, plan = self._laid_out(x, sums=True)
        wire = x.new_empty(moments.wire_length(plan.C), dtype=torch.float64)
        pointer = x.data_ptr()
        keep, scratch = self._scratch(x, plan)
        self._run(
            "local_moments",
            x,
            plan,
            LOCAL_MOMENTS,
            (*_shape(plan, pointer), pointer, wire.data_ptr(), *numbers, float(plan.N * plan.S), *status, *scratch),
        )
        del keep  # torch reuses its memory only after this stream is done with it
        return wire

    def read_counters(self, wire: Tensor, message: Message) -> Counters | None:
        """See :meth:`AbstractKernels.read_counters`. If the host would have to wait, normalize reads them instead.

        Errors that the device found in earlier calls are raised here and in check_sums. That is after the all-reduce,
        so that the other ranks do not wait for this one.
        """
        if not self.deferred:
            return moments.read_counters(wire, message.numbers)
        self._launcher.deferred_errors(wire).look()
        return None

    def normalize(self, x: Tensor, wire: Tensor, parameters: Parameters, message: Message) -> tuple[Tensor, Tensor]:
        """See :meth:`AbstractKernels.normalize`."""
        weight, bias, eps, running = parameters
        dense, plan = self._laid_out(x, sums=False)
        C = plan.C
        y = torch.empty_like(dense)
        stats = wire.new_empty(2 * C + 1)
        first, pointer, out = stats.data_ptr(), dense.data_ptr(), y.data_ptr()
        threads = plan.block[0] * plan.block[1]
        stats_blocks = max(1, -(-C // threads))  # blocks with the numbers per channel
        moves = (*_ABSENT, *_ABSENT, 0, stats_blocks, 0.0)
        if running is not None:
            tracked = running.num_batches_tracked
            momentum = -1.0 if running.momentum is None else running.momentum
            if tracked is not None and (tracked.device != x.device or tracked.dtype != torch.int64):
                raise ValueError(
                    f"num_batches_tracked must be int64 on {x.device}; received {tracked.dtype} on {tracked.device}. "
                    "Move the layer with layer.to(x.device)."
                )
            counter = 0 if tracked is None else tracked.data_ptr()
            stats_blocks = 1 if running.momentum is None else stats_blocks  # a single block counts the batches: no race
            moves = (*_values(running.mean, x), *_values(running.var, x), counter, stats_blocks, momentum)
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
                eps,
                *self._comparison(message, x),
            ),
            more=stats_blocks,
        )
        if dense is not x:
            y = torch.empty_like(x).copy_(y)
        if running is not None:
            moments.tell_autograd(running)
        return y, stats

    def backward_sums(
        self,
        grad_y: Tensor,
        x: Tensor,
        stats: Tensor,
        numbers: Numbers,
        weight: torch.dtype | None = None,
        bias: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See :meth:`AbstractKernels.backward_sums`. One launch."""
        x, plan = self._laid_out(x, sums=True)
        grad_y = _like(grad_y, x)
        wire = stats.new_empty(moments.sums_length(plan.C))
        grad_weight = None if weight is None else stats.new_empty(plan.C, dtype=weight)
        grad_bias = None if bias is None else stats.new_empty(plan.C, dtype=bias)
        g, pointer, mean = grad_y.data_ptr(), x.data_ptr(), stats.data_ptr()
        keep, scratch = self._scratch(x, plan)
        self._run(
            "backward_sums",
            x,
            plan,
            BACKWARD_SUMS,
            (
                *_shape(plan, g | pointer),
                *(g, pointer, mean, mean + 8 * plan.C, wire.data_ptr()),
                *numbers,
                *_values(grad_weight, x),
                *_values(grad_bias, x),
                *scratch,
            ),
        )
        del keep
        return wire, grad_weight, grad_bias

    def check_sums(self, wire: Tensor, message: Message) -> bool:
        """See :meth:`AbstractKernels.check_sums`. Raises what :meth:`read_counters` raises."""
        if not self.deferred:
            return moments.same_call(wire[: moments.CALL].tolist(), message.numbers)
        self._launcher.deferred_errors(wire).look()
        return True

    def backward_input(
        self,
        grad_y: Tensor,
        x: Tensor,
        mask: Tensor | None,
        wire: Tensor,
        weight: Tensor | None,
        stats: Tensor,
        message: Message,
    ) -> Tensor:
        """See :meth:`AbstractKernels.backward_input`. If x is empty, one block still compares the calls."""
        assert mask is None
        dense, plan = self._laid_out(x, sums=False)
        grad_x = torch.empty_like(dense)
        if self.deferred or dense.numel():
            grad_y = _like(grad_y, dense)
            g, pointer, out = grad_y.data_ptr(), dense.data_ptr(), grad_x.data_ptr()
            mean = stats.data_ptr()  # invstd and the count lie behind it, see normalize
            self._run(
                "backward_input",
                dense,
                plan,
                BACKWARD_INPUT,
                (
                    *_shape(plan, g | pointer | out),
                    *(g, pointer, out, wire.data_ptr(), mean, mean + 8 * plan.C, mean + 16 * plan.C),
                    *_values(weight, x),
                    *self._comparison(message, x),
                ),
            )
        return grad_x if dense is x else torch.empty_like(x).copy_(grad_x)

    def _laid_out(self, x: Tensor, *, sums: bool) -> tuple[Tensor, Geometry]:
        """Returns x, or a contiguous copy of it, and its geometry."""
        plan = geometry.plan(x.shape, x.stride(), x.element_size(), self._threads, sums=sums)
        return self._laid_out(x.contiguous(), sums=sums) if plan is None else (x, plan)

    def _scratch(self, x: Tensor, plan: Geometry) -> tuple[Tensor | None, tuple[int, int]]:
        """Returns memory for partial sums and tickets, which a reduction over several blocks needs."""
        if plan.blocks == 1:
            return None, (0, 0)
        partials = x.new_empty(2 * plan.blocks * plan.C, dtype=torch.float64)
        return partials, (partials.data_ptr(), self._launcher.tickets(x, plan.groups).data_ptr())

    def _comparison(self, message: Message, x: Tensor) -> tuple[int | float, ...]:
        """Returns the fields for comparing the calls, and the address for a deferred error."""
        numbers, ranks, *_ = message
        if not self.deferred:
            return *numbers, ranks, 0, 0.0
        errors = self._launcher.deferred_errors(x)
        return *numbers, ranks, errors.address, errors.number(message, x)

    def _run(
        self, step: str, x: Tensor, plan: Geometry, layout: struct.Struct, values: tuple[Any, ...], more: int = 0
    ) -> None:
        kernel = kernel_name(step, x.dtype, plan.layout, self._launcher.slow_float64(x))
        grid = more + plan.grid
        if not x.numel() and step not in REDUCTIONS:  # only numbers per channel are written
            grid = more or 1
        self._launcher.launch(kernel, grid, plan.block, layout, values, x)


@cache
def kernel_name(step: str, dtype: torch.dtype, layout: str, slow_float64: bool) -> str:
    """Returns the name of a template instance, as the launcher compiles it."""
    if step not in REDUCTIONS:
        return f"{step}<{NAMES[dtype]}, {layout}>"
    arithmetic = "Expansion" if slow_float64 and dtype != torch.float64 else "Float64"
    return f"{step}<{NAMES[dtype]}, {layout}, {arithmetic}>"


def _shape(plan: Geometry, pointers: int) -> tuple[int, ...]:
    """Returns the fields of Shape. The access width is the largest that divides all addresses of packs."""
    together = pointers | plan.unit
    width = 16 if together % 16 == 0 else 8 if together % 8 == 0 else 0
    return plan.N, plan.C, plan.S, plan.groups, plan.blocks, plan.per_block, width


def _values(values: Tensor | None, x: Tensor) -> tuple[int, int, int]:
    """Returns the fields of Values for a vector on the device."""
    if values is None:
        return _ABSENT
    code = CODES.get(values.dtype)
    if code is None or values.device != x.device or values.dim() != 1 or len(values) != x.size(1):
        raise ValueError(
            f"weight, bias and running statistics must be floating-point of shape ({x.size(1)},) on {x.device}; "
            f"received {values.dtype} {tuple(values.shape)} on {values.device}. Move the layer with layer.to(x.device)."
        )
    return values.data_ptr(), values.stride(0), code


def _like(grad_y: Tensor, x: Tensor) -> Tensor:
    """Returns grad_y in the dtype and layout of x; grad_y itself if it has them."""
    if grad_y.dtype == x.dtype and not grad_y.is_neg() and (grad_y.stride() == x.stride() or not x.numel()):
        return grad_y
    return torch.empty_like(x).copy_(grad_y)
